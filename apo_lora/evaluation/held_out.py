"""Held-out items before and after training, with the same seed: measured, recorded, summarised."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tqdm.auto import tqdm

from apo_lora.data.examples import Example
from apo_lora.evaluation.figures import summary
from apo_lora.evaluation.measure import ITEMS_PER_BATCH, JudgedCompletion, Scorer, answer_rows, measure
from apo_lora.machine import ranks
from apo_lora.policy.loading import Policy
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl, read_jsonl, write_jsonl
from apo_lora.run.pictures import saved_images

MODEL = {"before": "base", "after": "tuned"}
"""The `model` in answers.jsonl: a fresh adapter is the base."""


def measure_held_out(
    when: Literal["before", "after"],
    policy: Policy,
    held_out: Mapping[str, Sequence[Example]],
    recipe: Recipe,
    score: Scorer,
    run_dir: RunDir,
) -> dict[str, Any]:
    """One sampled completion per item of every set (title -> items), at the recipe's temperature.

    The rows go to the run's answers.jsonl, replacing those of an earlier `when`; the figures are returned by title
    (evaluation/figures.py). Several processes share the items out; each of them returns the whole, the main one writes.
    """
    figures, is_main = {}, ranks.is_main()
    if is_main and held_out:
        others = list(read_jsonl(run_dir.answers)) if run_dir.answers.exists() else []
        write_jsonl(run_dir.answers, [row for row in others if row["model"] != MODEL[when]])
    for title, examples in held_out.items():
        judged = _shared_out(policy, examples, recipe, score, title=f"{when}: {title}")
        images = [
            saved_images(example.images, run_dir.images / title, run_dir.path) if is_main else []
            for example in examples
        ]
        rows = answer_rows(title, MODEL[when], examples, judged, images)
        if is_main:
            append_jsonl(run_dir.answers, rows)
        figures[title] = summary(rows)
    return figures


def _shared_out(
    policy: Policy, examples: Sequence[Example], recipe: Recipe, score: Scorer, *, title: str
) -> list[JudgedCompletion]:
    """A completion of every example, in order, on every process; each of them has sampled its share."""
    own = range(ranks.rank(), len(examples), ranks.num_processes())
    with tqdm(total=len(own), desc=title, unit="item", disable=not ranks.is_main()) as bar:
        judged = measure(
            policy,
            [examples[i] for i in own],
            recipe,
            score,
            seed=recipe.train.seed + ranks.rank(),
            batch_size=min(ITEMS_PER_BATCH, recipe.completions_per_step),  # what fits in training fits here
            progress=bar.update,
        )
    # Only completions are pickled: examples hold images and places in tables.
    numbered = ranks.gathered(list(zip(own, judged, strict=True)))
    return [completion for _, completion in sorted(numbered, key=lambda pair: pair[0])]
