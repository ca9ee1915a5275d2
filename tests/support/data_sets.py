"""Small data sets and pictures, made on the spot."""

import io
import json
from pathlib import Path

from PIL import Image

from apo_lora.data.examples import (
    Example,
    Loaded,
    load_examples,
)
from apo_lora.data.images import ImageRef
from apo_lora.recipe.schema import DataSection
from apo_lora.tiny import BASE_DIR

SHARED = Path(__file__).parents[3] / "shared" / "data"
PROCESSORS = {"tiny": BASE_DIR, "3b": SHARED / "qwen2.5-vl-3b-processor"}
SIZES = ((84, 84), (300, 200), (1000, 40), (29, 2000), (5, 7))


def section(**keys) -> DataSection:
    return DataSection(train="unused", **keys)


def load(path, *, split="train", data=None, **keys) -> Loaded:
    keys.setdefault("correct_gold", lambda answer, choices: answer != "unparsable")
    return load_examples(str(path), data or section(), split=split, **keys)


def picture(color="red", size=(60, 30), mode="RGB") -> Image.Image:
    return Image.new(mode, size, color)


def png(*args, **keys) -> bytes:
    return encoded(picture(*args, **keys))


def encoded(image: Image.Image, form="PNG", **keys) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **keys)
    return stream.getvalue()


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(loaded: Loaded) -> Example:
    assert loaded.dropped == {}, loaded.dropped
    (example,) = loaded.examples
    return example


def content(example: Example, **keys) -> list:
    return ["<image>" if p["type"] == "image" else p["text"] for p in example.messages(section(**keys))[-1]["content"]]


def example_of(problem: str, num_images=0, choices=None) -> Example:
    images = tuple(ImageRef(f"{i}", (28, 28), picture(size=(28, 28))) for i in range(num_images))
    return Example(1, problem, "x", choices, images)
