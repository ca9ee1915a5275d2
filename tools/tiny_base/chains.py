"""What the base is taught to say.

An answer counts each colour by naming its cells, then combines the counts:

    <think>Let me count. red:1,4=2. blue:3=1. 2+1=3.</think><answer>3</answer>

A share of the chains rambles: it counts again, once to three times, and a recount is more often wrong than right. The
last count decides. This builds overthinking into the base: long chains fail, and RL can find out that short ones do
not.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from apo_lora.tiny.boards import COLORS, KINDS, NUM_CELLS, Question, cells_of_color

OPENINGS = (
    "",
    "",
    "Let me count. ",
    "I look at the image. ",
    "Let me look at the image. ",
    "Let me check the image. ",
    "I count. ",
)
RECOUNTS = (" Wait, let me check again. ", " Hmm, recount. ", " Let me verify. ")


@dataclass(frozen=True)
class Habits:
    """How the taught chains behave."""

    openings: tuple[str, ...] = OPENINGS
    recount_shares: tuple[float, ...] = (0.22, 0.26, 0.26, 0.26)
    """Shares of chains with 0, 1, 2, ... recounts."""
    concise_slips: float = 0.10
    """Probability that a chain without a recount has one wrong count."""
    rambling_slips: float = 0.15
    """The same for the first pass of a chain with recounts."""
    recount_slips: float = 0.70
    """Probability that one recount is wrong."""
    general_slips: float = 0.08
    """Share of the general task's answers that are wrong, so that there is something to lose and something to gain."""
    wrong_operations: Mapping[str, float] = field(default_factory=dict)
    """Of a level, the share of chains that add where they should subtract (level3), or the reverse (level2)."""


CLEAN = Habits(
    openings=("",), recount_shares=(1.0,), concise_slips=0.0, rambling_slips=0.0, recount_slips=0.0, general_slips=0.0
)
HABITS = {
    # The embedded base: the more it counts again, the more often it is wrong.
    "overthinking": Habits(),
    # A single colour is counted right equally often, however often it is counted again: the last count decides.
    "even": Habits(concise_slips=0.35, rambling_slips=0.35, recount_slips=0.35),
    # No recounts. Differences (level 3) are mostly added up, and a few sums (level 2) subtracted.
    "confused": Habits(recount_shares=(1.0,), wrong_operations={"level2": 0.2, "level3": 0.9}),
}
"""The bases that can be made. docs/experiments has what the last two are for."""


def reasoning_chain(rng: random.Random, question: Question, habits: Habits) -> str:
    num_recounts = rng.choices(range(len(habits.recount_shares)), habits.recount_shares)[0]
    slips = habits.rambling_slips if num_recounts else habits.concise_slips
    slip_at = rng.randrange(len(question.colors)) if rng.random() < slips else None
    confusion = habits.wrong_operations.get(question.category, 0.0)
    adds = (question.category == "level2") != (confusion > 0 and rng.random() < confusion)

    sentences, counts = [], []
    for index in range(len(question.colors)):
        sentence, count = _count(rng, question, index, wrong=index == slip_at)
        sentences.append(sentence)
        counts.append(count)
    result, sum_sentence = _combine(counts, adds)
    thought = rng.choice(habits.openings) + " ".join(sentences) + sum_sentence

    for _ in range(num_recounts):
        index = rng.randrange(len(question.colors))
        sentence, counts[index] = _count(rng, question, index, wrong=rng.random() < habits.recount_slips)
        result, sum_sentence = _combine(counts, adds)
        thought += rng.choice(RECOUNTS) + sentence + sum_sentence
    return f"<think>{thought}</think><answer>{result}</answer>"


def general_answer(rng: random.Random, question: Question, habits: Habits) -> str:
    answer = question.answer
    if rng.random() < habits.general_slips:
        kin = tuple(COLORS) if answer in COLORS else KINDS
        answer = rng.choice([word for word in kin if word != answer])
    return f"<answer>{answer}</answer>"


def num_recounts(completion: str) -> int:
    """How often a completion starts over, whether or not it ever ends.

    Told by how the phrases end, since a small model mixes their beginnings ("Wait, recount.").
    """
    return len(re.findall(r"check again\.|recount\.|verify\.", completion))


def _count(rng: random.Random, question: Question, index: int, wrong: bool) -> tuple[str, int]:
    color = question.colors[index]
    cells = cells_of_color(question.board, color)
    if wrong:
        others = [number for number in range(1, NUM_CELLS + 1) if number not in cells]
        if cells and (not others or rng.random() < 0.5):
            cells.remove(rng.choice(cells))
        else:
            cells = sorted([*cells, rng.choice(others)])
    listed = ",".join(map(str, cells)) or "none"
    return f"{color}:{listed}={len(cells)}.", len(cells)


def _combine(counts: list[int], adds: bool) -> tuple[int, str]:
    """The answer that follows from these counts, and the sentence that says so."""
    if len(counts) == 1:
        return counts[0], ""
    first, second = counts
    if adds:
        return first + second, f" {first}+{second}={first + second}."
    # After a slip the difference may come out negative; the chain then settles for zero.
    difference = max(0, first - second)
    return difference, f" {first}-{second}={difference}."


def stated_answer(completion: str) -> str | None:
    """What stands in the answer tags that end a completion; None where there are none."""
    match = re.search(r"<answer>([^<]*)</answer>$", completion.strip())
    return match[1].strip() if match else None
