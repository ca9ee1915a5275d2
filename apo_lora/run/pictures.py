"""Images to look at: copies in a run directory, thumbnails inside a page. No torch."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from apo_lora.data.images import ImageRef
from apo_lora.errors import DataError
from apo_lora.run.files import replacing


def saved_images(images: Iterable[ImageRef], folder: Path, root: Path, *, longest: int | None = None) -> list[str]:
    """Paths relative to `root` (the run directory): an image file's own path, otherwise that of a copy in `folder`.

    Images of different data sets may have the same name ("row 5 image 1"): each set has its own folder. `longest`
    is the longest side of a copy in pixels; such copies are compressed, since benchmarks have thousands of images.
    """
    return [str(image.path or _copy(image, folder, longest).relative_to(root)) for image in images]


def _copy(image: ImageRef, folder: Path, longest: int | None) -> Path:
    target = folder / (image.name.replace("/", "-").replace(" ", "-") + (".webp" if longest else ".png"))
    if not target.exists():
        opened = image.open()
        if longest:
            opened.thumbnail((longest, longest))
        with replacing(target) as temporary:  # an incomplete image would never be written again
            opened.save(temporary)
    return target


class Thumbnail(NamedTuple):
    url: str
    """A data: URL with the whole image as WebP."""
    width: int
    height: int


def thumbnail(file: Path, longest_side: int) -> Thumbnail | None:
    """A copy of at most `longest_side` pixels width and height; None for a file that is missing or damaged."""
    try:
        image = ImageRef(file.name, (0, 0), file).open()
    except DataError:
        return None
    image.thumbnail((longest_side, longest_side))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=80)
    return Thumbnail("data:image/webp;base64," + base64.b64encode(content.getvalue()).decode(), *image.size)
