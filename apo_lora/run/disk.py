"""Disk space: checked before a checkpoint is written; a full disk is a one-line error."""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apo_lora.errors import RunDirError, UserError
from apo_lora.machine import ranks
from apo_lora.run.directory import RunDir


def free_bytes(path: Path) -> int:
    """Where `path` is, or will be made."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def size(number: int) -> str:
    """Bytes, for reading."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"


def _full_disk(path: Path, free: int, needed: int, what: str, kept: str) -> RunDirError:
    wanted = f"{what} needs about {size(needed)}, and " if needed else ""
    return RunDirError(
        f"{path}: the disk is full: {wanted}{size(free)} are free. {kept}. Free some space and continue with "
        "--resume auto, or use another disk with output.dir=DIR"
    )


def require_room(path: Path, needed: int, what: str, kept: str) -> None:
    """Raises RunDirError where `needed` bytes do not fit. `kept` says what is not lost."""
    if (free := free_bytes(path)) < needed:
        raise _full_disk(path, free, needed, what, kept)


@contextmanager
def disk_errors_as_one_line(path: Path, kept: str, needed: int = 0) -> Iterator[None]:
    """Turns what is raised inside because the disk is full into a RunDirError of one line.

    Where `needed` bytes are being written, any failure with less than that free counts: torch's and safetensors'
    writers do not tell why a write failed.
    """
    try:
        yield
    except UserError:  # one line already
        raise
    except Exception as error:
        free = free_bytes(path)
        if not (_says_full(error) or (isinstance(error, (OSError, RuntimeError)) and free < needed)):
            raise
        raise _full_disk(path, free, needed, "a checkpoint", kept) from error


def _says_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # safetensors has its own exception class
            return True
        error = error.__cause__ or error.__context__
    return False


def checkpoint_bytes(run_dir: RunDir, parameters: Sequence[Any]) -> int:
    """What the next checkpoint takes: as much as the last one, or weights and Adam's two moments of the parameters."""
    estimate = sum(p.numel() * (p.element_size() + 8) for p in parameters)
    last = run_dir.last_checkpoint()
    return sum(file.stat().st_size for file in last.rglob("*") if file.is_file()) if last else estimate


@contextmanager
def room_for_checkpoint(run_dir: RunDir, folder: Path, parameters: Sequence[Any]) -> Iterator[None]:
    """In which the checkpoint `folder` is written: not begun where it does not fit, gone where it could not be ended.

    Raises RunDirError of one line; the checkpoints before are untouched.
    """
    needed, last = checkpoint_bytes(run_dir, parameters), run_dir.last_checkpoint()
    kept = f"{last.name} is complete and kept" if last else "No earlier checkpoint was saved"
    if ranks.is_main():
        require_room(run_dir.path, needed, "a checkpoint", kept)
    try:
        with disk_errors_as_one_line(run_dir.path, kept, needed):
            yield
    except RunDirError:
        if ranks.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        raise
