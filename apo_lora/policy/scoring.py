"""Log-probabilities and entropies of sampled tokens. The old, the reference and the policy pass all come from here.

Where the batch says which sequences share a prompt (batch["group"]), the prompt and its images are computed once for
all of them; otherwise every sequence is a separate row, as in the model's stock forward pass.

The model gives hidden states; the head is applied only at completion tokens, a chunk at a time, and with it the
gradient of what it gives. So no [B, T, vocabulary] tensor of a whole batch ever exists: for 8 completions of 1,024
tokens out of 151,936 it would be 5 GB in float32, and several of them are alive during a naive backward.

Shape suffixes: B sequences, T completion tokens, K = completion tokens that are not padding, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apo_lora.family.lookup import closest_family
from apo_lora.policy.batches import Batch, pixels, row_slices
from apo_lora.policy.shared_prompt.attention import accept_prompt_groups
from apo_lora.policy.shared_prompt.rows import pack
from apo_lora.policy.shared_prompt.vision_features import embed, image_features

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
    entropies: bool = True,
    entropy_gradient: bool = False,
) -> tuple[Tensor, ...]:
    """(logps_BT, entropies_BT) of the batch's completion tokens under `model`, in float32; 0 at padding.

    `model` is a (PEFT-wrapped) conditional-generation model: an inner model that gives hidden states, and a head.
    Its adapters count as they are switched at the moment. Gradients flow where they are enabled, and where a pass has a
    completion that is not masked out, into all but the head, which must be frozen. `rows_per_pass`
    bounds memory; the result depends neither on it nor on batch["group"]. The entropy is that of the whole vocabulary
    at `temperature`, and left out without `entropies`; it has a gradient only with `entropy_gradient`.
    """
    parts = [
        _score_rows(model, rows, temperature, logits_bytes, entropies, entropy_gradient)
        for rows in row_slices(batch, rows_per_pass or len(batch["prompt_ids"]))
    ]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _score_rows(
    model: nn.Module, batch: Batch, temperature: float, logits_bytes: int, entropies: bool, entropy_gradient: bool
) -> list[Tensor]:
    family = closest_family(model)
    inner_model, head = family.inner_of(model), family.head_of(model)
    mask_BT = batch["completion_mask"].bool()
    blank_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=mask_BT.device)
    if not mask_BT.any():  # every completion of the pass is masked out: there is nothing to compute
        return [blank_BT] * (1 + entropies)
    if batch.get("group") is not None:
        hidden_KH = _hidden_states_of_shared_prompts(inner_model, batch)
    else:
        hidden_KH = _completion_hidden_states(inner_model, batch)[mask_BT]
    targets_K = batch["completion_ids"][mask_BT]
    found = head_logps(hidden_KH, head, targets_K, temperature, logits_bytes, entropies, entropy_gradient)
    return [blank_BT.masked_scatter(mask_BT, values_K) for values_K in found]


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


def head_logps(
    hidden_KH: Tensor,
    lm_head: nn.Module,
    targets_K: Tensor,
    temperature: float = 1.0,
    logits_bytes: int = LOGITS_BYTES,
    entropies: bool = True,
    entropy_gradient: bool = False,
) -> tuple[Tensor, ...]:
    """(logps_K, entropies_K) as in token_logps.

    Each depends on the hidden state of its own token alone. So its gradient is a vector of H, which is computed while
    the logits are there, and backward needs neither to keep them nor to compute them again.
    """
    chunk = max(1, logits_bytes // (4 * lm_head.weight.shape[0]))
    with_slopes = torch.is_grad_enabled() and hidden_KH.requires_grad
    parts = [
        _chunk_logps(hidden, lm_head, targets, temperature, entropies, with_slopes, with_slopes and entropy_gradient)
        for hidden, targets in zip(hidden_KH.split(chunk), targets_K.unsqueeze(-1).split(chunk), strict=True)
    ]
    found = []
    for of_chunks in zip(*parts, strict=True):
        values, slopes = zip(*of_chunks, strict=True)
        values_K = torch.cat(values)
        found.append(values_K if slopes[0] is None else _WithSlopes.apply(hidden_KH, values_K, torch.cat(slopes)))
    return tuple(found)


class _WithSlopes(torch.autograd.Function):
    """values_K as a function of hidden_KH, whose slopes_KH are known."""

    @staticmethod
    def forward(ctx: Any, hidden_KH: Tensor, values_K: Tensor, slopes_KH: Tensor) -> Tensor:
        ctx.save_for_backward(slopes_KH)
        return values_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_K: Tensor) -> tuple[Tensor, None, None]:
        (slopes_KH,) = ctx.saved_tensors
        return (gradient_K.unsqueeze(-1) * slopes_KH).to(slopes_KH.dtype), None, None


@torch.no_grad()
def _chunk_logps(
    hidden_KH: Tensor,
    lm_head: nn.Module,
    targets_K1: Tensor,
    temperature: float,
    entropies: bool,
    slopes: bool,
    entropy_slopes: bool,
) -> list[tuple[Tensor, Tensor | None]]:
    """Log-probs, and entropies if wanted, each with its slopes (K, H) or None. What is as large as the logits is read
    and written no more than needed, and overwritten."""

    def slopes_of(gradient_KV: Tensor, divisor: float) -> Tensor:
        gradient_KV = gradient_KV.to(head_KV.dtype)
        return torch.autograd.grad(head_KV, states_KH, gradient_KV, retain_graph=True)[0].div_(divisor)

    with torch.set_grad_enabled(slopes):
        states_KH = hidden_KH.detach().requires_grad_(slopes).view_as(hidden_KH)  # module hooks of torch want no leaf
        head_KV = lm_head(states_KH)
    logits_KV = head_KV.detach() if temperature == 1 else head_KV.detach().float() / temperature
    softmax_KV = torch.log_softmax(logits_KV, dim=-1, dtype=torch.float32)
    del logits_KV
    logps_K = softmax_KV.gather(-1, targets_K1).squeeze(-1)
    if not (entropies or slopes):
        return [(logps_K, None)]
    softmax_KV.exp_()
    others = []
    if entropies:
        terms_KV = torch.special.entr(softmax_KV)  # -p ln p
        entropies_K = terms_KV.sum(dim=-1)
        terms_KV = terms_KV.addcmul_(softmax_KV, entropies_K.unsqueeze(-1), value=-1) if entropy_slopes else None
        others.append((entropies_K, None if terms_KV is None else slopes_of(terms_KV, temperature)))
        del terms_KV
    if not slopes:
        return [(logps_K, None), *others]
    softmax_KV.scatter_add_(-1, targets_K1, softmax_KV.new_full(targets_K1.shape, -1.0))
    return [(logps_K, slopes_of(softmax_KV, -temperature)), *others]
