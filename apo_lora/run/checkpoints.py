"""Which checkpoints are complete. One counts only with its complete.json, which is written last and lists every file's
size and hash; so a kill at any moment leaves either a complete checkpoint or one that is recognised as incomplete.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from apo_lora.run.files import write_json

COMPLETE = "complete.json"
PREFIX = "checkpoint-"


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole or not, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*"), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    number = path.name.removeprefix(PREFIX)
    return int(number) if number.isdigit() else -1


def seal_checkpoint(path: Path) -> None:
    """Declares the checkpoint whole: the last thing written, after everything else has reached the disk."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        with file.open("rb") as content:
            os.fsync(content.fileno())
    write_json(path / COMPLETE, {str(file.relative_to(path)): _fingerprint(file) for file in files})


def is_sealed(path: Path) -> bool:
    """Whether it was whole once. Its files are not read."""
    return (path / COMPLETE).exists()


def is_whole(path: Path) -> bool:
    return why_not_whole(path) is None


def why_not_whole(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {COMPLETE}, so it was not completely written"
    except (OSError, ValueError):
        files = None
    if not isinstance(files, dict):
        return f"{path / COMPLETE} cannot be read"
    for name, fingerprint in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != fingerprint:
            return f"{name} was changed or truncated"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def remove_checkpoint(path: Path) -> None:
    # Without its complete.json first, a kill halfway leaves a folder that is known to be unfinished.
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)
