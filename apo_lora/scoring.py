"""Log-probabilities and entropies of sampled tokens. The old, the reference and the policy pass all come from here.

The model gives hidden states; the head is applied only at completion tokens, a chunk at a time, and recomputed in
backward. So no [B, T, vocabulary] tensor of a whole batch ever exists: for 8 completions of 1,024 tokens out of 151,936
it would be 5 GB in float32, and several of them are alive during a naive backward.

Shape suffixes: B sequences, T completion tokens, K = completion tokens that are not padding, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 256 * 2**20
"""Budget for one chunk of float32 logits; a handful of tensors of this size live at the peak."""

Batch = Mapping[str, Any]
"""What TRL's trainers hand around: prompt_ids, prompt_mask, completion_ids, completion_mask, each (B, .), and for
images pixel_values, image_grid_thw, num_images (images per sequence), mm_token_type_ids."""


def token_logps(
    model: nn.Module,
    batch: Batch,
    *,
    temperature: float = 1.0,
    rows_per_pass: int | None = None,
    logits_bytes: int = LOGITS_BYTES,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """(logps_BT, entropies_BT) of the batch's completion tokens under `model`, in float32; 0 at padding.

    `model` is a (PEFT-wrapped) conditional-generation model: an inner model that gives hidden states, and an lm_head.
    Its adapters count as they are switched at the moment. Gradients flow where they are enabled. `rows_per_pass`
    bounds memory; the result does not depend on it. The entropy is that of the whole vocabulary at `temperature`; it
    has a gradient only with `entropy_gradient`, which costs memory.
    """
    parts = [
        _score_rows(model, rows, temperature, logits_bytes, entropy_gradient)
        for rows in row_slices(batch, rows_per_pass or len(batch["prompt_ids"]))
    ]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _score_rows(
    model: nn.Module, batch: Batch, temperature: float, logits_bytes: int, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask_BT = batch["completion_mask"].bool()
    hidden_BTH = _completion_hidden_states(base.model, batch)
    logps_K, entropies_K = _head_logps(
        hidden_BTH[mask_BT], base.lm_head, batch["completion_ids"][mask_BT], temperature, logits_bytes, entropy_gradient
    )
    blank_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
    return blank_BT.masked_scatter(mask_BT, logps_K), blank_BT.masked_scatter(mask_BT, entropies_K)


def _completion_hidden_states(inner_model: nn.Module, batch: Batch) -> Tensor:
    """Final hidden states at the positions that predict the completion tokens. Returns (B, T, H)."""
    num_completion_tokens = batch["completion_ids"].shape[1]
    images = {key: batch[key] for key in ("pixel_values", "image_grid_thw") if batch.get(key) is not None}
    if images:
        images["mm_token_type_ids"] = _padded_to(batch["mm_token_type_ids"], num_completion_tokens, batch)
    hidden = inner_model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        use_cache=False,
        **images,
    )[0]
    return hidden[:, -num_completion_tokens - 1 : -1]


def _padded_to(token_types: Tensor, num_completion_tokens: int, batch: Batch) -> Tensor:
    """The prompt's token types, with zeros (text) for the completion where they are not there yet."""
    missing = batch["prompt_ids"].shape[1] + num_completion_tokens - token_types.shape[1]
    return nn.functional.pad(token_types, (0, missing))


def _head_logps(
    hidden_KH: Tensor,
    lm_head: nn.Module,
    targets_K: Tensor,
    temperature: float,
    logits_bytes: int,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    if not len(targets_K):  # every completion of the pass is masked out; the graph must survive
        return hidden_KH.float().sum(-1), hidden_KH.float().sum(-1)
    chunk = max(1, logits_bytes // (4 * lm_head.weight.shape[0]))
    # Outside autograd, checkpoint() is a plain call; inside, it keeps only the chunk's hidden states for backward.
    parts = [
        checkpoint(_chunk_logps, hidden, lm_head, targets, temperature, entropy_gradient, use_reentrant=False)
        for hidden, targets in zip(hidden_KH.split(chunk), targets_K.split(chunk), strict=True)
    ]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _chunk_logps(
    hidden_KH: Tensor, lm_head: nn.Module, targets_K: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    log_softmax_KV = torch.log_softmax(lm_head(hidden_KH).float() / temperature, dim=-1)
    logps_K = log_softmax_KV.gather(-1, targets_K.unsqueeze(-1)).squeeze(-1)
    # Checkpointing never frees what it recomputed for an output that no loss reads: two logits tensors a chunk.
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropies_K = -(log_softmax_KV.exp() * log_softmax_KV).sum(dim=-1)
    return logps_K, entropies_K


def row_slices(batch: Batch, rows: int) -> Iterator[dict[str, Any]]:
    """The batch, `rows` sequences at a time, each with the pixels of its own images. Scalars go along unchanged."""
    total = len(batch["prompt_ids"])
    if rows >= total:
        yield dict(batch)
        return
    has_images = batch.get("pixel_values") is not None
    patches_per_image = batch["image_grid_thw"].prod(dim=-1).tolist() if has_images else []
    image = patch = 0
    for start in range(0, total, rows):
        part = {key: _rows_of(value, start, start + rows) for key, value in batch.items() if key not in _BY_IMAGE}
        if has_images:
            images = sum(part["num_images"])
            patches = sum(patches_per_image[image : image + images])
            part["pixel_values"] = batch["pixel_values"][patch : patch + patches] if images else None
            part["image_grid_thw"] = batch["image_grid_thw"][image : image + images] if images else None
            image, patch = image + images, patch + patches
        yield part


_BY_IMAGE = ("pixel_values", "image_grid_thw")  # their first dimension counts patches and images, not sequences


def _rows_of(value: Any, start: int, stop: int) -> Any:
    is_scalar = value is None or (isinstance(value, Tensor) and value.ndim == 0)
    return value if is_scalar else value[start:stop]
