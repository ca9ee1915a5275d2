"""A small Qwen3-VL with random weights and the embedded tokenizer: the real classes, DeepStack in two layers."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from apo_lora.tiny import BASE_DIR

TEXT = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden / heads
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "depth": 3,
    "num_heads": 4,
    "out_hidden_size": 96,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}


def make_base(folder: Path, **text: object) -> Path:
    """Model, tokenizer and processor into `folder`; `text` are other sizes of the language model."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tiny = json.loads((BASE_DIR / "config.json").read_text())
    config = Qwen3VLConfig(
        text_config={**TEXT, "vocab_size": tiny["text_config"]["vocab_size"], "tie_word_embeddings": True, **text},
        vision_config=VISION,
        tie_word_embeddings=True,
        **{key: value for key, value in tiny.items() if key.endswith("_token_id")},
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # larger than a fresh model's, or neither image nor prompt would matter
                parameter.normal_(0, 0.1)
            elif "norm" in name:  # not all ones
                parameter.uniform_(0.5, 1.5)
    model.generation_config = GenerationConfig.from_pretrained(BASE_DIR)
    model.save_pretrained(folder)
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=16, min_pixels=64 * 64, max_pixels=512 * 512, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=(BASE_DIR / "chat_template.jinja").read_text(),
    ).save_pretrained(folder)
    return folder
