"""Images of a data set: found and measured when the data is loaded, decoded only when an example is used.

An ImageRef holds a path, or a place in an Arrow table on disk; never the bytes of either.
"""

import base64
import hashlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, ImageOps

from apo_lora.data.archives import Member, find_member
from apo_lora.data.columns import is_base64_image
from apo_lora.data.text import BadRow
from apo_lora.errors import DataError
from apo_lora.family.lookup import max_aspect_ratio

if TYPE_CHECKING:
    import datasets

# Listed, so that no rarely used decoder (EPS starts Ghostscript) opens a file from the internet.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


@dataclass(frozen=True, eq=False)
class Cell:
    """A place in a table of one column that is kept on disk; `position` is that within a list of images."""

    column: "datasets.Dataset"
    row: int
    position: int | None = None

    def read(self) -> Any:
        value = self.column[self.row].column(0)[0].as_py()
        return value if self.position is None else value[self.position]


@dataclass(frozen=True)
class ImageRef:
    """An image to be opened later."""

    name: str
    """The path as the data gives it, else "row 5 image 1" or "boards/train/17"."""
    size: tuple[int, int]
    """(width, height) as it will be opened, read only from the header."""
    source: Path | bytes | Cell | Member | Image.Image = field(repr=False, compare=False)

    @property
    def path(self) -> Path | None:
        """The file, where the image is one."""
        return self.source if isinstance(self.source, Path) else None

    @property
    def needs_decoding(self) -> bool:
        """False for images of the built-in task, which are pixels already."""
        return not isinstance(self.source, Image.Image)

    def digest(self) -> str:
        """Equal for images of the same file content, wherever they are."""
        if isinstance(self.source, Image.Image):
            return hashlib.sha256(self.source.tobytes()).hexdigest()
        content = self.source.read_bytes() if isinstance(self.source, Path) else _bytes_of(self.source)
        return hashlib.sha256(content).hexdigest()

    def open(self) -> Image.Image:
        """The image, decoded now: RGB, upright, transparent parts white, of an animation the first frame."""
        try:
            with _opened(self.source) as image:
                return to_rgb(ImageOps.exif_transpose(image) if _orientation(image) > 1 else image)
        except Exception as error:  # decoders raise anything on a damaged file
            raise DataError(
                f"image {self.name}: cannot be decoded ({error}); replace the file, or remove its row"
            ) from error


def image_refs(values: Sequence[Any], *, folders: Sequence[Path], row: int) -> tuple[ImageRef, ...]:
    """References to the images of a row: each value a path, bytes, a mapping with either, a Cell, or a list of these.

    Paths are looked up in the folders, in their `images` and in archives beside them, and lead nowhere else.
    Raises BadRow.
    """
    single = [item for value in values for item in single_values(value)]
    return tuple(_image_ref(item, folders, f"row {row} image {n}") for n, item in enumerate(single, start=1))


def single_values(value: Any) -> list[Any]:
    """None -> [], one -> [one], a list (also one in a Cell) -> its members."""
    if isinstance(value, Cell) and value.position is None:
        content = value.read()
        if isinstance(content, list):
            return [replace(value, position=i) for i, item in enumerate(content) if item is not None]
        return [] if content is None else [value]
    if isinstance(value, list):
        return [single for item in value for single in single_values(item)]
    return [] if value is None else [value]


def _image_ref(value: Any, folders: Sequence[Path], place: str) -> ImageRef:
    if isinstance(value, ImageRef):
        return value
    content = value.read() if isinstance(value, Cell) else value
    if isinstance(content, Mapping):
        content = next(
            (content[key] for key in ("bytes", "path", "url", "image") if content.get(key) is not None), None
        )
    if isinstance(content, bytes):
        # Bytes that an Arrow table holds are left there; only bytes that came inside a chat turn are kept.
        source = value if isinstance(value, Cell) else content
        return ImageRef(place, _checked_size(content, place), source)
    if not isinstance(content, str) or not content.strip():
        raise BadRow("image missing", f"must be a path or bytes, not {type(content).__name__}")
    if (encoded := _encoded_bytes(content)) is not None:
        name, source = place, encoded
    else:
        name, source = content, find_image(content, folders)
    return ImageRef(name, _checked_size(source, name), source)


