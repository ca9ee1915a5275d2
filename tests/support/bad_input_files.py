"""Contents of files for bad_input_cases.py: bytes and text, or a function that makes the path."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def picture(form="PNG", size=(60, 30), color="red", mode="RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, form, **options)
    return stream.getvalue()


def noise(form: str) -> bytes:
    """A picture that does not compress, so that half of its file is about half of its pixels."""
    stream = io.BytesIO()
    Image.effect_noise((200, 200), 60).save(stream, form)
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header says that it is this large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def folder(path: Path) -> None:
    path.mkdir(parents=True)


def parquet(**columns) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pandas

        path.parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(columns).to_parquet(path)

    return write
