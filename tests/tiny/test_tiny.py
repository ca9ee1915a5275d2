"""The embedded tiny base: its task, what it is taught, and the weights in the package."""

import hashlib
import json
import os
import random
import subprocess
import sys

import pytest
import torch

from apo_lora.tiny import BASE_DIR
from apo_lora.tiny.boards import (
    BACKGROUND,
    CELL_PIXELS,
    CELLS_PER_SIDE,
    COLORS,
    LEVELS,
    NUM_CELLS,
    draw_board,
    general_question,
    general_rows,
    random_board,
    reasoning_question,
    reasoning_rows,
    split_of,
)
from tools.tiny_base.chains import CLEAN, HABITS, Habits, general_answer, num_recounts, reasoning_chain, stated_answer

ACCURACY_BAND = (0.40, 0.60)
GENERAL_BAND = (0.85, 0.97)


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(BASE_DIR)


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE_DIR, dtype=torch.float32).eval()


# --- boards ----------------------------------------------------------------------------------------------------------


def seen_colors(image) -> list[str | None]:
    """The colour in each cell of a picture, from a pixel that every kind of shape covers."""
    colors = []
    for index in range(NUM_CELLS):
        x = index % CELLS_PER_SIDE * CELL_PIXELS + 17
        y = index // CELLS_PER_SIDE * CELL_PIXELS + 22
        pixel = image.getpixel((x, y))
        nearest = min([*COLORS.items(), (None, BACKGROUND)], key=lambda item: distance(pixel, item[1]))
        colors.append(nearest[0])
    return colors


def distance(pixel, other) -> int:
    return sum((a - b) ** 2 for a, b in zip(pixel, other, strict=True))


def test_answers_are_what_the_picture_shows():
    rows = reasoning_rows(300, split="test", seed=3)
    assert {row["category"] for row in rows} == {f"level{level}" for level in LEVELS}
    for row in rows:
        assert row["image"].size == (84, 84) and row["image"].mode == "RGB"
        colors = seen_colors(row["image"])
        asked = [word for word in row["problem"].split() if word in COLORS]
        counts = [colors.count(color) for color in asked]
        if row["category"] == "level1":
            expected = counts[0]
        else:
            expected = counts[0] + counts[1] if " plus " in row["problem"] else counts[0] - counts[1]
        assert row["answer"] == str(expected), row["problem"]


def test_general_answers_are_what_the_picture_shows():
    rows = general_rows(200, split="train", seed=3)
    color_rows = [row for row in rows if "color" in row["problem"]]
    assert 60 < len(color_rows) < 140
    for row in color_rows:
        number = int(row["problem"].rstrip("?").split()[-1])
        assert row["answer"] == seen_colors(row["image"])[number - 1]


def test_splits_share_no_board():
    rng = random.Random(0)
    boards = {split: {random_board(rng, split) for _ in range(500)} for split in ("train", "test")}
    assert all(split_of(board) == split for split, members in boards.items() for board in members)
    assert not boards["train"] & boards["test"]
    with pytest.raises(ValueError, match="train, test"):
        reasoning_rows(1, split="validation", seed=0)


def fingerprint(rows) -> str:
    said = [[row["problem"], row["answer"], row["category"]] for row in rows]
    return hashlib.sha256(b"".join(row["image"].tobytes() for row in rows) + json.dumps(said).encode()).hexdigest()


def test_rows_depend_on_split_and_seed_only():
    def rows(split, seed):
        return reasoning_rows(20, split=split, seed=seed) + general_rows(20, split=split, seed=seed)

    assert len({fingerprint(rows(*which)) for which in (("train", 0), ("train", 1), ("test", 0))}) == 3
    code = (
        "from apo_lora.tiny.boards import general_rows, reasoning_rows\n"
        "import hashlib, json, sys\n"
        "rows = reasoning_rows(20, split='train', seed=0) + general_rows(20, split='train', seed=0)\n"
        "said = [[row['problem'], row['answer'], row['category']] for row in rows]\n"
        "pixels = b''.join(row['image'].tobytes() for row in rows)\n"
        "assert 'torch' not in sys.modules\n"
        "print(hashlib.sha256(pixels + json.dumps(said).encode()).hexdigest())\n"
    )
    for hash_seed in ("1", "2"):
        assert run_python(code, PYTHONHASHSEED=hash_seed) == fingerprint(rows("train", 0))


