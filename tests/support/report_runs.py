"""Run directories for the tests of the report, written by hand: made-up figures, real credit, real pictures."""

import re
from typing import NamedTuple

from PIL import Image

from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl, write_atomically, write_json

GROUP = 8
SCRIPT = "<script>window.hacked = true</script><img src=x onerror='window.hacked = true'>"
HOSTILE = f"</script>{SCRIPT}<!-- & \u2028 \ud83d ]]>"
"""Ends a script element, starts others; a line separator and half a character."""


def write_run(folder, *overrides, steps=12, answers=True, metrics=None):
    """A finished run of tiny_cpu.yaml with `overrides`; every step has two prompts."""
    run = RunDir(folder)
    folder.mkdir(parents=True)
    recipe = load_recipe(find_recipe("tiny_cpu"), [f"train.max_steps={steps}", *overrides]).in_run_dir(folder)
    write_atomically(run.recipe, recipe.to_yaml())
    write_json(run.environment, {"python": "3.11", "gpu": None, "packages": {"torch": "2.10.0"}})
    append_jsonl(run.metrics, (metrics_row(step, **(metrics or {})) for step in range(1, steps + 1)))
    run.images.mkdir()
    for row in (7, 8):
        Image.new("RGB", (84, 84), (20 * row, 0, 90)).save(run.images / f"board-{row}.png")
    append_jsonl(
        run.completions,
        (r for step in range(1, steps + 1) for row in (7, 8) for r in completion_rows(step, row, recipe.apo)),
    )
    write_json(run.evaluation, {"before": {"reasoning": held_out(0.5)}, "after": {"reasoning": held_out(0.75)}})
    run.adapter.mkdir()
    if answers:
        append_jsonl(folder / "answers.jsonl", answer_rows())
    return folder


def metrics_row(step, **changes):
    return {
        "step": step, "reward": 0.5 + step / 100, "accuracy": step / 100, "length_correct": 40.0,
        "length_wrong": None if step % 5 == 0 else 60.0, "entropy": 0.2, "entropy_correct": 0.1, "entropy_wrong": 0.3,
        "kl": 0.01 * step, "kl_positives": 0.01, "kl_negatives": 0.02, "grad_norm": 0.5, "truncated": 0.0,
        "zero_variance_groups": 0.25, "all_right_groups": 0.25, "all_wrong_groups": 0.0, "tokens_per_second": 1000.0,
        "seconds": 4.0, "seconds_generate": 2.0, "seconds_reward": 0.0, "seconds_score": 1.0, "seconds_train": 1.0,
        "peak_memory_bytes": 2**30,
    } | changes  # fmt: skip


def completion_rows(step, row, apo):
    """A group of two right completions of 40 tokens, and six wrong ones of 40, 50, ... 90."""
    import torch

    from apo_lora.apo import assign_credit

    correct = torch.tensor([[1.0] * 2 + [0.0] * 6])
    lengths = torch.tensor([[40.0, 40.0, *range(40, 100, 10)]])
    credit = assign_credit(
        correct + 0.5,
        correct,
        lengths,
        dads=apo.dads is not None,
        dads_shape=apo.dads or "constant",
        stcr=apo.stcr is not None,
        stcr_base=apo.stcr or 1.0,
    )
    for place in range(GROUP):
        right = bool(correct[0, place])
        yield {
            "step": step,
            "row": row,
            "prompt": f"How many shapes on board {row}?",
            "images": [f"images/board-{row}.png"],
            "completion": f"<think>{place}</think><answer>{3 if right else 4}</answer>",
            "gold": "3",
            "rewards": [float(right), 0.5],
            "reward": right + 0.5,
            "correct": right,
            "length": int(lengths[0, place]),
            "truncated": False,
            "advantage": credit.advantages_NG[0, place].item(),
            "kl_weight": credit.kl_weights_NG[0, place].item(),
            "stcr_multiplier": credit.stcr_multipliers_NG[0, place].item(),
        }


def held_out(accuracy):
    return {
        "items": 40, "accuracy": accuracy, "accuracy_95_low": accuracy - 0.1, "accuracy_95_high": accuracy + 0.1,
        "length_correct": 40.0, "length_wrong": 60.0, "truncated": 0.0, "well_formatted": 1.0,
    }  # fmt: skip


OUTCOMES = [(False, True)] * 12 + [(True, False)] * 4 + [(True, True)] * 20 + [(False, False)] * 4
"""(base is right, tuned is right) of 40 items: 12 fixed, 4 broken, 20 right, 4 wrong."""


def answer_rows():
    for model in (0, 1):
        for row, outcome in enumerate(OUTCOMES, start=1):
            yield answer_row(row, ("base", "tuned")[model], outcome[model])


def answer_row(row, model, correct, **changes):
    text = f"<think>{HOSTILE if row == 1 else 'I count.'}</think><answer>{3 if correct else 4}</answer>"
    return {
        "set": "reasoning", "model": model, "row": row, "sample": 0, "problem": f"How many shapes on board {row}?",
        "gold": "3", "choices": ["2", "3", "4"] if row == 2 else None, "category": "level1",
        "images": [f"images/board-{7 + row % 2}.png"] if row != 3 else ["images/gone.png"],
        "text": text, "answer": "3" if correct else "4", "correct": correct, "length": 40 + row, "truncated": False,
        "well_formatted": True,
    } | changes  # fmt: skip


class ShownItem(NamedTuple):
    outcome: str
    heading: str
    html: str


def shown_sources(page):
    """Of a page with a gallery: title of each source -> its items."""
    item = re.compile(r'<article class="item" data-outcome="(\w+)">.*?<h4>(.*?)</h4>(.*?)</article>', re.DOTALL)
    parts = page.split('<div class="items">')[1:]
    return {re.search("<h3>(.*?)</h3>", part)[1]: [ShownItem(*found) for found in item.findall(part)] for part in parts}
