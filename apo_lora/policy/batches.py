"""A batch as TRL's trainers hand it around, and how it is cut into rows.

Its keys: prompt_ids, prompt_mask, completion_ids, completion_mask, each (B, .), prompts padded on the left; for images
pixel_values, image_grid_thw, num_images (images per sequence), mm_token_type_ids. pixel_values are those of all images
in one tensor on the model's device, as a processor gives them, or a list with a tensor per sequence (None without
images), which sequences of the same prompt share and which may lie on the CPU. Added where prompts are shared:

    group            (B,) integers: rows with the same one have the same prompt, images included
    image_features   a list of B tensors (image tokens, H), or None for a row without images; see
                   shared_prompt/vision_features.py
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Batch = Mapping[str, Any]


def row_slices(batch: Batch, rows: int) -> Iterator[dict[str, Any]]:
    """The batch, `rows` sequences at a time, each with the pixels of its own images. Scalars go along unchanged."""
    total = len(batch["prompt_ids"])
    if rows >= total:
        yield dict(batch)
        return
    by_image = [key for key in _BY_IMAGE if isinstance(batch.get(key), Tensor)]
    patches_per_image = batch["image_grid_thw"].prod(dim=-1).tolist() if by_image else []
    image = patch = 0
    for start in range(0, total, rows):
        part = {key: _rows_of(value, start, start + rows) for key, value in batch.items() if key not in by_image}
        if by_image:
            images = sum(part["num_images"])
            patches = sum(patches_per_image[image : image + images])
            where = {"pixel_values": slice(patch, patch + patches), "image_grid_thw": slice(image, image + images)}
            part |= {key: batch[key][where[key]] if images else None for key in by_image}
            image, patch = image + images, patch + patches
        yield part


_BY_IMAGE = ("pixel_values", "image_grid_thw")  # their first dimension counts patches and images, not sequences


def pixels(batch: Batch) -> Tensor | None:
    """(patches, values) of all images of the batch in order, on the device of its prompts. None without images."""
    by_row = batch.get("pixel_values")
    if not isinstance(by_row, list):
        return by_row
    parts = [part for part in by_row if part is not None]
    return torch.cat(parts).to(batch["prompt_ids"].device) if parts else None


def _rows_of(value: Any, start: int, stop: int) -> Any:
    return value[start:stop] if _is_by_row(value) else value


def with_rows_replaced(batch: Batch, rows: Sequence[int], other: Batch) -> dict[str, Any]:
    """The batch with the sequences of `other`, in order, replacing its `rows`, which are whole groups.

    Scalars stay, and so does `group`: the numbers of `other` are its own, and could be those of groups that stay.
    Prompts are padded on the left and completions on the right where the two are not equally wide.
    """
    parts = [list(row_slices(both, 1)) for both in (batch, other)]
    for row, replacement in zip(rows, parts[1], strict=True):
        parts[0][row] = replacement
    return {
        key: _joined(key, [part[key] for part in parts[0]]) if _is_by_row(value) and key != "group" else value
        for key, value in batch.items()
    }


def _is_by_row(value: Any) -> bool:
    return not (value is None or (isinstance(value, Tensor) and value.ndim == 0))


_FROM_THE_LEFT = ("prompt_ids", "prompt_mask")


def _joined(key: str, parts: list[Any]) -> Any:
    if isinstance(parts[0], list):
        return [item for part in parts for item in part]
    if key in _BY_IMAGE:
        parts = [part for part in parts if part is not None]  # sequences without images
    elif parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        missing = [width - part.shape[1] for part in parts]
        sides = [(n, 0) if key in _FROM_THE_LEFT else (0, n) for n in missing]
        parts = [pad(part, side) for part, side in zip(parts, sides, strict=True)]
    return torch.cat(parts)
