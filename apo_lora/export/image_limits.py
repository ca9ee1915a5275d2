"""The recipe's pixel limits where an export is run: in its processor's files, and as llama.cpp's options. No torch."""

import json
import math
from pathlib import Path
from typing import Any

from apo_lora.family.record import Family
from apo_lora.recipe.schema import DataSection

# transformers 5 writes the first one, with the image processor inside; older folders have the second.
_FILES = ("processor_config.json", "preprocessor_config.json")


def write_image_limits(folder: Path, data: DataSection) -> None:
    """Puts min_pixels and max_pixels into the processor of `folder`, as model.limit_image_size did in training."""
    for path in (folder / name for name in _FILES):
        if not path.is_file():
            continue
        config = json.loads(path.read_text(encoding="utf-8"))
        images = config if path.name == "preprocessor_config.json" else config.get("image_processor")
        if images is None:
            continue
        size = images.get("size") or {}
        shortest = data.min_pixels or images.get("min_pixels") or size.get("shortest_edge")
        longest = data.max_pixels or images.get("max_pixels") or size.get("longest_edge")
        if not shortest or not longest:
            continue  # not an image processor that counts pixels
        longest = max(longest, shortest)
        images["size"] = {"shortest_edge": shortest, "longest_edge": longest}
        # The same under the names that transformers 4, and with it vLLM, reads first.
        images["min_pixels"], images["max_pixels"] = shortest, longest
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def image_token_limits(data: DataSection | None, family: Family) -> dict[str, int]:
    """llama.cpp's options for the same: it counts tokens. Empty where the recipe sets no limit, or there is none.

    Rounded to whole tokens: up for the least, down for the most.
    """
    limits: dict[str, Any] = {}
    if data and data.min_pixels:
        limits["--image-min-tokens"] = math.ceil(data.min_pixels / family.pixels_per_token)
    if data and data.max_pixels:
        most = max(1, data.max_pixels // family.pixels_per_token)
        limits["--image-max-tokens"] = max(most, limits.get("--image-min-tokens", 0))
    return limits
