"""The tiny task: look at a numbered 3x3 board of coloured shapes and count.

A board is 84x84 px; each cell is 28x28 px, which Qwen2.5-VL turns into exactly one visual token, so a board costs
nine tokens. Three levels of counting are the reasoning task:

    level1  How many red shapes?
    level2  How many red shapes plus blue shapes?
    level3  How many more red shapes than blue shapes?

The general task ("What color is cell 5?", "What shape is cell 5?") is never used in RL: it shows what RL makes the
model forget. Train and test boards are disjoint: a hash of the cells, not of the pixels, decides which a board is.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

CELL_PIXELS = 28
CELLS_PER_SIDE = 3
NUM_CELLS = CELLS_PER_SIDE**2

COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (235, 200, 30)}
KINDS = ("circle", "square", "triangle")
LEVELS = (1, 2, 3)
SPLITS = ("train", "test")

# Grey near the mean that the image processor subtracts: an empty cell is then close to zero for the vision tower.
BACKGROUND = (122, 117, 104)
GRID_LINE = (90, 88, 80)
DIGIT_COLOR = (0, 0, 0)
DIGIT_FONT = ImageFont.load_default(size=12)


class Shape(NamedTuple):
    color: str
    kind: str


SHAPES = tuple(Shape(color, kind) for color in COLORS for kind in KINDS)

Board = tuple[Shape | None, ...]
"""Nine cells, row by row; None is an empty cell."""


@dataclass(frozen=True)
class Question:
    """One question about one board. `colors` are the colours to count, in the order of the text (none: general)."""

    board: Board
    text: str
    answer: str
    category: str
    colors: tuple[str, ...] = ()
    cell: int | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(cells_of_color(self.board, color)) for color in self.colors)


def cells_of_color(board: Board, color: str) -> list[int]:
    """Numbers (from 1) of the cells that hold a shape of this colour."""
    return [number for number, shape in enumerate(board, start=1) if shape and shape.color == color]


def random_board(rng: random.Random, split: str) -> Board:
    """A board of 4 to 9 shapes that belongs to `split`, drawn by rejection (one board in eight is a test board)."""
    while True:
        # Few colours a board, so that counts reach beyond 0 and 1.
        palette = rng.sample(SHAPES, rng.randint(2, 4))
        num_shapes = rng.randint(4, NUM_CELLS)
        cells = [rng.choice(palette) if rng.random() < 0.8 else rng.choice(SHAPES) for _ in range(num_shapes)]
        cells += [None] * (NUM_CELLS - num_shapes)
        rng.shuffle(cells)
        board = tuple(cells)
        if split_of(board) == split:
            return board


def split_of(board: Board) -> str:
    """The split a board belongs to. A checksum, since Python's own hash differs between processes."""
    spelled = ";".join(f"{shape.color} {shape.kind}" if shape else "-" for shape in board)
    return "test" if zlib.crc32(spelled.encode()) % 8 == 0 else "train"


def draw_board(board: Board, rng: random.Random) -> Image.Image:
    """The board as a picture; `rng` moves, scales and tints each shape a little."""
    image = _empty_board().copy()
    draw = ImageDraw.Draw(image)
    for index, shape in enumerate(board):
        if shape:
            _draw_shape(draw, *_corner(index), shape, rng)
    return image


@cache
def _empty_board() -> Image.Image:
    """Cells and their numbers, which no shape reaches."""
    side = CELLS_PER_SIDE * CELL_PIXELS
    image = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for index in range(NUM_CELLS):
        left, top = _corner(index)
        draw.rectangle([left, top, left + CELL_PIXELS - 1, top + CELL_PIXELS - 1], outline=GRID_LINE)
        draw.text((left + 2, top - 1), str(index + 1), fill=DIGIT_COLOR, font=DIGIT_FONT)
    return image


def _corner(index: int) -> tuple[int, int]:
    """The left and top pixel of a cell, counted from 0."""
    return index % CELLS_PER_SIDE * CELL_PIXELS, index // CELLS_PER_SIDE * CELL_PIXELS


def _draw_shape(draw: ImageDraw.ImageDraw, left: int, top: int, shape: Shape, rng: random.Random) -> None:
    size = rng.randint(16, 17)
    left, top = left + 9 + rng.randint(0, 1), top + 9 + rng.randint(0, 1)
    fill = tuple(min(255, max(0, channel + rng.randint(-18, 18))) for channel in COLORS[shape.color])
    box = [left, top, left + size, top + size]
    if shape.kind == "circle":
        # Smaller than a square by more than its corners, or a small vision tower takes long to tell the two apart.
        draw.ellipse([left + 2, top + 2, left + size - 2, top + size - 2], fill=fill)
    elif shape.kind == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(left, top + size), (left + size, top + size), (left + size // 2, top)], fill=fill)


def reasoning_question(rng: random.Random, split: str, level: int | None = None) -> Question:
    board = random_board(rng, split)
    level = level or rng.choice(LEVELS)
    if level == 1:
        color = _likely_color(rng, board)
        answer = len(cells_of_color(board, color))
        return Question(board, f"How many {color} shapes?", str(answer), "level1", (color,))

    first = _likely_color(rng, board)
    second = first
    while second == first:
        # A board of one colour only has to be compared with an absent one, hence the second chance.
        second = _likely_color(rng, board) if rng.random() < 0.7 else rng.choice(list(COLORS))
    num_first, num_second = len(cells_of_color(board, first)), len(cells_of_color(board, second))
    if level == 2:
        text = f"How many {first} shapes plus {second} shapes?"
        return Question(board, text, str(num_first + num_second), "level2", (first, second))
    if num_first < num_second:
        first, second = second, first
    text = f"How many more {first} shapes than {second} shapes?"
    return Question(board, text, str(abs(num_first - num_second)), "level3", (first, second))


def general_question(rng: random.Random, split: str) -> Question:
    board = random_board(rng, split)
    number = rng.choice([number for number, shape in enumerate(board, start=1) if shape])
    shape = board[number - 1]
    if rng.random() < 0.5:
        return Question(board, f"What color is cell {number}?", shape.color, "general", cell=number)
    return Question(board, f"What shape is cell {number}?", shape.kind, "general", cell=number)


def _likely_color(rng: random.Random, board: Board) -> str:
    """Mostly a colour that is on the board, now and then any."""
    if rng.random() < 0.85:
        return rng.choice([shape for shape in board if shape]).color
    return rng.choice(list(COLORS))


def reasoning_rows(num_rows: int, *, split: str, seed: int, level: int | None = None) -> list[dict[str, Any]]:
    """`num_rows` counting questions {"image", "problem", "answer", "category"}, the same for the same (split, seed).

    Of one level, or of all three.
    """
    ask = partial(reasoning_question, level=level)
    return list(_rows(num_rows, ask, f"level{level}" if level else "reasoning", split, seed))


def general_rows(num_rows: int, *, split: str, seed: int) -> list[dict[str, Any]]:
    """`num_rows` questions of the general task, in the form of `reasoning_rows`."""
    return list(_rows(num_rows, general_question, "general", split, seed))


def _rows(
    num_rows: int, ask: Callable[[random.Random, str], Question], task: str, split: str, seed: int
) -> Iterator[dict[str, Any]]:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    rng = random.Random(f"{task} {split} {seed}")  # text seeds hash the same in every process
    for _ in range(num_rows):
        question = ask(rng, split)
        yield {
            "image": draw_board(question.board, rng),
            "problem": question.text,
            "answer": question.answer,
            "category": question.category,
        }
