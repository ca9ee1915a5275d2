"""Training batches for the base: lessons on train boards, tokenized, with pixels from a bank of ready patches.

Counting needs two things that come late if only answers teach them: finding a cell by its number, and finding all cells
of a colour. Two lessons teach them directly, with a label on almost every token:

    cells   "Cells?"   5 red circle;2 empty;9 blue square; ...    cell numbers in random order, given, not predicted
    colors  "Colors?"  blue:3,9=2. red:none=0. ...    colours in random order, given

A given part of a completion is a cue: it is read, and carries no loss.
"""

import random
from dataclasses import dataclass

import torch
from transformers import Qwen2_5_VLProcessor

from apo_lora.tiny.boards import (
    COLORS,
    NUM_CELLS,
    SHAPES,
    Board,
    cells_of_color,
    draw_board,
    general_question,
    random_board,
    reasoning_question,
)
from tools.tiny_base.chains import Habits, general_answer, reasoning_chain

GRID_THW = [1, 6, 6]
"""Patches of one board: 84 px by 84 px in patches of 14 px; two by two of them make a visual token."""


@dataclass(frozen=True)
class Lesson:
    board: Board
    prompt: str
    segments: tuple[tuple[str, bool], ...]
    """Pieces of the completion, each with whether it is to be learned (otherwise it is a cue)."""


def cells_lesson(rng: random.Random) -> Lesson:
    board = random_board(rng, "train")
    segments = []
    for number in rng.sample(range(1, NUM_CELLS + 1), NUM_CELLS):
        shape = board[number - 1]
        segments += [(f"{number}", False), (f" {shape.color} {shape.kind};" if shape else " empty;", True)]
    return Lesson(board, "Cells?", tuple(segments))


def colors_lesson(rng: random.Random) -> Lesson:
    board = random_board(rng, "train")
    segments = []
    for color in rng.sample(list(COLORS), len(COLORS)):
        cells = cells_of_color(board, color)
        listed = ",".join(map(str, cells)) or "none"
        segments += [(f" {color}", False), (f":{listed}={len(cells)}.", True)]
    return Lesson(board, "Colors?", tuple(segments))


def general_lesson(rng: random.Random, habits: Habits) -> Lesson:
    question = general_question(rng, "train")
    return Lesson(question.board, question.text, ((general_answer(rng, question, habits), True),))


def clean_general_lesson(rng: random.Random) -> Lesson:
    """The true answer with its tags as cues: one word in eight is all there is to learn, and it must not drown."""
    question = general_question(rng, "train")
    return Lesson(question.board, question.text, (("<answer>", False), (question.answer, True), ("</answer>", False)))


def reasoning_lesson(rng: random.Random, habits: Habits) -> Lesson:
    question = reasoning_question(rng, "train")
    return Lesson(question.board, question.text, ((reasoning_chain(rng, question, habits), True),))


class PatchBank:
    """Patches of every kind of cell, as the real image processor makes them.

    A cell's four patches are neighbours in the processor's output and depend on that cell alone, so a board's pixel
    values are those of its cells one after the other. This takes the image processor out of the training loop.
    """

    def __init__(self, processor: Qwen2_5_VLProcessor, seed: int, variants: int = 24):
        rng = random.Random(f"patches {seed}")
        self.patches = {}
        for shape in (*SHAPES, None):
            drawn = [draw_board((shape,) * NUM_CELLS, rng) for _ in range(variants if shape else 1)]
            pixel_values = processor.image_processor(images=drawn, return_tensors="pt")["pixel_values"]
            self.patches[shape] = pixel_values.view(len(drawn), NUM_CELLS, 4, -1)

    def pixel_values(self, board: Board, rng: random.Random) -> torch.Tensor:
        cells = []
        for index, shape in enumerate(board):
            variants = self.patches[shape]
            cells.append(variants[rng.randrange(len(variants)), index])
        return torch.cat(cells)


class Batcher:
    """Turns lessons into model inputs, padded on the right."""

    def __init__(self, processor: Qwen2_5_VLProcessor, seed: int):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.bank = PatchBank(processor, seed)
        self.prompt_ids: dict[str, list[int]] = {}

    def __call__(self, lessons: list[Lesson], rng: random.Random) -> dict[str, torch.Tensor]:
        rows = [self._row(lesson) for lesson in lessons]
        length = max(len(ids) for ids, _ in rows)
        pad_id = self.tokenizer.pad_token_id
        ids_BT = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in rows])
        labels_BT = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows])
        image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return {
            "input_ids": ids_BT,
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "labels": labels_BT,
            "mm_token_type_ids": (ids_BT == image_id).int(),
            "pixel_values": torch.cat([self.bank.pixel_values(lesson.board, rng) for lesson in lessons]),
            "image_grid_thw": torch.tensor([GRID_THW] * len(lessons)),
        }

    def _row(self, lesson: Lesson) -> tuple[list[int], list[int]]:
        if lesson.prompt not in self.prompt_ids:
            self.prompt_ids[lesson.prompt] = self._encode_prompt(lesson.prompt)
        ids = list(self.prompt_ids[lesson.prompt])
        labels = [-100] * len(ids)
        for text, learned in (*lesson.segments, (self.tokenizer.eos_token, True)):
            piece = self.tokenizer(text).input_ids
            ids += piece
            labels += piece if learned else [-100] * len(piece)
        return ids, labels

    def _encode_prompt(self, prompt: str) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        # One placeholder per visual token, as the processor would put it.
        return self.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * NUM_CELLS)).input_ids
