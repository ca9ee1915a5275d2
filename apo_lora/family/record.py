"""A family of models: names, sizes of its images, and what the shared prompt hands its language model. No torch: what
works on tensors is given them, and modules are found by their names.

Shape suffixes: L tokens of a row, P of a prompt, N image tokens of a row, H hidden, F values that the tower makes of
an image token.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from apo_lora.errors import ModelError
from apo_lora.family.licence import Licence
from apo_lora.family.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """The fields are names and numbers; a family that computes something differently overrides it in a subclass."""

    model_type: str
    """Of its config.json."""
    model_class: str
    """Of transformers; `apo-lora doctor` imports it."""

    # --- published models: known without their config
    name_pattern: str
    """A regular expression that is found in the names of its models, in lower case."""
    published: Mapping[str, ModelShape]
    """By the size in their names."""
    licences: Mapping[str, Licence]
    """By the same sizes."""

    # --- prompts
    vision_tokens: tuple[str, ...]
    """Around and in place of images and videos."""
    turn_tokens: tuple[str, ...]
    """Around turns and texts."""
    system_prompt: str | None
    """Which its chat template puts first where a conversation has none."""

    # --- images
    patch: int
    """Pixels on a side."""
    merge: int
    """An image token is merge x merge patches."""
    max_image_tokens: int
    """Which the processor allows where no recipe sets a limit."""
    max_aspect_ratio: int
    """More is refused by the image processor."""

    # --- modules: the inner model and the head by their names in the whole model, the rest by their names in the inner
    inner: str
    language: str
    """Empty where the inner model is one."""
    tower: str
    blocks: str
    """Of the tower, by their name in it."""
    head: str
    vision_layers: tuple[str, ...]
    """Linear layers of the tower's blocks, by the last part of their name; some share it with the language model."""

    shares_prompts: bool
    """Whether the methods under "shared prompt" are right for it."""

    @property
    def pixels_per_token(self) -> int:
        return (self.patch * self.merge) ** 2

    def vision_token_ids(self, processor: Any) -> list[int]:
        """Ids that must never be sampled, by a processor or a tokenizer: a generated image token has no pixels, and
        breaks the next forward pass."""
        vocabulary = getattr(processor, "tokenizer", processor).get_vocab()
        return [vocabulary[token] for token in self.vision_tokens if token in vocabulary]

    # --- modules and their names -------------------------------------------------------------------------------------

    def inner_of(self, model: "nn.Module") -> "nn.Module":
        """What gives hidden states, of a model with or without PEFT around it."""
        return attrgetter(self.inner)(_without_peft(model))

    def head_of(self, model: "nn.Module") -> "nn.Module":
        return attrgetter(self.head)(_without_peft(model))

    def language_of(self, inner_model: "nn.Module") -> "nn.Module":
        return attrgetter(self.language)(inner_model) if self.language else inner_model

    def tower_of(self, inner_model: "nn.Module") -> "nn.Module":
        return attrgetter(self.tower)(inner_model)

    @property
    def kept_in_16_bits(self) -> list[str]:
        """Modules that 4-bit loading leaves as they are: the tower is small and quantises badly."""
        return [self.head, f"{self.inner}.{self.tower}"]

    def is_language_layer(self, name: str) -> bool:
        return f".{self.language}." in f".{name}."

    def is_tower_layer(self, name: str) -> bool:
        return f".{self.tower}." in f".{name}."

    def lora_targets(self, language_layers: Sequence[str], *, vision: bool) -> str:
        """The regular expression over module names that PEFT matches in full."""
        language = rf".*{re.escape(self.language)}.*\.({'|'.join(map(re.escape, language_layers))})"
        blocks = re.escape(f"{self.tower}.{self.blocks}")
        tower = rf".*{blocks}.*\.({'|'.join(self.vision_layers)})"
        return f"({language}|{tower})" if vision else language

    def weight_name(self, name: str) -> str:
        """Without the prefixes that differ between checkpoints and loaded models.

        Of Qwen2.5-VL, checkpoints say model.layers.0 and visual.blocks.0, transformers model.language_model.layers.0
        and model.visual.blocks.0.
        """
        return re.sub(rf"^(({re.escape(self.inner)}|{re.escape(self.language)})\.)+", "", name)

    def module_name(self, name: str) -> str:
        """In a model that transformers loads now, of a name that an adapter was saved with.

        Before 4.52, transformers had Qwen2.5-VL's language model at model.layers and its tower at visual.
        """
        if not self.language or self.is_language_layer(name) or name.startswith(f"{self.inner}.{self.tower}."):
            return name
        if name.startswith(f"{self.tower}."):
            return f"{self.inner}.{name}"
        return re.sub(rf"^{re.escape(self.inner)}\.(?=layers\.)", f"{self.inner}.{self.language}.", name)

    # --- sizes, for the memory plan ----------------------------------------------------------------------------------

    def published_size(self, name: str) -> str | None:
        """The key of a published model, quantised or renamed copies of it included."""
        sizes = "|".join(map(re.escape, self.published))
        found = re.search(rf"{self.name_pattern}[-_]({sizes})(?![0-9a-z])", name.lower())
        return found and found[1]

    def shape(self, config: Mapping[str, Any], name: str) -> ModelShape:
        """Reads both layouts: text sizes at the top (as published) and under text_config (as transformers 5 writes).

        Raises ModelError.
        """
        text, vision = config.get("text_config") or config, config.get("vision_config") or {}
        size, tower = size_reader(text, f"{name}: its config"), size_reader(vision, f"{name}: its vision_config")
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
            patch=tower("patch_size", self.patch),
            merge=tower("spatial_merge_size", self.merge),
            frames=tower("temporal_patch_size", 2),
            channels=tower("in_channels", vision.get("in_chans", 3)),
            max_image_tokens=self.max_image_tokens,
        )

    # --- shared prompt -----------------------------------------------------------------------------------------------

    def prompt_positions(
        self, inner_model: "nn.Module", ids_P: "Tensor", token_types_P: "Tensor", grids: "Tensor"
    ) -> "Tensor":
        """(3, P): temporal, height and width (M-RoPE) of a prompt with images, whose grids are (images, 3)."""
        positions_31P, _ = inner_model.get_rope_index(
            ids_P.unsqueeze(0), token_types_P.unsqueeze(0), image_grid_thw=grids
        )
        return positions_31P[:, 0]

    def features_by_image(self, output: Any) -> "list[Tensor]":
        """One (tokens, F) per image, out of what the inner model's get_image_features() returns. Here F is H."""
        return list(output.pooler_output)

    def is_image_token(self, inner_model: "nn.Module", input_ids_L: "Tensor") -> "Tensor":
        return input_ids_L == inner_model.config.image_token_id

    def embedding_inputs(
        self, embeds_1LH: "Tensor", is_image_L: "Tensor", features_NF: "Tensor | None"
    ) -> dict[str, Any]:
        """The language model's arguments for a row of tokens and the features of its images."""
        if features_NF is None:
            return {"inputs_embeds": embeds_1LH}
        return {"inputs_embeds": embeds_1LH.masked_scatter(is_image_L.view(1, -1, 1), features_NF.to(embeds_1LH))}


def _without_peft(model: "nn.Module") -> "nn.Module":
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def size_reader(sizes: Mapping[str, Any], where: str) -> Callable[..., int]:
    """read(key, default) -> a positive whole number out of a config. Raises ModelError."""

    def read(key: str, default: int | None = None) -> int:
        value = sizes.get(key, default)
        if type(value) is not int or value < 1:
            raise ModelError(f"model.name: {where} has {key}: {value!r}; it must be a positive whole number")
        return value

    return read
