"""A Qwen2.5-VL or Qwen3-VL of a given shape with random weights, made where there is no network,
as transformers saves it.

Memory and time do not depend on the values of weights, so the 3B shape stands for the published model. Its tokenizer
is byte-level without merges: a byte is a token, and the special tokens have their published ids.
"""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from apo_lora.family.lookup import find_shape
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.family.qwen3_vl import QWEN3_VL, Qwen3VLShape
from apo_lora.family.shape import ModelShape
from benchmarks.gpu.measurements import Setting
from benchmarks.gpu.record import Record
from tools.tiny_base.architecture import CHAT_TEMPLATE

SHAPES = {
    "3b": QWEN2_5_VL.published["3b"],
    "31m": replace(
        QWEN2_5_VL.published["3b"],
        hidden=512,
        intermediate=1408,
        layers=8,
        heads=8,
        vocabulary=1088,
        vision_hidden=256,
        vision_intermediate=512,
        vision_layers=8,
    ),
    # Widths are multiples of 64, the block of NF4; heads are of 32, vLLM's narrowest on a CPU.
    "tiny": replace(
        QWEN2_5_VL.published["3b"],
        hidden=128,
        intermediate=128,
        layers=2,
        heads=4,
        vocabulary=1088,
        vision_hidden=64,
        vision_intermediate=128,
        vision_layers=2,
    ),
    "qwen3-vl-2b": QWEN3_VL.published["2b"],
    "qwen3-vl-4b": QWEN3_VL.published["4b"],
}

# In the order of their published ids, which begin at 151,643: after every ordinary token.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
PUBLISHED_TOKENS = 151_643
ORDINARY_TOKENS = {"31m": 1_000, "tiny": 1_000}
"""Of smaller ones than published."""


def measure(record: Record, setting: Setting) -> None:
    """Makes the model, and says how long that took."""
    started = time.perf_counter()
    make(setting.size, setting.model)
    seconds = time.perf_counter() - started
    record.check("it is made in under a minute", lambda: (seconds < 60, f"{seconds:.1f} seconds"))
    shape = find_shape(str(setting.model))
    record.put(parameters=sum(shape.parameters().values()))
    record.check("the shape is the wanted one", lambda: (shape == SHAPES[setting.size], str(shape)))


def make(size: str, folder: Path, sparse: bool = False) -> None:
    """Model, tokenizer and processor into `folder`, in place of what is there.

    With `sparse`, all weights are zero, in a file that takes no disk: for the null GPU, which computes nothing of them.
    """
    shape = SHAPES[size]
    of_qwen3 = isinstance(shape, Qwen3VLShape)
    processor = build_processor(ORDINARY_TOKENS.get(size, PUBLISHED_TOKENS), of_qwen3)
    ids = processor.tokenizer.get_vocab()
    config = build_config(shape, ids)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta" if sparse else fastest_device(2 * sum(shape.parameters().values()))):
            model = (Qwen3VLForConditionalGeneration if of_qwen3 else Qwen2_5_VLForConditionalGeneration)(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        do_sample=True,
        temperature=1.0,
        # Random weights would sample them sooner or later, and no forward pass can take one back in.
        suppress_tokens=[ids[token] for token in QWEN2_5_VL.vision_tokens],
    )
    unfinished = folder.with_name(f".{folder.name}")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    if sparse:
        save_sparse(model, unfinished)
    else:
        model.save_pretrained(unfinished, max_shard_size="4GB")
    processor.save_pretrained(unfinished)
    unfinished.rename(folder)


def save_sparse(model: PreTrainedModel, folder: Path) -> None:
    """As save_pretrained does it, but behind the file's header is a hole of the weights' size."""
    names = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}  # tied ones once
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names[id(tensor)] == name:
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def fastest_device(num_bytes: int) -> str:
    """The GPU, which draws random numbers much faster, where it has room for the 16-bit model."""
    has_room = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * num_bytes
    return "cuda" if has_room else "cpu"


def build_config(shape: ModelShape, ids: dict[str, int]) -> Qwen2_5_VLConfig | Qwen3VLConfig:
    """Beside the shape, the published models' constants."""
    text: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision: dict[str, Any] = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_intermediate,
        "out_hidden_size": shape.hidden,
        "patch_size": shape.patch,
        "spatial_merge_size": shape.merge,
        "temporal_patch_size": shape.frames,
        "in_channels": shape.channels,
    }
    of_its_family = _qwen3_constants if isinstance(shape, Qwen3VLShape) else _qwen2_5_constants
    config_class, text_constants, vision_constants = of_its_family(shape)
    return config_class(
        text_config={**text, **text_constants},
        vision_config={**vision, **vision_constants},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.tied,
    )


def _qwen2_5_constants(shape: ModelShape) -> tuple[type, dict[str, Any], dict[str, Any]]:
    head = shape.hidden // shape.heads
    temporal = head // 8  # M-RoPE's shares of half a head, as 16, 24, 24 are of 64
    spatial = (head // 2 - temporal) // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [temporal, spatial, spatial]}
    vision = {
        "num_heads": 16 if shape.vision_hidden == 1280 else 4,
        "window_size": 112,
        # Every eighth block sees the whole picture, the others windows of it.
        "fullatt_block_indexes": list(range(7, shape.vision_layers, 8)) or [shape.vision_layers - 1],
        "tokens_per_second": 2,
    }
    text = {"max_position_embeddings": 128_000, "use_sliding_window": False, "rope_parameters": rope}
    return Qwen2_5_VLConfig, text, vision


def _qwen3_constants(shape: Qwen3VLShape) -> tuple[type, dict[str, Any], dict[str, Any]]:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {"max_position_embeddings": 262_144, "head_dim": shape.head_size, "rope_parameters": rope}
    vision = {
        "num_heads": 16,
        "num_position_embeddings": shape.positions,
        "deepstack_visual_indexes": list(range(5, shape.vision_layers - 1, 6)),
    }
    return Qwen3VLConfig, text, vision


def build_processor(ordinary_tokens: int, of_qwen3: bool = False) -> Qwen2_5_VLProcessor | Qwen3VLProcessor:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # No text becomes one of the tokens after the bytes; sampling may draw them, and decodes them to something.
    unused = [f"Ġu{number}" for number in range(len(letters), ordinary_tokens)]
    words = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*letters, *unused])}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:14]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    patches = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} if of_qwen3 else {}
    return (Qwen3VLProcessor if of_qwen3 else Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=12_845_056, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor() if of_qwen3 else Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
