"""The measuring loop: items -> completions -> verdicts. Training's before and after and `apo-lora eval` share it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apo_lora.data.examples import Example
from apo_lora.policy.loading import Policy
from apo_lora.recipe.schema import Recipe
from apo_lora.rewards.answers.text import final_answer
from apo_lora.rewards.functions import Scorer, are_correct
from apo_lora.rewards.scores import format_reward
from apo_lora.rollout.sampling import GREEDY, Completion, sample

ITEMS_PER_BATCH = 64

Answers = Callable[[Policy, Sequence[Example], Recipe, bool], tuple[list[Completion], list[float]]]
"""(policy, examples, recipe, greedy) -> a completion of each, and its mean entropy."""


class JudgedCompletion(NamedTuple):
    text: str
    length: int
    """Tokens, the end token included."""
    truncated: bool
    correct: bool
    entropy: float
    """Nats per token, mean over the completion: of the policy's whole distribution at temperature 1."""


def by_generate(
    policy: Policy, examples: Sequence[Example], recipe: Recipe, greedy: bool
) -> tuple[list[Completion], list[float]]:
    """The model's own answers."""
    entropies = EntropyRecorder()
    sampled = sample(policy, examples, recipe, logits_processor=[entropies], **(GREEDY if greedy else {}))
    return sampled, entropies.means([completion.length for completion in sampled])


def measure(
    policy: Policy,
    examples: Sequence[Example],
    recipe: Recipe,
    score: Scorer,
    *,
    seed: int,
    greedy: bool = False,
    batch_size: int = ITEMS_PER_BATCH,
    answers: Answers = by_generate,
    progress: Callable[[int], object] = lambda items: None,
) -> list[JudgedCompletion]:
    """One completion per example: the likeliest tokens, or sampled at the recipe's temperature; `score` judges it, or
    what else `rewards.correct_by` names (see are_correct).

    Draws from its own random state, seeded once at the start: training around it is not disturbed, and the same
    examples in the same batches give the same answers. The adapters count as they are switched.
    """
    judged: list[JudgedCompletion] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            sampled, means = answers(policy, batch, recipe, greedy)
            verdicts = are_correct(
                [completion.text for completion in sampled],
                [example.answer for example in batch],
                [list(example.choices) if example.choices else None for example in batch],
                recipe.rewards,
                score,
            )
            judged += [
                JudgedCompletion(completion.text, completion.length, completion.truncated, verdict, mean)
                for completion, verdict, mean in zip(sampled, verdicts, means, strict=True)
            ]
            progress(len(batch))
    return judged


class EntropyRecorder:
    """A logits processor that changes nothing and keeps the entropy of what it is shown, a number per sequence.

    generate() shows it every step's logits before temperature, top-p and top-k, in shape (B, V); vision tokens, which
    are never sampled, are already out. So no second pass is needed, and no (B, T, V) tensor exists.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(torch.special.entr(torch.softmax(scores.float(), dim=-1)).sum(dim=-1))
        return scores

    def means(self, lengths: Sequence[int]) -> list[float]:
        """Mean over each sequence's own tokens; what comes after its end is padding."""
        entropies_TB = torch.stack(self.steps)
        return [entropies_TB[:length, i].mean().item() for i, length in enumerate(lengths)]


def answer_rows(
    title: str,
    model: str,
    examples: Sequence[Example],
    judged: Sequence[JudgedCompletion],
    images: Iterable[list[str]],
    *,
    sample: int = 0,
    greedy: bool = False,
) -> list[dict[str, Any]]:
    """Lines of answers.jsonl. `model` is base, start or tuned; `images` are paths as a reader of the run finds them."""
    rows = []
    for example, completion, paths in zip(examples, judged, images, strict=True):
        found = final_answer(completion.text)
        rows.append(
            {
                "set": title,
                "model": model,
                "row": example.row,
                "sample": sample,
                "greedy": greedy,
                "problem": example.problem,
                "gold": example.gold,
                "choices": list(example.choices) if example.choices else None,
                "category": example.category,
                "images": paths,
                "answer": found.text if found else None,
                "well_formatted": format_reward(completion.text) > 0,
                **completion._asdict(),
            }
        )
    return rows
