"""The images of a rollout, processed once per prompt and kept once, not once per completion.

TRL's rollout has G rows to a prompt. It has the images of all of them processed twice, before sampling and again for
the batch, and keeps every row's pixels on the GPU until the next rollout is complete: for 64 rows with one image of
1,024 tokens, that is 1.2 GB.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

RowPixels = list[Tensor | None]


@contextmanager
def images_processed_once(processor: Any, groups: Sequence[int]) -> Iterator[RowPixels]:
    """Inside, `processor` is called with the rows of one rollout, and processes the images of each group's first row.

    It does so in its first call; later ones get the same. What it returns has image_grid_thw for every row, since
    image tokens are counted from it, but pixel_values only for the first rows. Afterwards the list holds every row's
    own pixels (patches, values) on the CPU, one tensor for the whole group; it is empty where prompts have no images.
    """
    by_row: RowPixels = []
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:  # a tokenizer: only text
        yield by_row
        return
    first_rows = [groups.index(group) for group in dict.fromkeys(groups)]
    source_of_row = [first_rows.index(groups.index(group)) for group in groups]
    preprocess, processed = image_processor.preprocess, {}

    def preprocess_once(images: Sequence[Sequence[Any]], **options: Any) -> dict[str, Tensor]:
        if not processed:
            assert len(images) == len(groups), f"{len(images)} lists of images for {len(groups)} rows"
            output = preprocess([images[row] for row in first_rows], **options | {"return_tensors": "pt"})
            grids = output["image_grid_thw"].split([len(images[row]) for row in first_rows])
            pixels = output["pixel_values"].split([int(grid.prod(dim=-1).sum()) for grid in grids])
            by_row.extend(pixels[source] if len(grids[source]) else None for source in source_of_row)
            processed.update(output, image_grid_thw=torch.cat([grids[source] for source in source_of_row]))
        return dict(processed)

    image_processor.preprocess = preprocess_once
    try:
        yield by_row
    finally:
        del image_processor.preprocess
