"""Log-probabilities and entropies of sampled tokens. The old, the reference and the policy pass all come from here.

Where the batch says which sequences share a prompt (batch["group"]), the prompt and its images are computed once for
all of them; otherwise every sequence is a separate row, as in the model's stock forward pass.

The model gives hidden states; the head is applied only at completion tokens, a chunk at a time, and recomputed in
backward. So no [B, T, vocabulary] tensor of a whole batch ever exists: for 8 completions of 1,024 tokens out of 151,936
it would be 5 GB in float32, and several of them are alive during a naive backward.

Shape suffixes: B sequences, T completion tokens, K = completion tokens that are not padding, H hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from apo_lora.family.lookup import closest_family
from apo_lora.machine.compat import torch_checkpoint
from apo_lora.policy.batches import Batch, pixels, row_slices
from apo_lora.policy.shared_prompt.attention import accept_prompt_groups
from apo_lora.policy.shared_prompt.rows import pack
from apo_lora.policy.shared_prompt.vision_features import embed, image_features

checkpoint = torch_checkpoint()

LOGITS_BYTES = 128 * 2**20
"""Budget for one chunk of float32 logits; a handful of tensors of this size live at the peak. A chunk is 220 tokens of
the 3B: by the published figures of a T4 to a 4090, enough for arithmetic and not reading the head to be what limits."""


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

    `model` is a (PEFT-wrapped) conditional-generation model: an inner model that gives hidden states, and a head.
    Its adapters count as they are switched at the moment. Gradients flow where they are enabled, and where a pass has a
    completion that is not masked out. `rows_per_pass`
    bounds memory; the result depends neither on it nor on batch["group"]. The entropy is that of the whole vocabulary
    at `temperature`; it has a gradient only with `entropy_gradient`, which costs memory.
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
    family = closest_family(model)
    inner_model, head = family.inner_of(model), family.head_of(model)
    mask_BT = batch["completion_mask"].bool()
    blank_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
    if not mask_BT.any():  # every completion of the pass is masked out: there is nothing to compute
        return blank_BT, blank_BT
    if batch.get("group") is not None:
        hidden_KH = _hidden_states_of_shared_prompts(inner_model, batch)
    else:
        hidden_KH = _completion_hidden_states(inner_model, batch)[mask_BT]
    logps_K, entropies_K = _head_logps(
        hidden_KH, head, batch["completion_ids"][mask_BT], temperature, logits_bytes, entropy_gradient
    )
    return blank_BT.masked_scatter(mask_BT, logps_K), blank_BT.masked_scatter(mask_BT, entropies_K)


def _hidden_states_of_shared_prompts(inner_model: nn.Module, batch: Batch) -> Tensor:
    """Final hidden states that predict the completion tokens, from one row of all prompts and completions: (K, H)."""
    row = pack(inner_model, batch)
    features = batch.get("image_features") or image_features(inner_model, batch)
    used = [features[sequence] for sequence in row.prompt_rows]
    family = closest_family(inner_model)
    language_model = family.language_of(inner_model)
    accept_prompt_groups(language_model)
    hidden_1LH = language_model(
        **embed(inner_model, row.input_ids_L, [part for part in used if part is not None]),
        prompt_groups=row.prompt_groups,
        position_ids=row.position_ids_3L.unsqueeze(1),
        use_cache=False,
    )[0]
    return hidden_1LH[0].index_select(0, row.sources_K)


def _completion_hidden_states(inner_model: nn.Module, batch: Batch) -> Tensor:
    """Final hidden states at the positions that predict the completion tokens. Returns (B, T, H)."""
    num_completion_tokens = batch["completion_ids"].shape[1]
    images = {}
    if (pixel_values := pixels(batch)) is not None:
        images = {"pixel_values": pixel_values, "image_grid_thw": batch["image_grid_thw"]}
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
