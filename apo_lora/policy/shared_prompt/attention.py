"""Attention of a row in which completions share their prompt, without any mask of the whole row.

A mask of L x L pairs would hide most of them and still be computed: completions do not see each other. Instead, every
stretch of the row is one call of PyTorch's own attention: a prompt causally on itself, a completion on its prompt and
itself. Their cost is linear in the number of completions. The only mask is that of a group's longest completion, as
wide as its prompt and itself; shorter ones use its corner, and every layer the same tensor, in the form that SDPA's
kernels read: it would convert and pad another for every layer and completion.

The model's layers get here through transformers' registry of attention functions: what a language model is called with
beyond its own arguments reaches that function, and the one that the model uses is wrapped to accept `prompt_groups`.
The same wrapper keeps sampling from copying keys and values: wherever there is a mask, transformers repeats the whole
cache for every query head, for each token and layer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from apo_lora.family.lookup import closest_family

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class PromptGroup(NamedTuple):
    """A prompt with its completions."""

    prompt: int
    """Tokens."""
    completions: tuple[int, ...]
    """Tokens of each in the order of the row; none is empty."""

    def mask(self, like: Tensor) -> Tensor:
        """(longest completion, prompt + longest completion), added to scores: 0 for all of the prompt, and itself up to
        here, else -inf. Rows begin at multiples of 16 values."""
        longest = max(self.completions, default=0)
        width = self.prompt + longest
        mask = like.new_full((longest, width + -width % 16), -torch.inf).triu_(self.prompt + 1)
        return mask[:, :width]


class PromptGroups:
    """A whole row.

    Not a tuple or a dataclass: torch.compile looks into those, treats the lengths as constants of a layer, and compiles
    it again for every pass.
    """

    def __init__(self, *members: PromptGroup):
        self.members = members
        self._masks: list[Tensor] = []

    def masks(self, like: Tensor) -> list[Tensor]:
        """One per member, made for the first layer."""
        if not self._masks:
            self._masks = [member.mask(like) for member in self.members]
        return self._masks


@torch.compiler.disable
def attend(query: Tensor, key: Tensor, value: Tensor, groups: PromptGroups, scaling: float | None) -> Tensor:
    """query (1, heads, L, D); key and value (1, key heads, L, D). Returns (1, L, heads, D).

    Unsloth compiles whole layers on a GPU. This stays out of their graphs: its shapes are other ones in every pass.
    """
    lengths = [length for prompt, completions in groups.members for length in (prompt, *completions)]
    # Splitting once keeps backward linear: the gradient of every single slice would be as long as the row.
    queries, keys, values = (iter(tensor[0].split(lengths, dim=1)) for tensor in (query, key, value))
    parts = []
    masks = groups.masks(value)  # in the dtype that autocast has SDPA compute in; rotation may have widened the others
    for (prompt, completions), mask in zip(groups.members, masks, strict=True):
        prompt_key, prompt_value = next(keys), next(values)
        parts.append(_attend_row(next(queries), prompt_key, prompt_value, is_causal=True, scale=scaling))
        for length in completions:
            parts.append(
                _attend_row(
                    next(queries),
                    torch.cat([prompt_key, next(keys)], dim=1),
                    torch.cat([prompt_value, next(values)], dim=1),
                    attn_mask=mask[:length, : prompt + length],
                    scale=scaling,
                )
            )
    return torch.cat(parts).flatten(1, 2).unsqueeze(0)


def _attend_row(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """query (heads, L, D); key and value (key heads, S, D). Returns (L, key heads, query heads of each, D).

    Key heads take the place of the batch, and the query heads of each see it through a stride of 0. SDPA's enable_gqa
    would copy: with a mask, or on a GPU before Ampere, no fused kernel takes it (PyTorch 2.10), and the one that is
    left repeats keys and values, and holds the scores.
    """
    query = query.unflatten(0, (len(key), -1))
    key, value = (tensor.unsqueeze(1).expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, **options).permute(2, 0, 1, 3)


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """One new token per row against a cache: the query heads of a key head become its queries.

    query (B, heads, 1, D); key and value (B, key heads, S, D); mask (B, 1, 1, S). Returns (B, 1, heads, D).
    """
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, width)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(rows, 1, heads, width)


@torch.compiler.disable
def attend_several(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Prompts read into a cache. query (B, heads, L, D); key and value (B, key heads, S, D). Returns (B, L, heads, D).

    mask (B, 1, L, S); None is causal, and sees the first L of the cache. Row by row: rows and key heads cannot both
    take the place of the batch without a copy.
    """
    if mask is None:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    masks = [None] * len(query) if mask is None else mask.expand(len(query), -1, -1, -1)[:, 0]
    rows = [
        _attend_row(*row, attn_mask=visible, is_causal=visible is None, scale=scaling)
        for *row, visible in zip(query, key, value, masks, strict=True)
    ]
    return torch.stack(rows).flatten(2, 3)


