"""Small data sets and pictures, made on the spot."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from apo_lora.data.examples import Example, Loaded, load_examples
from apo_lora.data.images import ImageRef
from apo_lora.recipe.schema import DataSection
from apo_lora.tiny import BASE_DIR

SHARED = Path(__file__).parents[3] / "shared" / "data"
PROCESSORS = {"tiny": BASE_DIR, "3b": SHARED / "qwen2.5-vl-3b-processor"}
SIZES = ((84, 84), (300, 200), (1000, 40), (29, 2000), (5, 7))


def section(**keys) -> DataSection:
    return DataSection(train="unused", **keys)


def load(path, *, split="train", data=None, **keys) -> Loaded:
    return load_examples(str(path), data or section(), split=split, **keys)


def picture(color="red", size=(60, 30), mode="RGB") -> Image.Image:
    return Image.new(mode, size, color)


def png(*args, **keys) -> bytes:
    return encoded(picture(*args, **keys))


def encoded(image: Image.Image, form="PNG", **keys) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **keys)
    return stream.getvalue()


def noise(form: str) -> bytes:
    """A picture that does not compress, so that half of its file is about half of its pixels."""
    return encoded(Image.effect_noise((200, 200), 60), form)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header says that it is this large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text(jsonl(*rows))
    return path


# --- what makes a file, for bad_input_cases.py -----------------------------------------------------------------------


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


# --- examples --------------------------------------------------------------------------------------------------------


def only(loaded: Loaded) -> Example:
    assert loaded.dropped == {}, loaded.dropped
    (example,) = loaded.examples
    return example


def content(example: Example, **keys) -> list:
    return ["<image>" if p["type"] == "image" else p["text"] for p in example.messages(section(**keys))[-1]["content"]]


def example_of(problem: str, num_images=0, choices=None) -> Example:
    images = tuple(ImageRef(f"{i}", (28, 28), picture(size=(28, 28))) for i in range(num_images))
    return Example(1, problem, "x", choices, images)
