"""Qwen2.5-VL."""

from apo_lora.family.licence import APACHE, Licence
from apo_lora.family.record import Family
from apo_lora.family.shape import ModelShape

_PATCH, _MERGE, _MAX_IMAGE_TOKENS = 14, 2, 16384
_IMAGES = {"patch": _PATCH, "merge": _MERGE, "max_image_tokens": _MAX_IMAGE_TOKENS}
_TOWER = {"vision_hidden": 1280, "vision_intermediate": 3420, "vision_layers": 32, "frames": 2, "channels": 3}

_LICENCE = "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE"
_RESEARCH = Licence(
    {"license": "other", "license_name": "qwen-research", "license_link": _LICENCE},
    f"The base is under the [Qwen Research Licence]({_LICENCE}): not for commercial use. It applies here too.",
)

QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    name_pattern=r"qwen2[._]?5[-_]vl",
    published={
        "3b": ModelShape(2048, 11008, 36, 16, 2, 151936, tied=True, **_TOWER, **_IMAGES),
        "7b": ModelShape(3584, 18944, 28, 28, 4, 152064, tied=False, **_TOWER, **_IMAGES),
    },
    licences={"3b": _RESEARCH, "7b": APACHE},
    vision_tokens=("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    turn_tokens=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    system_prompt="You are a helpful assistant.",
    max_aspect_ratio=200,
    inner="model",
    language="language_model",
    tower="visual",
    blocks="blocks",
    head="lm_head",
    vision_layers=("qkv", "proj", "gate_proj", "up_proj", "down_proj"),
    shares_prompts=True,
    **_IMAGES,
)
