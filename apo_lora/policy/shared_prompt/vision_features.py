"""The vision tower once per image: its features, shared by every pass that reads the same prompt.

A frozen tower needs no gradient, whichever way LoRA trains the language model behind it. The stock forward still runs
backward through the tower wherever checkpointing makes its inputs require gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn

from apo_lora.family.lookup import closest_family
from apo_lora.policy.batches import Batch, pixels, row_slices


def tower_is_frozen(inner_model: nn.Module) -> bool:
    """Only then do its features stay the same between the reference, the old and the policy pass, and over steps."""
    tower = closest_family(inner_model).tower_of(inner_model)
    return not any(parameter.requires_grad for parameter in tower.parameters())


def image_features(inner_model: nn.Module, batch: Batch) -> list[Tensor | None]:
    """One entry per sequence: the features (image tokens, F) of its prompt's images in order, None without any.

    Sequences of one `group` get the same tensor, computed once. It has a gradient only where the tower trains.
    """
    features_by_group: dict[int, Tensor | None] = {}
    groups = batch["group"].tolist()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not tower_is_frozen(inner_model)):
        for group, row in zip(groups, row_slices(batch, 1), strict=True):
            if group not in features_by_group:
                features_by_group[group] = _features_of_row(inner_model, row)
    return [features_by_group[group] for group in groups]


def _features_of_row(inner_model: nn.Module, row: Batch) -> Tensor | None:
    if (pixel_values := pixels(row)) is None:
        return None
    output = inner_model.get_image_features(pixel_values, row["image_grid_thw"])
    return torch.cat(closest_family(inner_model).features_by_image(output))


def embed(inner_model: nn.Module, input_ids_L: Tensor, features: list[Tensor]) -> dict[str, Any]:
    """What the language model is called with for a row of tokens: their embeddings (1, L, H), and the features of its
    images in place of image tokens.

    Raises ValueError where tokens and features are not equally many.
    """
    embeds_1LH = inner_model.get_input_embeddings()(input_ids_L.unsqueeze(0))
    family = closest_family(inner_model)
    is_image_L = family.is_image_token(inner_model, input_ids_L)
    num_tokens, num_features = int(is_image_L.sum()), sum(map(len, features))
    if num_tokens != num_features:
        raise ValueError(f"{num_tokens} image tokens but {num_features} image features; they must be equally many")
    return family.embedding_inputs(embeds_1LH, is_image_L, torch.cat(features) if features else None)
