"""Images of data sets: lazy and converted. What is refused is in bad_input_cases.py."""

from pathlib import Path

import pytest
from data_sets import encoded, load, picture, png, write_jsonl
from PIL import Image

from apo_lora.data import images as data_images
from apo_lora.data.examples import drop_undecodable
from apo_lora.data.images import image_refs, to_rgb
from apo_lora.errors import DataError


def test_paths_are_found_in_the_data_folder_and_its_images(folder):
    for path in ("a.png", str(folder / "a.png"), f"file://{folder}/a.png", "x/../a.png"):
        assert image_refs([path], folders=[folder], row=1)[0].open().size == (60, 30)
    (folder / "images").mkdir()
    (folder / "images" / "c.png").write_bytes(png("green"))
    assert image_refs(["c.png"], folders=[folder], row=1)[0].open().getpixel((0, 0)) == (0, 128, 0)


@pytest.mark.parametrize(("name", "form"), [("a.png", "JPEG"), ("a", "PNG")])
def test_an_image_is_what_its_content_says(folder, name, form):
    (folder / name).write_bytes(encoded(picture("white", size=(1, 1)), form))
    (image,) = image_refs([name], folders=[folder], row=1)
    assert image.size == (1, 1) and image.open().getpixel((0, 0)) == (255, 255, 255)


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
    """Red on the left, blue on the right, and a note in the file that it is to be turned by a quarter."""
    taken, exif = picture("red", size=(40, 20)), Image.Exif()
    taken.paste("blue", (20, 0, 40, 20))
    exif[0x0112] = 6
    (image,) = image_refs([encoded(taken, form, exif=exif)], folders=(), row=1)
    assert image.size == (20, 40) and decodings == []
    opened = image.open()
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 2)) == pytest.approx((255, 0, 0), abs=9)
    assert opened.getpixel((10, 37)) == pytest.approx((0, 0, 255), abs=9)


@pytest.mark.parametrize("form", data_images.IMAGE_FORMATS)
def test_accepted_formats(form):
    (image,) = image_refs([encoded(picture("white"), form)], folders=(), row=1)
    assert image.open().getpixel((0, 0)) == (255, 255, 255)


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
