"""Held-out items before and after training, with the same seed: measured, recorded, summarised."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from tqdm.auto import tqdm

from apo_lora.data.examples import Example
from apo_lora.evaluation.figures import summary
from apo_lora.evaluation.measure import ITEMS_PER_BATCH, JudgedCompletion, Scorer, answer_rows, measure
from apo_lora.machine import ranks
from apo_lora.policy.loading import Policy
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl, read_jsonl, write_json, write_jsonl
from apo_lora.run.pictures import saved_images


def model_at(when: Literal["before", "after"], recipe: Recipe) -> str:
    """The `model` in answers.jsonl: a fresh adapter is the base."""
    return "tuned" if when == "after" else "start" if recipe.lora.start else "base"


class HeldOut:
    """A run's held-out sets, their rows in answers.jsonl and their figures in eval.json."""

    def __init__(
        self,
        sets: Mapping[str, Sequence[Example]],
        policy: Policy,
        recipe: Recipe,
        score: Scorer,
        run_dir: RunDir,
    ):
        """`sets`: items by title."""
        self.sets, self.policy, self.recipe, self.score, self.run_dir = sets, policy, recipe, score, run_dir
        recorded = run_dir.evaluation
        self.figures = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}
        """By `when` and title (evaluation/figures.py)."""

    def measure(self, when: Literal["before", "after"]) -> None:
        """One sampled completion per item of every set, at the recipe's temperature; replaces an earlier `when`.

        Several processes share the items out; each of them has the figures, the main one writes.
        """
        run_dir, is_main, figures = self.run_dir, ranks.is_main(), {}
        model = model_at(when, self.recipe)
        if is_main and self.sets:
            others = list(read_jsonl(run_dir.answers)) if run_dir.answers.exists() else []
            write_jsonl(run_dir.answers, [row for row in others if row["model"] != model])
        for title, examples in self.sets.items():
            judged = self._shared_out(examples, title=f"{when}: {title}")
            images = [
                saved_images(example.images, run_dir.images / title, run_dir.path) if is_main else []
                for example in examples
            ]
            rows = answer_rows(title, model, examples, judged, images)
            if is_main:
                append_jsonl(run_dir.answers, rows)
            figures[title] = summary(rows)
        self.figures[when] = figures
        if is_main:
            write_json(run_dir.evaluation, self.figures)

    def validate(self, step: int, title: str = "reasoning") -> dict[str, float]:
        """figures.VALIDATION of the set's first `train.eval_items`, sampled with the same seed every time."""
        examples = self.sets[title][: self.recipe.train.eval_items]
        judged = self._shared_out(examples, title=f"step {step}: {title}", leave=False)
        found = summary(answer_rows(title, "tuned", examples, judged, [[]] * len(examples)))
        return {
            "held_out_accuracy": found["accuracy"],
            "held_out_accuracy_low": found["accuracy_95_low"],
            "held_out_accuracy_high": found["accuracy_95_high"],
            "held_out_length": sum(completion.length for completion in judged) / len(judged),
        }

    def _shared_out(self, examples: Sequence[Example], *, title: str, leave: bool = True) -> list[JudgedCompletion]:
        """A completion of every example, in order, on every process; each of them has sampled its share."""
        own = range(ranks.rank(), len(examples), ranks.num_processes())
        with tqdm(total=len(own), desc=title, unit="item", leave=leave, disable=not ranks.is_main()) as bar:
            judged = measure(
                self.policy,
                [examples[i] for i in own],
                self.recipe,
                self.score,
                seed=self.recipe.train.seed + ranks.rank(),
                batch_size=min(ITEMS_PER_BATCH, self.recipe.completions_per_step),  # what fits in training fits here
                progress=bar.update,
            )
        # Only completions are pickled: examples hold images and places in tables.
        numbered = ranks.gathered(list(zip(own, judged, strict=True)))
        return [completion for _, completion in sorted(numbered, key=lambda pair: pair[0])]