def find_image(text: str, folders: Sequence[Path]) -> Path | Member:
    """The file of an image path. Data from elsewhere must not name files outside its own folder."""
    text = text.strip().removeprefix("file://")
    if "://" in text:
        raise BadRow("image is a URL", f"{text}; download it and give the path of the file")
    if not folders:
        raise BadRow("image missing", f"{text} is a path, but this data set has no folder; set data.image_folder")
    # An absolute path stands for itself.
    paths = [Path(os.path.normpath(os.path.abspath(folder / text))) for folder in folders]
    within_images = [folder / "images" / text for folder in folders]
    try:
        if not any(_is_inside(path, folders) for path in paths):
            raise BadRow(
                "image outside the data folder",
                f"{text} resolves to {paths[0].resolve()}, which is not in {folders[0]}; copy it there, or set "
                "data.image_folder",
            )
        found = next((p for p in (*paths, *within_images) if os.path.isfile(p) and _is_inside(p, folders)), None)
    except (OSError, ValueError, RuntimeError) as error:  # not a path: a NUL inside, a loop of links
        raise BadRow("image missing", f"{text!r} ({error})") from None
    found = found or next((member for folder in folders if (member := find_member(text, folder))), None)
    if found is None:
        raise BadRow("image missing", f"no file {paths[0]}")
    return found


def _is_inside(path: Path, folders: Sequence[Path]) -> bool:
    """Links are followed: a data set from elsewhere may bring some. Those of the Hub's cache lead to its blobs."""
    from huggingface_hub.constants import HF_HUB_CACHE

    target, homes = path.resolve(), [folder.resolve() for folder in folders]
    cache = Path(HF_HUB_CACHE).resolve()
    in_cache = any(home.is_relative_to(cache) for home in homes) and target.is_relative_to(cache)
    return in_cache or any(target.is_relative_to(home) for home in homes)


def _encoded_bytes(text: str) -> bytes | None:
    """The image of a data URI or of bare base64; None where the text is neither."""
    try:
        if text.startswith("data:"):
            return base64.b64decode(text.split(",", 1)[1], validate=True)
        if not is_base64_image(text):
            return None
        text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (IndexError, ValueError):
        raise BadRow("image unreadable", "invalid base64") from None


def _checked_size(source: Path | bytes | Member, name: str) -> tuple[int, int]:
    """Width and height from the header, after rotation. Raises BadRow for what could not be used later."""
    try:
        with _opened(source) as image:
            width, height = image.size
            if _orientation(image) >= 5:  # a quarter turn
                width, height = height, width
    except Image.DecompressionBombError:
        raise BadRow("image too large", f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise anything on a damaged file
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadRow("image unreadable", f"{name} ({reason})") from None
    if min(width, height) < 1:
        raise BadRow("image unreadable", f"{name} is {width} x {height} pixels")
    if max(width, height) > (limit := max_aspect_ratio()) * min(width, height):
        raise BadRow("image too narrow", f"{name} is {width} x {height}; the longest aspect ratio allowed is {limit}:1")
    return width, height


def _bytes_of(source: bytes | Cell | Member) -> bytes:
    content = source if isinstance(source, bytes) else source.read()
    return content["bytes"] if isinstance(content, Mapping) else content


def _opened(source: Path | bytes | Cell | Member | Image.Image) -> Image.Image:
    """The image with its header read; its pixels are decoded on use."""
    if isinstance(source, Image.Image):
        return source.copy()
    file = source if isinstance(source, Path) else io.BytesIO(_bytes_of(source))
    # Pillow only warns between its limit and twice that; here one limit holds.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    image = Image.open(file, formats=IMAGE_FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"over {Image.MAX_IMAGE_PIXELS:,} pixels")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation that is still to be applied, 1 to 8, without decoding."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, size included
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole image to look for a late EXIF chunk
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits: transparent parts on white, 16-bit and float grey scaled rather than clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colors = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    import numpy

    levels = numpy.nan_to_num(numpy.asarray(image, dtype=numpy.float64))
    brightest = levels.max()
    if image.mode.startswith("I;16"):
        white = 65535
    else:  # 32 bits say nothing of the range: take the smallest usual one that holds the brightest level
        white = next((w for w in (1, 255, 65535) if brightest <= w and (w > 1 or image.mode == "F")), brightest)
    grey = numpy.clip(levels / white * 255, 0, 255).round().astype(numpy.uint8)
    return Image.fromarray(grey).convert("RGB")
