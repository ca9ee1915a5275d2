"""The bases and the questions that the experiments of `benchmarks.evidence` are built of.

`even`: a base that counts one colour right equally often however often it counts again, so that plain GRPO has no
reason to shorten its reasoning. `confused`: a base that mostly adds, also where it should subtract. Its questions are
easy (level 1, one colour), hard (level 3, a difference), and general (level 2, a sum): learning to subtract, by
training on the first two, is what puts the third at risk.
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from apo_lora.tiny.boards import Question, draw_board, reasoning_question

BASES = ("even", "confused")
BASE_SEED = 0

EASY, HARD, GENERAL = "easy", "hard", "general"
LEVELS = {EASY: 1, HARD: 3, GENERAL: 2}
FILES = {  # name: kinds of question in turn, split, number of rows
    "mixed_train": ((EASY, HARD), "train", 2048),
    "mixed_eval": ((EASY, HARD), "test", 512),
    "general_eval": ((GENERAL,), "test", 256),
}


def make_bases(folder: Path) -> None:
    """Those that are not there yet, side by side."""
    missing = [name for name in BASES if not (folder / name / "training_record.json").is_file()]
    commands = [
        [sys.executable, "-m", "tools.tiny_base.make_base", "--habits", name, "--seed", str(BASE_SEED), "--out"]
        for name in missing
    ]
    making = [
        subprocess.Popen([*command, str(folder / name)], stdout=subprocess.DEVNULL)
        for name, command in zip(missing, commands, strict=True)
    ]
    for name, process in zip(missing, making, strict=True):
        if process.wait():
            raise SystemExit(f"the base {name} could not be made; the lines above say why")


def write_tasks(folder: Path) -> None:
    """The files of questions, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (kinds, split, num_rows) in FILES.items():
        Dataset.from_list(list(rows(kinds, split, num_rows))).to_parquet(folder / f"{name}.parquet")


def rows(kinds: tuple[str, ...], split: str, num_rows: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"evidence {' '.join(kinds)} {split}")
    for number in range(num_rows):
        kind = kinds[number % len(kinds)]
        question = _telling_question(rng, split, LEVELS[kind])
        yield {
            "image": draw_board(question.board, rng),
            "problem": question.text,
            "answer": question.answer,
            "category": kind,
        }


def _telling_question(rng: random.Random, split: str, level: int) -> Question:
    """One whose sum is not also its difference."""
    while True:
        question = reasoning_question(rng, split, level)
        if level == 1 or question.counts[1] > 0:
            return question
