"""Qwen3-VL, the dense models.

Against Qwen2.5-VL: patches of 16 pixels; heads of a width of their own, with a norm on queries and keys, and without
biases; a tower with learned positions and plain MLPs; and DeepStack (arXiv 2406.04334): what some blocks of the tower
see is added to the image tokens behind the first layers of the language model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from apo_lora.family.licence import APACHE
from apo_lora.family.record import Family, size_reader
from apo_lora.family.shape import Linear, ModelShape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Qwen3VLShape(ModelShape):
    head_size: int
    """Of the language model; not hidden / heads."""
    positions: int
    """Learned ones of the tower, resampled to each image's grid."""
    deepstack: int
    """Blocks of the tower whose features go to the language model, beside the last one's."""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def feature_width(self) -> int:
        return self.hidden * (1 + self.deepstack)

    @property
    def head_norms(self) -> int:
        return self.query_width + self.kv_width

    def tower_launches(self, patches: int) -> float:
        return 20 * self.vision_layers  # attention is one call per image

    def language_linears(self) -> tuple[Linear, ...]:
        return tuple(replace(linear, bias=False) for linear in super().language_linears())

    def vision_linears(self) -> tuple[Linear, ...]:
        hidden, inner, n = self.vision_hidden, self.vision_intermediate, self.vision_layers
        return (
            Linear("qkv", hidden, 3 * hidden, True, n),
            Linear("proj", hidden, hidden, True, n),
            Linear("linear_fc1", hidden, inner, True, n),
            Linear("linear_fc2", inner, hidden, True, n),
        )

    @property
    def layer_saved(self) -> int:
        """Queries and keys also before their norms and in float32."""
        return 10 * self.hidden + 5 * self.query_width + 4 * self.intermediate + 4 * self.kv_width

    @property
    def tower_forward(self) -> int:
        return 16 * self.vision_hidden

    @property
    def tower_saved(self) -> int:
        return 8 * self.vision_hidden + self.vision_intermediate

    @property
    def tower_backward(self) -> int:
        return max(16 * self.vision_hidden, 9 * self.vision_hidden + 3 * self.vision_intermediate)

    def parameters(self) -> dict[str, int]:
        count, wide = super().parameters(), self.vision_hidden * self.merge**2
        count["biases_and_norms"] += 2 * self.head_size * self.layers
        count["vision_blocks"] += 2 * self.vision_hidden * self.vision_layers  # LayerNorms have biases
        count["vision_ends"] += (2 + self.positions) * self.vision_hidden
        count["vision_ends"] += self.deepstack * (2 * wide + sum(x.weights + x.biases for x in self.merger_linears()))
        return count


class Qwen3VLFamily(Family):
    def shape(self, config: Mapping[str, Any], name: str) -> Qwen3VLShape:
        text, vision = (config.get(part) or {} for part in ("text_config", "vision_config"))
        return Qwen3VLShape(
            **vars(super().shape(config, name)),
            head_size=size_reader(text, f"{name}: its text_config")("head_dim", 128),
            positions=size_reader(vision, f"{name}: its vision_config")("num_position_embeddings", 2304),
            deepstack=len(vision.get("deepstack_visual_indexes", ())),
        )

    def features_by_image(self, output: Any) -> "list[Tensor]":
        """F is H for the embeddings, and H again for each layer that DeepStack adds to."""
        import torch

        sizes = [len(embeddings) for embeddings in output.pooler_output]
        by_layer = [torch.cat(tuple(output.pooler_output)), *output.deepstack_features]
        return list(torch.cat(by_layer, dim=-1).split(sizes))

    def embedding_inputs(
        self, embeds_1LH: "Tensor", is_image_L: "Tensor", features_NF: "Tensor | None"
    ) -> dict[str, Any]:
        if features_NF is None:
            return super().embedding_inputs(embeds_1LH, is_image_L, None)
        first_NH, *others = features_NF.split(embeds_1LH.shape[-1], dim=-1)
        return {
            **super().embedding_inputs(embeds_1LH, is_image_L, first_NH),
            "visual_pos_masks": is_image_L.unsqueeze(0),
            "deepstack_visual_embeds": others,
        }


_PATCH, _MERGE, _MAX_IMAGE_TOKENS = 16, 2, 16384
_IMAGES = {"patch": _PATCH, "merge": _MERGE, "max_image_tokens": _MAX_IMAGE_TOKENS}
_TOWER = {"frames": 2, "channels": 3, "head_size": 128, "positions": 2304, "deepstack": 3, **_IMAGES}
_SMALL = {"vision_hidden": 1024, "vision_intermediate": 4096, "vision_layers": 24, **_TOWER}

QWEN3_VL = Qwen3VLFamily(
    model_type="qwen3_vl",
    model_class="Qwen3VLForConditionalGeneration",
    name_pattern=r"qwen3[-_]vl",
    published={
        "2b": Qwen3VLShape(2048, 6144, 28, 16, 8, 151936, tied=True, **_SMALL),
        "4b": Qwen3VLShape(2560, 9728, 36, 32, 8, 151936, tied=True, **_SMALL),
    },
    licences={"2b": APACHE, "4b": APACHE},
    vision_tokens=("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    turn_tokens=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    system_prompt=None,
    max_aspect_ratio=200,
    inner="model",
    language="language_model",
    tower="visual",
    blocks="blocks",
    head="lm_head",
    vision_layers=("qkv", "proj", "linear_fc1", "linear_fc2"),
    shares_prompts=True,
    **_IMAGES,
)
