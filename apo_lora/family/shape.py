"""The sizes of a vision-language model, and what follows from them: parameters by module, bytes in NF4. No torch.

What is written here is Qwen2.5-VL's; a family whose layers differ gives its sizes as a subclass.
"""

import math
from dataclasses import dataclass

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
    patch: int
    """Pixels on a side."""
    merge: int
    """A token of the language model is merge x merge patches."""
    frames: int
    """Temporal patch size: a still image is doubled to this many frames."""
    channels: int
    max_image_tokens: int
    """Which the processor allows where no recipe sets a limit."""

    @property
    def query_width(self) -> int:
        """Values of one token's queries in one layer."""
        return self.hidden

    @property
    def kv_width(self) -> int:
        """Values of one token's keys in one layer; as many again are its values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def feature_width(self) -> int:
        """Values that the tower makes of an image token."""
        return self.hidden

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
        hidden, inner, n = self.hidden, self.intermediate, self.layers
        query, kv = self.query_width, self.kv_width
        return (
            Linear("q_proj", hidden, query, True, n),
            Linear("k_proj", hidden, kv, True, n),
            Linear("v_proj", hidden, kv, True, n),
            Linear("o_proj", query, hidden, False, n),
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

    # What the time plan needs beside the linear layers.

    @property
    def head_norms(self) -> int:
        """Values of one token's queries and keys that go through a norm of their own."""
        return 0

    def tower_launches(self, patches: int) -> float:
        """Beyond those of the language model's layers: attention is one call per window."""
        return patches / 2

    # Values per token that are live together in a layer, per patch in a block of the tower. How they were fitted says
    # memory_plan.py.

    @property
    def layer_forward(self) -> int:
        """Without gradients: the MLP's gate, and up_proj's output, LoRA delta and their sum."""
        return 4 * self.hidden + 4 * self.intermediate

    @property
    def layer_saved(self) -> int:
        """What a layer keeps for its own backward."""
        return 13 * self.hidden + 4 * self.intermediate + 2 * self.kv_width

    @property
    def layer_backward(self) -> int:
        """A recomputed layer, and its gradients at their widest."""
        return self.layer_saved + 4 * self.hidden + 3 * self.intermediate

    @property
    def tower_forward(self) -> int:
        """The wider of attention, whose rotation works in float32, and MLP."""
        return max(16 * self.vision_hidden, 2 * self.vision_hidden + 3 * self.vision_intermediate)

    @property
    def tower_saved(self) -> int:
        """What a block keeps for its own backward."""
        return 11 * self.vision_hidden + 3 * self.vision_intermediate

    @property
    def tower_backward(self) -> int:
        return 12 * self.vision_hidden + 6 * self.vision_intermediate

    def merger_linears(self) -> tuple[Linear, ...]:
        wide = self.vision_hidden * self.merge**2
        return Linear("0", wide, wide, True, 1), Linear("2", wide, self.hidden, True, 1)

    def parameters(self) -> dict[str, int]:
        """Parameters by module group; they add up to the model."""
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
            + sum(linear.weights + linear.biases for linear in self.merger_linears()),
        }


def nf4_bytes(linear: Linear) -> int:
    """As bitsandbytes stores it: nibbles, 8-bit scales, float32 scales of those, and its tables."""
    weights = linear.inputs * linear.outputs
    blocks = math.ceil(weights / NF4_BLOCK)
    return linear.copies * (math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / NF4_NESTED_BLOCK) + NF4_TABLES)
