"""Files that survive a kill: one is replaced as a whole, and one of JSON lines only ever grows by whole lines.

`locked` keeps two processes from writing into one folder.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from apo_lora.errors import RunDirError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock on an existing folder. Raises RunDirError where another process holds it.

    The lock is the operating system's, on the folder itself: no file is left behind, and a process gives it up however
    it ends. File systems without such locks, and Windows, which has none on folders, are written to without it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        if not _taken(descriptor):
            raise RunDirError(f"{folder}: another process is writing to it; wait for that process, or stop it")
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    """Whether this process has the lock now, or needs none."""
    from filelock import lock_descriptor  # a notebook's kernel, which may not have it, reads files with this module

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:
        return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` at the end: the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # a suffix may say the format
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(map(_as_line, rows)))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a+b") as file:
        _complete_last_line(file)
        file.write(b"".join(map(_as_line, rows)))
        file.flush()
        os.fsync(file.fileno())  # a checkpoint that survives a power cut must not be ahead of its record


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file. A last line that a kill cut, wherever, is left out.

    Raises RunDirError at any other line that is not a JSON object: what follows it must not be lost silently.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = _parsed(line)
            if row is not None:
                yield row
            elif line.endswith(b"\n"):
                raise RunDirError(
                    f"{path} line {number}: not a JSON object; restore the file from a copy, or delete that line "
                    "(nothing was changed)"
                )


def _as_line(row: dict[str, Any]) -> bytes:
    # A lone surrogate (half a character, which sampling can produce) must not make the file unreadable.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:  # also a UnicodeDecodeError
        return None
    return row if isinstance(row, dict) else None


def _complete_last_line(file: BinaryIO) -> None:
    """Ends a last row that lacks its line break, or removes what a kill left of one: the next row gets its own line."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start_of_last = content.rfind(b"\n") + 1
    if _parsed(content[start_of_last:]) is None:
        file.truncate(start_of_last)
    else:
        file.write(b"\n")
