"""Pictures for people to look at: copies in a run directory, thumbnails inside a page. No torch."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from apo_lora.data.images import ImageRef
from apo_lora.errors import DataError
from apo_lora.run.files import replacing


def saved_images(images: Iterable[ImageRef], folder: Path, root: Path, *, longest: int | None = None) -> list[str]:
    """Their paths from `root` (the run directory) on: of an image that is a file its own, else of a copy in `folder`.

    Images of different data sets may have the same name ("row 5 image 1"): each set has a folder of its own. `longest`
    makes the copy one to look at, of so many pixels at most and compressed: of a benchmark there are thousands.
    """
    return [str(image.path or _copy(image, folder, longest).relative_to(root)) for image in images]


def _copy(image: ImageRef, folder: Path, longest: int | None) -> Path:
    target = folder / (image.name.replace("/", "-").replace(" ", "-") + (".webp" if longest else ".png"))
    if not target.exists():
        picture = image.open()
        if longest:
            picture.thumbnail((longest, longest))
        with replacing(target) as temporary:  # half a picture would never be written again
            picture.save(temporary)
    return target


class Thumbnail(NamedTuple):
    url: str
    """data:image/webp, with all of its content."""
    width: int
    height: int


def thumbnail(file: Path, longest_side: int) -> Thumbnail | None:
    """A copy of at most `longest_side` pixels width and height; None for a file that is gone or damaged."""
    try:
        image = ImageRef(file.name, (0, 0), file).open()
    except DataError:
        return None
    image.thumbnail((longest_side, longest_side))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=80)
    return Thumbnail("data:image/webp;base64," + base64.b64encode(content.getvalue()).decode(), *image.size)