def obstacle(model: nn.Module) -> str | None:
    """Why this model cannot compute completions behind one shared prompt, or None."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    family = closest_family(model)
    if not family.shares_prompts:
        return f"it is not implemented for {family.model_type} models"
    text = family.language_of(family.inner_of(model)).config
    if set(getattr(text, "layer_types", ["full_attention"])) != {"full_attention"}:
        return "not every layer attends to the whole sequence (sliding_attention)"
    if text.attention_dropout:
        return f"the model uses attention dropout ({text.attention_dropout})"
    if text._attn_implementation not in ALL_ATTENTION_FUNCTIONS:
        return f"attention {text._attn_implementation!r} is not in transformers' registry"
    return None


def accept_prompt_groups(model: nn.Module) -> None:
    """From now on the model's attention function accepts prompt_groups in place of a mask, and where it is
    transformers' SDPA, sampling copies no keys and values for query heads. All other calls reach it unchanged."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config.get_text_config()._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:  # obstacle() says so where that matters
        return
    attention = ALL_ATTENTION_FUNCTIONS[name]
    if not getattr(attention, "_accepts_prompt_groups", False):
        ALL_ATTENTION_FUNCTIONS[name] = _accepting_prompt_groups(
            attention, is_sdpa=name == "sdpa" and _is_upstreams(attention)
        )


def _is_upstreams(attention: Attention) -> bool:
    """Not a function that somebody registered in its place. Unsloth's stands aside for rows that are not packed."""
    return attention.__module__.partition(".")[0] in ("transformers", "unsloth", "unsloth_zoo")


def _accepting_prompt_groups(attention: Attention, is_sdpa: bool) -> Attention:
    @functools.wraps(attention)  # Unsloth marks functions by attributes, and looks for them
    def call(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        prompt_groups: PromptGroups | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if prompt_groups is not None:
            return attend(query, key, value, prompt_groups, options.get("scaling")), None
        if is_sdpa and _is_plain_sampling(module, query, key, attention_mask, options):
            grouped = attend_one if query.shape[2] == 1 else attend_several
            return grouped(query, key, value, attention_mask, options.get("scaling")), None
        return attention(module, query, key, value, attention_mask, **options)

    call._accepts_prompt_groups = True
    return call


def _is_plain_sampling(module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> bool:
    """Whether there are fewer key heads than query heads, no gradient, and nothing asked for but scale and mask."""
    rows, heads, length, _ = query.shape
    if heads == key.shape[1] or torch.is_grad_enabled():
        return False
    if any(
        value is not None and not (name in ("dropout", "output_attentions") and not value)
        for name, value in options.items()
        if name not in ("scaling", "position_ids", "use_cache")  # the latter two mean nothing to SDPA
    ):
        return False
    if mask is None:  # one token sees all of the cache; several are causal
        return length == 1 or getattr(module, "is_causal", True)
    return mask.shape[0] in (1, rows) and mask.shape[1:] == (1, length, key.shape[2])
