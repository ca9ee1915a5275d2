"""The sizes of a Qwen2.5-VL, and what follows from them alone: parameters by module, bytes in NF4. No torch.

Sizes come out of a config.json. Those of the published models are in the code, for a plan without network.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo_lora.errors import ModelError
from apo_lora.tiny import BASE_DIR

# bitsandbytes: 64 weights share a scale; scales are 8-bit, and 256 of them share a float32 one (double quantisation).
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
# Beside that each Linear4bit has two tables, of 16 and of 256 float32 values, and a float32 offset.
NF4_TABLES = 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class Linear:
    """One linear layer, `copies` times."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    copies: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.copies

    @property
    def biases(self) -> int:
        return self.outputs * self.copies if self.bias else 0


@dataclass(frozen=True)
class ModelShape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    """lm_head is the embedding."""
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    patch: int = 14
    """Pixels on a side."""
    merge: int = 2
    """A token of the language model is merge x merge patches."""
    frames: int = 2
    """Temporal patch size: a still image is doubled to this many frames."""
    channels: int = 3

    @property
    def kv_width(self) -> int:
        """Values of one token's keys in one layer; as many again are its values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def pixels_per_token(self) -> int:
        return (self.patch * self.merge) ** 2

    @property
    def patches_per_token(self) -> int:
        return self.merge**2

    @property
    def values_per_patch(self) -> int:
        return self.channels * self.frames * self.patch**2

    def language_linears(self) -> tuple[Linear, ...]:
        hidden, inner, kv, n = self.hidden, self.intermediate, self.kv_width, self.layers
        return (
            Linear("q_proj", hidden, hidden, True, n),
            Linear("k_proj", hidden, kv, True, n),
            Linear("v_proj", hidden, kv, True, n),
            Linear("o_proj", hidden, hidden, False, n),
            Linear("gate_proj", hidden, inner, False, n),
            Linear("up_proj", hidden, inner, False, n),
            Linear("down_proj", inner, hidden, False, n),
        )

    def vision_linears(self) -> tuple[Linear, ...]:
        """Of the blocks: what a LoRA with vision layers adapts."""
        hidden, inner, n = self.vision_hidden, self.vision_intermediate, self.vision_layers
        return (
            Linear("qkv", hidden, 3 * hidden, True, n),
            Linear("proj", hidden, hidden, True, n),
            Linear("gate_proj", hidden, inner, True, n),
            Linear("up_proj", hidden, inner, True, n),
            Linear("down_proj", inner, hidden, True, n),
        )

    def parameters(self) -> dict[str, int]:
        """Parameters by module group; they add up to the model."""
        wide = self.vision_hidden * self.merge**2
        merger = (Linear("0", wide, wide, True, 1), Linear("2", wide, self.hidden, True, 1))
        language, vision = self.language_linears(), self.vision_linears()
        return {
            "attention": sum(linear.weights for linear in language[:4]),
            "mlp": sum(linear.weights for linear in language[4:]),
            "biases_and_norms": sum(linear.biases for linear in language) + self.hidden * (2 * self.layers + 1),
            "embedding": self.vocabulary * self.hidden,
            "lm_head": 0 if self.tied else self.vocabulary * self.hidden,
            "vision_blocks": sum(x.weights + x.biases for x in vision) + 2 * self.vision_hidden * self.vision_layers,
            "vision_ends": self.values_per_patch * self.vision_hidden
            + self.vision_hidden
            + sum(linear.weights + linear.biases for linear in merger),
        }


def nf4_bytes(linear: Linear) -> int:
    """As bitsandbytes stores it: nibbles, 8-bit scales, float32 scales of those, and its tables."""
    weights = linear.inputs * linear.outputs
    blocks = math.ceil(weights / NF4_BLOCK)
    return linear.copies * (math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / NF4_NESTED_BLOCK) + NF4_TABLES)


# --- where the sizes come from ---------------------------------------------------------------------------------------

_TOWER = {"vision_hidden": 1280, "vision_intermediate": 3420, "vision_layers": 32}
PUBLISHED = {
    "3b": ModelShape(2048, 11008, 36, 16, 2, 151936, tied=True, **_TOWER),
    "7b": ModelShape(3584, 18944, 28, 28, 4, 152064, tied=False, **_TOWER),
}
"""Of Qwen/Qwen2.5-VL-*-Instruct; quantised and renamed copies have the same."""


def find_shape(name: str, revision: str | None = None) -> ModelShape:
    """Sizes of `tiny`, a local folder, a published Qwen2.5-VL, or another Hugging Face id. Raises ModelError."""
    folder = BASE_DIR if name == "tiny" else Path(name)
    if folder.is_dir():
        return shape_from_config(_read_config(folder, name), name)
    if match := re.search(r"qwen2[._]?5[-_]vl[-_](3b|7b)(?![0-9a-z])", name.lower()):
        return PUBLISHED[match[1]]
    return shape_from_config(_config_from_hub(name, revision), name)


def _read_config(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name: {name} has no config.json that can be read ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"model.name: {name}: its config.json holds no mapping")
    return config


def _config_from_hub(name: str, revision: str | None) -> Mapping[str, Any]:
    from transformers import AutoConfig

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without network it tells of every retry
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.name: the sizes of {name} are not known here and its config cannot be loaded ({reason}); "
            "give a folder with its config.json"
        ) from None


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Reads both layouts: text sizes at the top (as published) and under text_config (as transformers 5 writes)."""
    if config.get("model_type") != "qwen2_5_vl":
        raise ModelError(f"model.name: {name} is a {config.get('model_type')}; the plan knows qwen2_5_vl only")
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    size, tower = _reader(text, f"{name}: its config"), _reader(vision, f"{name}: its vision_config")
    return ModelShape(
        hidden=size("hidden_size"),
        intermediate=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=size("num_attention_heads"),
        kv_heads=size("num_key_value_heads"),
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        vision_hidden=tower("hidden_size"),
        vision_intermediate=tower("intermediate_size"),
        vision_layers=tower("depth"),
        patch=tower("patch_size", 14),
        merge=tower("spatial_merge_size", 2),
        frames=tower("temporal_patch_size", 2),
        channels=tower("in_channels", vision.get("in_chans", 3)),
    )


def _reader(sizes: Mapping[str, Any], where: str) -> Callable[..., int]:
    def read(key: str, default: int | None = None) -> int:
        value = sizes.get(key, default)
        if type(value) is not int or value < 1:
            raise ModelError(f"model.name: {where} gives {key}: {value!r}; a positive whole number is needed")
        return value

    return read
