"""An untrained tiny Qwen2.5-VL: tokenizer, processor and model, all of the real classes.

Sizes are multiples of 32, as block formats of GGUF want them, and the vision tower has four layers, the fewest that
llama.cpp's converter accepts.
"""

import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from apo_lora.tiny.boards import general_question, reasoning_question
from tools.tiny_base.chains import Habits, general_answer, reasoning_chain
from tools.tiny_base.lessons import cells_lesson, colors_lesson

VOCAB_SIZE = 448
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
OTHER_SPECIAL_TOKENS = [
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

# Qwen2.5's own: words, single digits, punctuation.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5-VL's template without its default system message: a tiny model should not spend tokens on it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_processor() -> Qwen2_5_VLProcessor:
    """Processor with a byte-level BPE tokenizer trained on the task's own words; the same every time."""
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=_train_bpe(),
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        additional_special_tokens=OTHER_SPECIAL_TOKENS,
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    image_processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=448 * 448)
    return Qwen2_5_VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def _train_bpe() -> Tokenizer:
    rng = random.Random(0)
    corpus = ["user\n", "assistant\n", "system\nYou are a helpful assistant."] * 50
    for _ in range(2000):
        question = reasoning_question(rng, "train")
        corpus += [question.text, reasoning_chain(rng, question, Habits())]
        question = general_question(rng, "train")
        corpus += [question.text, general_answer(rng, question, Habits())]
        for lesson in (cells_lesson(rng), colors_lesson(rng)):
            corpus += [lesson.prompt, "".join(text for text, _ in lesson.segments)]

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(OTHER_SPECIAL_TOKENS),
        # All 256 bytes, so that any text at all can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return bpe


def build_model(tokenizer: Qwen2TokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """A model with fresh weights (drawn from torch's global generator)."""
    token_id = tokenizer.convert_tokens_to_ids
    ends = {"eos_token_id": token_id(END_OF_TURN), "pad_token_id": token_id(END_OF_TEXT)}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            # Halves of a head of 32: 4 pairs turn with time, 6 with height, 6 with width.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "bos_token_id": token_id(END_OF_TEXT),
            **ends,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 96,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [3],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        bos_token_id=token_id(END_OF_TEXT),
        eos_token_id=[token_id(END_OF_TURN), token_id(END_OF_TEXT)],
        pad_token_id=token_id(END_OF_TEXT),
    )
    return model
