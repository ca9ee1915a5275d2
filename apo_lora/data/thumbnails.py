"""Pictures small enough to stand inside a page. No torch."""

import base64
import io
from pathlib import Path

from apo_lora.data.images import ImageRef
from apo_lora.errors import DataError


def thumbnail_url(file: Path, longest_side: int) -> str | None:
    """A data: URL of a copy at most `longest_side` pixels wide and high; None for a file that is gone or damaged."""
    try:
        image = ImageRef(file.name, (0, 0), file).open()
    except DataError:
        return None
    image.thumbnail((longest_side, longest_side))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
