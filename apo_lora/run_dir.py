"""Every file that a run writes and reads back: names, atomic writes, and which checkpoints are whole.

    recipe.yaml        the resolved recipe               metrics.jsonl      one line per optimizer step
    environment.json   versions and device               completions.jsonl  one line per sampled completion
    preflight.json     what was checked before step 1    images/            pictures of the completions' prompts
    eval.json          before and after
    adapter/           the result, in PEFT's format      plots/             PNG
    checkpoints/       checkpoint-STEP folders           README.md          model card

A checkpoint counts only with its complete.json, which is written last and lists every file's size and hash. So a kill
at any moment leaves either a whole checkpoint or one that is recognised as unfinished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from apo_lora.errors import RunDirError

COMPLETE = "complete.json"
CHECKPOINT_PREFIX = "checkpoint-"


class RunDir:
    """The record of one run, below `path`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.preflight = self.path / "preflight.json"
        self.metrics = self.path / "metrics.jsonl"
        self.completions = self.path / "completions.jsonl"
        self.evaluation = self.path / "eval.json"
        self.model_card = self.path / "README.md"
        self.adapter = self.path / "adapter"
        self.plots = self.path / "plots"
        self.images = self.path / "images"
        self.checkpoints = self.path / "checkpoints"

    def refuse_existing(self) -> None:
        """Raises RunDirError if something is already there: nothing is ever overwritten."""
        if self.path.is_file():
            raise RunDirError(f"output.dir: {self.path} is a file; choose another with output.dir=DIR")
        above = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            what = "not writable" if above.is_dir() else "a file"
            raise RunDirError(
                f"output.dir: {self.path} cannot be made ({above} is {what}); choose another with output.dir=DIR"
            )
        if self.path.is_dir() and any(self.path.iterdir()):
            raise RunDirError(
                f"output.dir: {self.path} already holds a run; continue it with --resume auto, "
                "or start beside it with output.dir=DIR"
            )

    def create(self) -> None:
        self.refuse_existing()
        try:
            self.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise RunDirError(f"output.dir: {self.path} cannot be made ({error.strerror}); choose another") from None

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def valid_checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return [path for path in self._all_checkpoints() if is_whole(path)]

    def _all_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob(f"{CHECKPOINT_PREFIX}*"), key=checkpoint_step)

    def checkpoint_to_resume(self, wanted: str) -> Path:
        """`auto` is the last whole one; otherwise a checkpoint's path. Raises RunDirError."""
        if wanted != "auto":
            path = Path(wanted)
            if not is_whole(path):
                raise RunDirError(
                    f"--resume {wanted}: not a whole checkpoint ({why_not_whole(path)}); try --resume auto"
                )
            return path
        if not self.path.is_dir():
            raise RunDirError(f"--resume auto: there is no run in {self.path}; leave --resume out to start one")
        whole = self.valid_checkpoints()
        if not whole:
            raise RunDirError(
                f"--resume auto: {self.path} holds no whole checkpoint; remove that folder and leave --resume out"
            )
        return whole[-1]

    def remove_unfinished_checkpoints(self) -> list[Path]:
        unfinished = [path for path in self._all_checkpoints() if not is_whole(path)]
        for path in unfinished:
            shutil.rmtree(path)
        return unfinished

    def remove_old_checkpoints(self, keep: int) -> None:
        for path in self.valid_checkpoints()[:-keep]:
            # Without its complete.json first, a kill halfway leaves a folder that is known to be unfinished.
            (path / COMPLETE).unlink()
            shutil.rmtree(path)

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, so that a resumed run records every step exactly once."""
        for path in (self.metrics, self.completions):
            if path.exists():
                kept = [line for line in read_jsonl(path) if line["step"] <= step]
                write_atomically(path, "".join(_json_line(line) for line in kept))


def checkpoint_step(path: Path) -> int:
    number = path.name.removeprefix(CHECKPOINT_PREFIX)
    return int(number) if number.isdigit() else -1


def seal_checkpoint(path: Path) -> None:
    """Declares the checkpoint whole: the last thing written."""
    files = {str(p.relative_to(path)): _fingerprint(p) for p in sorted(path.rglob("*")) if p.is_file()}
    write_json(path / COMPLETE, files)


def is_whole(path: Path) -> bool:
    return why_not_whole(path) is None


def why_not_whole(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / COMPLETE).read_text())
    except FileNotFoundError:
        return f"{path} has no {COMPLETE}"
    except (OSError, ValueError):
        return f"{path / COMPLETE} cannot be read"
    if not isinstance(files, dict):
        return f"{path / COMPLETE} cannot be read"
    for name, fingerprint in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != fingerprint:
            return f"{name} was changed or cut short"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# --- files -----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Either the old file or the new one is there, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_json_line(row) for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that may have been cut by a kill: an unfinished last line is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


def _json_line(row: dict[str, Any]) -> str:
    # A lone surrogate (half a character, which sampling can produce) must not make the file unreadable.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"
