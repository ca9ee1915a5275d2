"""The models of an evaluation one after the other, and the batches that each of them has still to answer."""

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from apo_lora.errors import ModelError
from apo_lora.evaluation.by_vllm import AnswersByVllm
from apo_lora.evaluation.folder import EvaluationBatch, EvaluationFolder
from apo_lora.evaluation.measure import Answers, Scorer, answer_rows, by_generate, measure
from apo_lora.policy.loading import Policy, load_policy, reference_mode
from apo_lora.policy.tuned import load_tuned
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.vllm.sampler import ASK_AGAIN, VllmSampler
from apo_lora.rollout.vllm.server import Servers
from apo_lora.run.adapter import AdapterSource
from apo_lora.run.directory import RunDir
from apo_lora.run.pictures import saved_images

COPY_PIXELS = 768
"""Longest side of a copied image."""


def policies(
    recipe: Recipe, source: AdapterSource | None, exported: Path | None, models: set[str]
) -> Iterator[tuple[str, Policy]]:
    """(base or tuned, the policy switched to it), each of `models` once, the base first.

    An adapter is loaded once with its base, and switched off and on. An export is a separate model, loaded after
    the base is gone, in the precision it is stored in.
    """
    if source and models:
        policy = load_tuned(source, recipe)
        print(policy.summary, flush=True)
        if "base" in models:
            with reference_mode(policy.model):
                yield "base", policy
        if "tuned" in models:
            yield "tuned", policy
        return
    changes: dict[str, dict[str, Any]] = {"base": {}}
    if exported:
        changes["tuned"] = {"name": str(exported), "revision": None, "load_in_4bit": False}
    for model in sorted(changes.keys() & models):
        section = recipe.model.model_copy(update=changes[model])
        policy = load_policy(section, recipe.lora, recipe.data, seed=recipe.train.seed)
        print(policy.summary, flush=True)
        with reference_mode(policy.model):  # the adapter that every policy has is a fresh one here
            yield model, policy
        del policy
        _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def answer(
    todo: Sequence[EvaluationBatch],
    wanted: Sequence[EvaluationBatch],
    switched: Iterator[tuple[str, Policy]],
    recipe: Recipe,
    score: Scorer,
    folder: EvaluationFolder,
    run: RunDir,
    servers: Servers | None = None,
) -> None:
    """Answers every pending batch, and records it before the next one. `servers` answer instead of generate()."""
    for model, policy in switched:
        own = [batch for batch in todo if batch.model == model]
        answers = AnswersByVllm(VllmSampler(servers, policy, recipe, ASK_AGAIN), model) if servers else by_generate
        total, left = (
            sum(len(batch.examples) for batch in batches if batch.model == model) for batches in (wanted, todo)
        )
        with tqdm(total=total, initial=total - left, desc=model, unit="answer") as bar:
            for batch in own:
                bar.set_description(f"{model}: {batch.title}, {'sampled' if batch.sample else 'greedy'}")
                folder.add(_answered(batch, policy, recipe, score, folder, run, answers))
                bar.update(len(batch.examples))
        del policy, answers  # before the next model is loaded


def _answered(
    batch: EvaluationBatch,
    policy: Policy,
    recipe: Recipe,
    score: Scorer,
    folder: EvaluationFolder,
    run: RunDir,
    answers: Answers,
) -> list[dict[str, Any]]:
    greedy, size = batch.sample == 0, len(batch.examples)
    seed = batch.seed(recipe.train.seed)
    try:
        judged = measure(
            policy, batch.examples, recipe, score, seed=seed, greedy=greedy, batch_size=size, answers=answers
        )
    except torch.OutOfMemoryError:
        raise ModelError(
            f"--batch-size: {size} answers at once do not fit in GPU memory; give fewer (and another --name, if there "
            "are answers already)"
        ) from None
    images = [
        saved_images(example.images, folder.images / batch.title, run.path, longest=COPY_PIXELS)
        for example in batch.examples
    ]
    return answer_rows(batch.title, batch.model, batch.examples, judged, images, sample=batch.sample, greedy=greedy)
