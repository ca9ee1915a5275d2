"""The models of an evaluation one after the other, and the batches that each of them has still to answer."""

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from apo_lora.errors import ModelError
from apo_lora.evaluation.measure import Score, answer_row, measure
from apo_lora.evaluation.record import Batch, Record
from apo_lora.policy.loading import Policy, load_policy, reference_mode
from apo_lora.policy.tuned import load_tuned
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.record import saved_image
from apo_lora.run.adapter_source import AdapterSource
from apo_lora.run.directory import RunDir

COPY_PIXELS = 768
"""Longest side of a copied picture."""


def policies(
    recipe: Recipe, source: AdapterSource | None, exported: Path | None, models: set[str]
) -> Iterator[tuple[str, Policy]]:
    """(base or tuned, the policy switched to it), each of `models` once, the base first.

    An adapter is loaded once with its base, and switched off and on. An export is a model of its own, loaded after
    the base is gone, in the precision it is stored in.
    """

    def load(**changes: Any) -> Policy:
        model = recipe.model.model_copy(update=changes)
        policy = load_policy(model, recipe.lora, recipe.data, seed=recipe.train.seed)
        print(policy.summary, flush=True)
        return policy

    if source and models:
        policy = load_tuned(source, recipe)
        print(policy.summary, flush=True)
        if "base" in models:
            with reference_mode(policy.model):
                yield "base", policy
        if "tuned" in models:
            yield "tuned", policy
        return
    ways: dict[str, dict[str, Any]] = {"base": {}}
    if exported:
        ways["tuned"] = {"name": str(exported), "revision": None, "load_in_4bit": False}
    for model, changes in ways.items():
        if model in models:
            policy = load(**changes)
            with reference_mode(policy.model):  # the adapter that every policy has is a fresh one here
                yield model, policy
            del policy
            _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def answer(
    todo: Sequence[Batch],
    wanted: Sequence[Batch],
    switched: Iterator[tuple[str, Policy]],
    recipe: Recipe,
    score: Score,
    record: Record,
    run: RunDir,
) -> None:
    """Answers every batch that is to do, and writes it down before the next one."""
    for model, policy in switched:
        own = [batch for batch in todo if batch.model == model]
        total, left = (
            sum(len(batch.examples) for batch in batches if batch.model == model) for batches in (wanted, todo)
        )
        with tqdm(total=total, initial=total - left, desc=model, unit="answer") as bar:
            for batch in own:
                bar.set_description(f"{model}: {batch.title}, {'sampled' if batch.sample else 'greedy'}")
                record.add(_answered(batch, policy, recipe, score, record, run))
                bar.update(len(batch.examples))
        del policy  # before the next model is loaded


def _answered(
    batch: Batch, policy: Policy, recipe: Recipe, score: Score, record: Record, run: RunDir
) -> list[dict[str, Any]]:
    greedy, size = batch.sample == 0, len(batch.examples)
    seed = batch.seed(recipe.train.seed)
    try:
        answers = measure(policy, batch.examples, recipe, score, seed=seed, greedy=greedy, batch_size=size)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"--batch-size: {size} answers at once are too many for this GPU's memory; give fewer (and another --name, "
            "where there are answers already)"
        ) from None
    folder = record.images / batch.title
    images = [
        [saved_image(image, folder, run.path, longest=COPY_PIXELS) for image in example.images]
        for example in batch.examples
    ]
    return [
        answer_row(batch.title, batch.model, batch.sample, example, answer, paths, greedy=greedy)
        for example, answer, paths in zip(batch.examples, answers, images, strict=True)
    ]
