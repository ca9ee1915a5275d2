"""A family that nobody published: the tiny base under another model_type, with other names of modules and tokens, and
image tokens of 32 x 32 pixels."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.tiny import BASE_DIR

RENAMED_TOKENS = {"<|vision_start|>": "<|picture_start|>", "<|vision_end|>": "<|picture_end|>"}
RENAMED_MODULES = {"model.language_model.": "model.decoder.", "model.visual.": "model.eyes.", "lm_head.": "reader."}

OTHER_VL = replace(
    QWEN2_5_VL,
    model_type="other_vl",
    model_class="OtherModel",
    name_pattern="other[-_]vl",
    published={"1b": replace(QWEN2_5_VL.published["3b"], layers=2, patch=16)},
    vision_tokens=tuple(RENAMED_TOKENS.get(token, token) for token in QWEN2_5_VL.vision_tokens),
    patch=16,
    max_image_tokens=1000,
    max_aspect_ratio=20,
    language="decoder",
    tower="eyes",
    head="reader",
)


class OtherConfig(Qwen2_5_VLConfig):
    model_type = "other_vl"


class OtherInnerModel(Qwen2_5_VLModel):
    language_model = property(lambda self: self.decoder)  # for the code that is inherited
    visual = property(lambda self: self.eyes)

    def __init__(self, config):
        super().__init__(config)
        self.decoder, self.eyes = self._modules.pop("language_model"), self._modules.pop("visual")


class OtherModel(Qwen2_5_VLForConditionalGeneration):
    config_class = OtherConfig
    _tied_weights_keys = {"reader.weight": "model.decoder.embed_tokens.weight"}
    lm_head = property(lambda self: self.reader)

    def __init__(self, config):
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = OtherInnerModel(config)
        self.reader = torch.nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(OtherConfig.model_type, OtherConfig)
AutoModelForImageTextToText.register(OtherConfig, OtherModel)


def make_base(folder: Path) -> None:
    """The tiny base's weights under the new names; of its tower, what turns pixels into patches is random."""
    shutil.copytree(BASE_DIR, folder)
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja"):
            text = path.read_text()
            for old, new in RENAMED_TOKENS.items():
                text = text.replace(old, new)
            path.write_text(text.replace('"patch_size": 14', '"patch_size": 16'))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": OtherConfig.model_type}
    tiny = Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE_DIR).state_dict()
    torch.manual_seed(0)
    model = OtherModel(OtherConfig(**config))
    renamed = {_renamed(name): tensor for name, tensor in tiny.items() if "patch_embed" not in name}
    missing = model.load_state_dict(renamed, strict=False)
    assert not missing.unexpected_keys and all("patch_embed" in name for name in missing.missing_keys)
    model.save_pretrained(folder)


def _renamed(name: str) -> str:
    old = next(old for old in RENAMED_MODULES if name.startswith(old))
    return name.replace(old, RENAMED_MODULES[old], 1)
