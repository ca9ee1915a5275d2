"""Held-out items before and after training, with the same seed: measured, recorded, summed up."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tqdm.auto import tqdm

from apo_lora.data.examples import Example
from apo_lora.evaluation.figures import summary
from apo_lora.evaluation.measure import ITEMS_PER_BATCH, Answer, Score, answer_row, measure
from apo_lora.machine import ranks
from apo_lora.policy.loading import Policy
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.record import saved_image
from apo_lora.run.directory import RunDir, append_jsonl, read_jsonl, write_jsonl

MODELS = {"before": "base", "after": "tuned"}
"""What is measured when, in the words of answers.jsonl: a fresh adapter is the base."""


def measure_held_out(
    when: Literal["before", "after"],
    policy: Policy,
    held_out: Mapping[str, Sequence[Example]],
    recipe: Recipe,
    score: Score,
    run_dir: RunDir,
) -> dict[str, Any]:
    """One sampled completion per item of every set (title -> items), at the recipe's temperature.

    The rows go to the run's answers.jsonl, in place of those of an earlier `when`; the figures are returned by title
    (evaluation/figures.py). Several processes share the items out; each of them returns the whole, the main one writes.
    """
    figures = {}
    if ranks.is_main() and held_out:
        others = list(read_jsonl(run_dir.answers)) if run_dir.answers.exists() else []
        write_jsonl(run_dir.answers, [row for row in others if row["model"] != MODELS[when]])
    for title, examples in held_out.items():
        answers = shared_out(policy, examples, recipe, score, title=f"{when}: {title}")
        # Only the main process saves pictures.
        images = [
            [saved_image(image, run_dir.images / title, run_dir.path) for image in example.images]
            if ranks.is_main()
            else []
            for example in examples
        ]
        rows = [
            answer_row(title, MODELS[when], 0, example, answer, paths)
            for example, answer, paths in zip(examples, answers, images, strict=True)
        ]
        if ranks.is_main():
            append_jsonl(run_dir.answers, rows)
        figures[title] = summary(rows)
    return figures


def shared_out(
    policy: Policy, examples: Sequence[Example], recipe: Recipe, score: Score, *, title: str
) -> list[Answer]:
    """Every example's answer, in order, on every process; each of them has sampled its share."""
    own = range(ranks.rank(), len(examples), ranks.num_processes())
    with tqdm(total=len(own), desc=title, unit="item", disable=not ranks.is_main()) as bar:
        answers = measure(
            policy,
            [examples[i] for i in own],
            recipe,
            score,
            seed=recipe.train.seed + ranks.rank(),
            batch_size=min(ITEMS_PER_BATCH, recipe.completions_per_step),  # what fits in training fits here
            progress=bar.update,
        )
    # Answers alone are pickled: examples hold images and places in tables.
    numbered = ranks.gathered(list(zip(own, answers, strict=True)))
    return [answer for _, answer in sorted(numbered, key=lambda pair: pair[0])]
