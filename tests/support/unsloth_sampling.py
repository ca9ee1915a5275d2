"""Runs in a fork for test_grouped_attention.py: sampling through Unsloth's generate(), as facts.

python unsloth_sampling.py facts.json BASE ...
"""

import json
import sys
from pathlib import Path
from typing import Any

from unsloth_on_cpu import load_tiny, start

start()

import unsloth.models.vision as unsloth_generate  # noqa: E402
from key_copies import KeyCopies, sampled  # noqa: E402
from torch import nn  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402


def facts(model: nn.Module, cache: str) -> dict[str, Any]:
    """Tokens and copies with our attention, and with the one that was there before."""
    unsloth_generate._static_cache_does_not_fit = lambda *sizes: cache == "dynamic"
    ours, tokens, copies = ALL_ATTENTION_FUNCTIONS["sdpa"], {}, {}
    for name, attention in {"stock": ours.__wrapped__, "ours": ours}.items():
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        watch = KeyCopies(model)
        tokens[name] = sampled(model, watch, cache=cache).tolist()
        copies[name] = len(watch.found)
    return {"tokens": tokens, "copies": copies, "layers": watch.layers}


if __name__ == "__main__":
    models = {Path(base).name: load_tiny({"name": base}).model for base in sys.argv[2:]}
    caches = ("static", "dynamic")
    found = {f"{name} {cache}": facts(model, cache) for name, model in models.items() for cache in caches}
    Path(sys.argv[1]).write_text(json.dumps(found))
