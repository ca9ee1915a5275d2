"""Images of data sets: lazy, converted, refused."""

import os
import struct
import zlib
from pathlib import Path

import pytest
from data_sets import encoded, load, picture, png, write_jsonl
from PIL import Image

from apo_lora.data import images as data_images
from apo_lora.data.examples import (
    drop_undecodable,
)
from apo_lora.data.images import image_refs, to_rgb
from apo_lora.data.text import BadRow
from apo_lora.errors import DataError


def reason_of(value, folder) -> str:
    with pytest.raises(BadRow) as caught:
        image_refs([value], folders=[folder], row=1)
    return caught.value.reason


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_paths_stay_inside_the_data_folder(folder, tmp_path):
    (tmp_path / "outside.png").write_bytes(png())
    for path in ("../outside.png", str(tmp_path / "outside.png"), "x/../../outside.png", "file:///etc/passwd"):
        assert reason_of(path, folder) == "image outside the data folder"
    for path in ("a.png", str(folder / "a.png"), f"file://{folder}/a.png", "x/../a.png"):
        assert image_refs([path], folders=[folder], row=1)[0].open().size == (60, 30)
    os.symlink(tmp_path, folder / "linked")  # a data set from elsewhere may bring such a link
    assert reason_of("linked/outside.png", folder) == "image outside the data folder"
    (folder / "images").mkdir()
    (folder / "images" / "c.png").write_bytes(png("green"))
    assert image_refs(["c.png"], folders=[folder], row=1)[0].open().getpixel((0, 0)) == (0, 128, 0)


def test_bad_images_have_their_reasons(folder, decodings):
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(png()[:20])
    (folder / "huge.png").write_bytes(header_only_png(30_000, 30_000))
    (folder / "large.png").write_bytes(header_only_png(10_000, 10_000))
    (folder / "none.png").write_bytes(header_only_png(0, 10))
    (folder / "thread.png").write_bytes(png(size=(402, 2)))
    reasons = {
        **dict.fromkeys(
            ("text.png", "empty.png", "cut.png", "none.png", "data:image/png;base64,%%"), "image unreadable"
        ),
        **dict.fromkeys(("huge.png", "large.png"), "image too large"),
        "thread.png": "image too narrow",
        "https://x.org/a.png": "image is a URL",
        "nothing.png": "image missing",
        ".": "image missing",
        "nul\0.png": "image missing",
        "../nul\0.png": "image missing",
        "long" * 2000: "image missing",
    }
    assert {path: reason_of(path, folder) for path in reasons} == reasons
    with pytest.raises(BadRow, match="image unreadable: row 8 image 2 .not an image."):
        image_refs([png(), b"bytes that are none"], folders=[folder], row=8)
    assert reason_of(5, folder) == "image missing"
    assert decodings == []


def test_damaged_pixels_surface_as_a_data_error(folder):
    (folder / "cut.png").write_bytes(encoded(Image.effect_noise((200, 200), 50))[:5000])
    rows = [{"image": name, "problem": "?", "answer": "1"} for name in ("a.png", "cut.png", "b.png")]
    loaded = load(write_jsonl(folder / "data.jsonl", rows))
    assert len(loaded.examples) == 3  # the header is whole
    with pytest.raises(DataError, match="image cut.png: cannot be decoded"):
        loaded.examples[1].images[0].open()
    checked = drop_undecodable(loaded)
    assert [e.row for e in checked.examples] == [1, 3] and checked.dropped["image unreadable"][0][0] == 2
    assert loaded.dropped == {}


def test_every_mode_becomes_rgb():
    import numpy

    half_red = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    assert to_rgb(half_red).getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    assert to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    for dtype in (numpy.uint16, numpy.int32, numpy.float32):
        deep = Image.fromarray(numpy.array([[0, 32768, 65535]], dtype=dtype))
        assert [to_rgb(deep).getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    unit = Image.fromarray(numpy.array([[0.0, 1.0, float("nan")]], dtype=numpy.float32))
    assert [to_rgb(unit).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 0]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_rotated_images_are_measured_as_they_are_opened(form, decodings):
    exif = Image.Exif()
    exif[0x0112] = 6
    (image,) = image_refs([encoded(picture(size=(40, 20)), form, exif=exif)], folders=(), row=1)
    assert image.size == (20, 40) and decodings == []
    assert image.open().size == (20, 40)


@pytest.mark.parametrize("form", data_images.IMAGE_FORMATS)
def test_accepted_formats(form):
    (image,) = image_refs([encoded(picture("white"), form)], folders=(), row=1)
    assert image.open().getpixel((0, 0)) == (255, 255, 255)


def test_other_formats_are_refused():
    with pytest.raises(BadRow, match="not an image"):  # its decoder would start Ghostscript
        image_refs([encoded(picture(), "EPS")], folders=(), row=1)


def test_first_frame_of_an_animation():
    frames = [picture(color, size=(8, 8)) for color in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert image_refs([moving], folders=(), row=1)[0].open().getpixel((0, 0)) == (255, 0, 0)


def test_loading_decodes_nothing(folder, decodings):
    rows = [{"image": ["a.png", "b.png"], "problem": "?", "answer": "1"}] * 50
    loaded = load(write_jsonl(folder / "data.jsonl", rows))
    assert len(loaded.examples) == 50 and decodings == []
    assert all(isinstance(image.source, Path) for example in loaded.examples for image in example.images)
    loaded.examples[0].images[0].open()
    assert len(decodings) == 1  # the counter counts
