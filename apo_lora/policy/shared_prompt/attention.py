"""Attention of a row in which completions share their prompt, without any mask of the whole row.

A mask of L x L pairs would hide most of them and still be computed: completions do not see each other. Instead, every
stretch of the row is one call of PyTorch's own attention: a prompt causally on itself, a completion on its prompt and
itself. Their cost is linear in the number of completions. The only mask is that of a family's longest completion, as
wide as its prompt and itself; shorter ones use its corner, and every layer the same tensor.

The model's layers get here through transformers' registry of attention functions: `Families` travels in the place of
the attention mask, and whatever function the model uses is wrapped to recognise it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class Family(NamedTuple):
    prompt: int
    """Tokens."""
    completions: tuple[int, ...]
    """Tokens of each in the order of the row; none is empty."""
    visible: Tensor
    """(longest completion, prompt + longest completion), bool: all of the prompt, and itself up to here."""


def family(prompt: int, completions: tuple[int, ...], device: torch.device | str = "cpu") -> Family:
    longest = max(completions, default=0)
    visible = torch.ones(longest, prompt + longest, dtype=torch.bool, device=device).tril(prompt)
    return Family(prompt, completions, visible)


class Families:
    """A whole row. Stands where a layer expects its attention mask.

    No tuple and no dataclass: torch.compile looks into those, takes the lengths for constants of a layer, and compiles
    it again for every pass.
    """

    def __init__(self, *members: Family):
        self.members = members


@torch.compiler.disable
def attend(query: Tensor, key: Tensor, value: Tensor, families: Families, scaling: float | None) -> Tensor:
    """query (1, heads, L, D); key and value (1, key heads, L, D). Returns (1, L, heads, D).

    Unsloth compiles whole layers on a GPU. This stays out of their graphs: its shapes are other ones in every pass.
    """
    repeats = query.shape[1] // key.shape[1]
    lengths = [length for prompt, completions, _ in families.members for length in (prompt, *completions)]
    # Splitting once keeps backward linear: the gradient of every single slice would be as long as the row.
    queries, keys, values = (
        iter(tensor.split(lengths, dim=2))
        for tensor in (query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1))
    )
    parts = []
    for prompt, completions, visible in families.members:
        prompt_key, prompt_value = next(keys), next(values)
        parts.append(
            scaled_dot_product_attention(next(queries), prompt_key, prompt_value, is_causal=True, scale=scaling)
        )
        for length in completions:
            parts.append(
                scaled_dot_product_attention(
                    next(queries),
                    torch.cat([prompt_key, next(keys)], dim=2),
                    torch.cat([prompt_value, next(values)], dim=2),
                    attn_mask=visible[:length, : prompt + length],
                    scale=scaling,
                )
            )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def obstacle(model: nn.Module) -> str | None:
    """Why this model cannot compute completions behind one shared prompt, or None."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.model_type != "qwen2_5_vl":
        return f"{base.config.model_type} is not a model that it is written for"
    text = base.model.language_model.config
    if set(text.layer_types) != {"full_attention"}:
        return "not every layer sees the whole sequence (sliding_attention)"
    if text.attention_dropout:
        return f"its attention drops out ({text.attention_dropout})"
    if text._attn_implementation not in ALL_ATTENTION_FUNCTIONS:
        return f"attention {text._attn_implementation!r} is not in transformers' registry"
    return None


def recognise_families(language_model: nn.Module) -> None:
    """From now on the model's attention function takes Families for a mask; everything else goes to it unchanged."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = language_model.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS[name]
    if not getattr(attention, "_recognises_families", False):
        ALL_ATTENTION_FUNCTIONS[name] = _recognising(attention)


def _recognising(attention: Attention) -> Attention:
    @functools.wraps(attention)  # Unsloth marks functions by attributes, and looks for them
    def call(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attention_mask, Families):
            return attend(query, key, value, attention_mask, options.get("scaling")), None
        return attention(module, query, key, value, attention_mask, **options)

    call._recognises_families = True
    return call
