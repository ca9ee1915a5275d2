"""How much of a batch goes through the model at once, and what one such pass leaves behind.

Out of memory is answered with passes of half as many rows, for the rest of the run; the result is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from apo_lora.errors import TrainingStopped
from apo_lora.machine import ranks
from apo_lora.run.metrics import TokenMeans

Result = TypeVar("Result")


@dataclass
class Pass:
    """One forward pass over some rows of a micro-batch. Shapes (B, T); the figures are shares of the step's."""

    rows: dict[str, Any]
    loss: Tensor
    figures: dict[str, Tensor]
    logps: Tensor
    entropies: Tensor
    largest: dict[str, Tensor] = field(default_factory=dict)
    """Figures of which the step has the largest, not the sum."""

    def detached(self) -> "Pass":
        return replace(self, loss=self.loss.detach(), logps=self.logps.detach(), entropies=self.entropies.detach())


class StepFigures:
    """What the passes of one optimizer step add up to."""

    def __init__(self):
        self.loss_shares: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self.token_means = TokenMeans()

    def add(self, done: Pass) -> None:
        for name, share in {"loss": done.loss, **done.figures}.items():
            self.loss_shares[name] = self.loss_shares.get(name, 0.0) + share.item()
        for name, value in done.largest.items():
            self.largest[name] = max(self.largest.get(name, value.item()), value.item())
        rows = done.rows
        self.token_means.add(
            done.logps, rows["ref_logps"], done.entropies, rows["completion_mask"], rows["advantages"], rows["correct"]
        )

    def over_ranks(self) -> dict[str, float | None]:
        everywhere = [found for own in ranks.gathered([self.largest]) for found in own.items()]
        largest = {name: max(value for other, value in everywhere if other == name) for name, _ in everywhere}
        return {**ranks.summed(self.loss_shares), **largest, **self.token_means.over_ranks().means()}


class PassSize:
    def __init__(self, rows: int):
        self.rows = rows

    def fitting(self, run: Callable[[int], Result]) -> Result:
        """`run(rows)`, again with fewer rows as long as memory runs out. Raises TrainingStopped if one does not fit."""
        while True:
            try:
                return run(self.rows)
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise out_of_memory("one completion") from None
                self.rows = max(1, self.rows // 2)
            # Outside the except clause: the exception keeps the failed pass's tensors alive.
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: continuing with {self.rows} completions per pass; the result is the same")


def out_of_memory(what: str) -> TrainingStopped:
    return TrainingStopped(
        f"out of memory with {what}: lower data.max_pixels, grpo.max_completion_length, grpo.prompts_per_step or "
        "grpo.num_generations and start a new run; this run's checkpoints are kept"
    )
