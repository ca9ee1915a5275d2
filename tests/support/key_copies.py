"""Copies of keys and values for every query head while sampling, counted; and small models that have such heads."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apo_lora.tiny import BASE_DIR

ROWS, PROMPT, NEW = 4, 13, 6
HEADS, KEY_HEADS = 6, 2


def make_grouped_tiny(folder: Path) -> Path:
    """The tiny model's architecture, random, with six query heads to two key heads; its own single key head is read by
    all query heads, and so never copied."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(BASE_DIR)
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = HEADS, KEY_HEADS
    config.text_config.hidden_size = config.vision_config.out_hidden_size = HEADS * 32
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoProcessor.from_pretrained(BASE_DIR).save_pretrained(folder)
    return folder


class KeyCopies(TorchDispatchMode):
    """Notes operations that make a tensor of the size of the cache for every query head, in any layout; views make
    none. Right after the prompt such a copy is as large as the queries, and is told by what it is made of: a tensor
    that is expanded."""

    def __init__(self, model: nn.Module):
        super().__init__()
        text = model.config.get_text_config()
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = ROWS * text.num_attention_heads * head_size
        self.queries, self.caches = width * PROMPT, {width * (PROMPT + new) for new in range(1, NEW + 1)}
        self.layers = text.num_hidden_layers
        self.found: list[Any] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        with self:  # in inference mode, what is made of other operations arrives whole
            result = operation.decompose(*arguments, **(options or {}))
        if result is not NotImplemented:
            return result
        result = operation(*arguments, **(options or {}))
        given = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        sizes = self.caches | ({self.queries} if any(0 in tensor.stride() for tensor in given) else set())
        is_view = any(output.alias_info for output in operation._schema.returns)
        made = [] if is_view else [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.found += [operation for tensor in made if tensor.numel() in sizes]
        return result


def sampled(model: nn.Module, watch: KeyCopies | None = None, *, padded: bool = True, cache: str = "static") -> Tensor:
    """Ids of ROWS completions, always of the same seed: (ROWS, NEW)."""
    ids = torch.randint(10, 200, (ROWS, PROMPT), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = not padded
    torch.manual_seed(5)
    options = {"do_sample": True, "max_new_tokens": NEW, "min_new_tokens": NEW, "cache_implementation": cache}
    with torch.no_grad(), watch or nullcontext():
        return model.generate(input_ids=ids, attention_mask=mask, suppress_tokens=[0], **options)[:, PROMPT:]
