"""Reading a prompt once while sampling: the G completions of a group start from one prompt, and its images.

generate() is unchanged, both transformers' and Unsloth's. Its first forward pass, which reads the prompts
into the key-value cache, is given one row per group, and cache and hidden states are copied for the others. So the
vision tower and the prompt's tokens cost 1/G of what they did, in time and in memory, and what is sampled is the same
but for the rounding of another batch size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apo_lora.family.lookup import closest_family

RowFeatures = list[Tensor | None]


@contextmanager
def prompts_read_once(
    inner_model: nn.Module, groups: Sequence[int], images_per_row: Sequence[int]
) -> Iterator[RowFeatures]:
    """Inside, generate() on rows whose prompts are equal where their `groups` are reads each of those once.

    It may be given the pixels of every row's images, or only those of each group's first row.
    Afterwards the list holds, for every row, the features (image tokens, F) of its images, computed on the way.
    """
    first_rows = [groups.index(group) for group in dict.fromkeys(groups)]
    place = {groups[row]: number for number, row in enumerate(first_rows)}
    source_of_row = [place[group] for group in groups]
    features: RowFeatures = []
    forward, own_forward = inner_model.forward, inner_model.__dict__.get("forward")

    def restore() -> None:
        inner_model.__dict__.pop("forward", None)
        if own_forward is not None:
            inner_model.forward = own_forward

    def read(**inputs: Any) -> Any:
        restore()  # only the first pass, which reads the prompts, is changed
        with _noted_features(inner_model, features, [images_per_row[row] for row in first_rows]):
            output = forward(**_of_rows(inputs, first_rows, images_per_row))
        copies = torch.tensor(source_of_row, device=output.last_hidden_state.device)
        _copy_rows(inputs["past_key_values"], copies)
        # generate() continues from the last position; the others would be G times the prompt's memory.
        output.last_hidden_state = output.last_hidden_state[:, -1:].index_select(0, copies)
        return output

    inner_model.forward = read
    try:
        yield features
    finally:
        restore()
    # Unsloth generates in inference mode, whose tensors autograd refuses: hence the copies.
    copies = [None if part is None else part.clone() for part in features]
    features[:] = [copies[source] for source in source_of_row] if copies else [None] * len(groups)


def _of_rows(inputs: Mapping[str, Any], rows: Sequence[int], images_per_row: Sequence[int]) -> dict[str, Any]:
    """The inner model's inputs for only these rows, with the pixels of their own images."""
    chosen = {name: _rows_of(name, value, rows) for name, value in inputs.items()}
    if inputs.get("pixel_values") is None:
        return chosen
    ends = torch.tensor(images_per_row).cumsum(0).tolist()
    images = [image for row in rows for image in range(ends[row] - images_per_row[row], ends[row])]
    chosen["image_grid_thw"] = inputs["image_grid_thw"][images]
    if len(inputs["pixel_values"]) > chosen["image_grid_thw"].prod(dim=-1).sum():  # else they are only these rows'
        patches = inputs["image_grid_thw"].prod(dim=-1).tolist()
        pixels = inputs["pixel_values"].split(patches)
        chosen["pixel_values"] = torch.cat([pixels[image] for image in images])
    return chosen


def _rows_of(name: str, value: Any, rows: Sequence[int]) -> Any:
    if isinstance(value, Mapping):  # attention masks by kind of layer
        return {kind: _rows_of(name, mask, rows) for kind, mask in value.items()}
    if not isinstance(value, Tensor) or name not in ROW_DIMENSION:
        return value
    return value.index_select(ROW_DIMENSION[name], torch.tensor(rows, device=value.device))


ROW_DIMENSION = {"input_ids": 0, "inputs_embeds": 0, "attention_mask": 0, "mm_token_type_ids": 0, "position_ids": -2}
"""Of the inputs that have rows; position_ids come as (rows, L), (3, rows, L) or (4, rows, L)."""


def _copy_rows(cache: Any, copies: Tensor) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(0, copies), layer.values.index_select(0, copies)
        if layer.is_compileable:  # a static cache, which Unsloth uses, is made for a fixed number of rows
            layer.batch_size = len(copies)
            torch._dynamo.mark_static_address(layer.keys)
            torch._dynamo.mark_static_address(layer.values)


@contextmanager
def _noted_features(inner_model: nn.Module, features: RowFeatures, images_per_row: Sequence[int]) -> Iterator[None]:
    """Inside, the features that the model computes of its images go into the list as well, one entry per row."""
    get_image_features = inner_model.get_image_features

    def noting(*arguments: Any, **options: Any) -> Any:
        output = get_image_features(*arguments, **options)
        by_image = iter(closest_family(inner_model).features_by_image(output))
        features.extend(torch.cat([next(by_image) for _ in range(n)]) if n else None for n in images_per_row)
        return output

    inner_model.get_image_features = noting
    try:
        yield
    finally:
        del inner_model.get_image_features