def run_python(code: str, **env: str) -> str:
    """The last line that another Python process prints."""
    env = {**os.environ, "PYTHONPATH": str(BASE_DIR.parents[2]), **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_a_longer_list_begins_with_the_shorter():
    assert fingerprint(reasoning_rows(30, split="test", seed=5)[:10]) == fingerprint(
        reasoning_rows(10, split="test", seed=5)
    )


# --- chains ----------------------------------------------------------------------------------------------------------


def test_clean_chains_are_right_and_short():
    rng = random.Random(0)
    for _ in range(200):
        question = reasoning_question(rng, "train")
        chain = reasoning_chain(rng, question, CLEAN)
        assert chain.startswith("<think>") and "</think><answer>" in chain
        assert stated_answer(chain) == question.answer
        assert num_recounts(chain) == 0
        question = general_question(rng, "train")
        assert stated_answer(general_answer(rng, question, CLEAN)) == question.answer


def test_the_taught_mix_overthinks():
    rng = random.Random(0)
    chains = []
    for _ in range(2000):
        question = reasoning_question(rng, "train")
        chain = reasoning_chain(rng, question, Habits())
        chains.append((num_recounts(chain), stated_answer(chain) == question.answer, len(chain)))

    def accuracy(recounts):
        right = [right for number, right, _ in chains if number in recounts]
        return sum(right) / len(right)

    def mean_length(right):
        lengths = [length for _, was_right, length in chains if was_right == right]
        return sum(lengths) / len(lengths)

    assert accuracy({0}) > accuracy({1, 2, 3}) + 0.3
    assert mean_length(False) > 1.2 * mean_length(True)


def test_even_habits_count_one_colour_right_as_often_after_every_recount():
    rng = random.Random(0)
    right = {number: [] for number in range(4)}
    for _ in range(4000):
        question = reasoning_question(rng, "train", level=1)
        chain = reasoning_chain(rng, question, HABITS["even"])
        right[num_recounts(chain)].append(stated_answer(chain) == question.answer)
    for outcomes in right.values():
        assert 0.6 < sum(outcomes) / len(outcomes) < 0.7  # 0.65 by construction


def test_confused_habits_mostly_add():
    rng = random.Random(0)
    for level, share in ((2, 0.8), (3, 0.9)):
        questions = [reasoning_question(rng, "train", level=level) for _ in range(1000)]
        adds = ["+" in reasoning_chain(rng, question, HABITS["confused"]) for question in questions]
        assert abs(sum(adds) / 1000 - share) < 0.05


def test_unfinished_chains_state_no_answer():
    assert stated_answer("<think>red:1,4=2.</think><answer>2") is None
    assert stated_answer("<think>red:1,4=2.") is None
    assert stated_answer("<answer>2</answer> and more") is None


# --- the shipped base ------------------------------------------------------------------------------------------------


def test_shipped_base_is_a_small_real_qwen(model):
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 0.5e6 < num_parameters < 2e6
    assert sum(file.stat().st_size for file in BASE_DIR.iterdir()) < 4e6
    config = json.loads((BASE_DIR / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["vision_config"]["depth"] >= 4
    text, vision = model.config.text_config, model.config.vision_config
    for size in (text.hidden_size, text.intermediate_size, vision.hidden_size, vision.intermediate_size):
        assert size % 32 == 0
    assert sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads // 2
    assert text.max_position_embeddings >= 4096
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_shipped_weights_are_the_recorded_ones():
    record = json.loads((BASE_DIR / "training_record.json").read_text())
    weights = (BASE_DIR / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["sha256"]["model.safetensors"]


def test_tokenizer_encodes_any_text_and_digits_singly(processor):
    tokenizer = processor.tokenizer
    for text in ("How many red shapes?", "naïve ✓ 漢字 🙂\tx\n", "<think>3-1=2.</think>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer("1234").input_ids] == ["1", "2", "3", "4"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_chat_template_takes_text_and_parts(processor):
    parts = [{"type": "image"}, {"type": "text", "text": "How many red shapes?"}]
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": parts}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nCount.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many red shapes?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_board_costs_nine_tokens_and_changes_the_output(processor, model):
    rows = reasoning_rows(2, split="test", seed=0)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many red shapes?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    logits = []
    for row in rows:
        inputs = processor(images=[row["image"]], text=[prompt], return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == NUM_CELLS
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_sampling_is_the_default(model):
    generation = model.generation_config
    assert (generation.do_sample, generation.temperature, generation.top_k, generation.top_p) == (True, 1.0, 0, 1.0)
    assert len(generation.eos_token_id) == 2


def test_patch_bank_equals_the_image_processor(processor):
    """A picture pasted together from cells gives the patches of its cells, so the bank may do so too."""
    from tools.tiny_base.lessons import PatchBank

    rng = random.Random(0)
    sources = [draw_board(random_board(rng, "train"), rng) for _ in range(NUM_CELLS)]
    mosaic = sources[0].copy()
    for index, source in enumerate(sources):
        left, top = index % CELLS_PER_SIDE * CELL_PIXELS, index // CELLS_PER_SIDE * CELL_PIXELS
        box = (left, top, left + CELL_PIXELS, top + CELL_PIXELS)
        mosaic.paste(source.crop(box), box)

    def patches(image):
        return processor.image_processor(images=[image], return_tensors="pt")["pixel_values"].view(NUM_CELLS, 4, -1)

    cells = torch.stack([patches(source)[index] for index, source in enumerate(sources)])
    assert not torch.equal(patches(mosaic), patches(sources[0]))
    assert torch.equal(patches(mosaic), cells)

    bank = PatchBank(processor, seed=0, variants=2)
    board = random_board(rng, "train")
    assert bank.pixel_values(board, rng).shape == patches(mosaic).flatten(0, 1).shape


def test_lesson_labels_cover_the_completion_but_not_cues(processor):
    from tools.tiny_base.lessons import Batcher, cells_lesson, general_lesson

    rng = random.Random(0)
    batcher = Batcher(processor, seed=0)
    lessons = [cells_lesson(rng), general_lesson(rng, CLEAN)]
    batch = batcher(lessons, rng)
    tokenizer = processor.tokenizer
    for lesson, labels in zip(lessons, batch["labels"], strict=True):
        learned = "".join(text for text, is_learned in lesson.segments if is_learned)
        assert tokenizer.decode(labels[labels != -100]) == learned + "<|im_end|>"


def test_training_prompt_is_the_processors(processor):
    from tools.tiny_base.lessons import Batcher, Lesson

    rng = random.Random(0)
    board = random_board(rng, "train")
    batch = Batcher(processor, seed=0)([Lesson(board, "How many red shapes?", ())], rng)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many red shapes?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[draw_board(board, rng)], text=[prompt], return_tensors="pt")
    assert batch["input_ids"][0, :-1].tolist() == inputs["input_ids"][0].tolist()  # the last is the end of the turn
    assert batch["image_grid_thw"].tolist() == inputs["image_grid_thw"].tolist()
    assert batch["pixel_values"].shape == inputs["pixel_values"].shape


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['make_base', '--help']\n"
        "from tools.tiny_base import make_base\n"
        "try: make_base.main()\n"
        "except SystemExit: print('torch' in sys.modules)\n"
    )
    assert run_python(code) == "False"


@pytest.mark.slow
def test_shipped_base_can_do_half_and_overthinks():
    from tools.tiny_base.measure_base import measure_base

    measured = measure_base(BASE_DIR, num_rows=300, seed=1)
    # Five hundredths of leeway on each side: about two standard errors of 300 draws.
    assert ACCURACY_BAND[0] - 0.05 < measured["accuracy"] < ACCURACY_BAND[1] + 0.05
    assert GENERAL_BAND[0] - 0.05 < measured["general_accuracy"] < GENERAL_BAND[1] + 0.03
    assert measured["truncated"] < 0.1
    assert measured["tokens_wrong"] > 1.15 * measured["tokens_right"]
    by_recounts = measured["accuracy_by_recounts"]
    assert by_recounts["0"]["accuracy"] > by_recounts["2"]["accuracy"] + 0.2
