"""One clock for every trainer that descends from trl.GRPOTrainer: seconds, peak memory and tokens, by phase.

    generate   trainer._generate: prompts are read, completions are written
    reward     trainer._calculate_rewards
    score      the rest of trainer._generate_and_score_completions: old and reference log-probs
    train      the rest of the optimizer step: forward, backward, optimizer

At every border between two phases the device is waited for, and its peak memory read and reset.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

PHASES = ("generate", "reward", "score", "train")
METHODS = {"_generate": "generate", "_calculate_rewards": "reward", "_generate_and_score_completions": "score"}


Step = dict[str, dict[str, float]]
"""Of one optimizer step: seconds and peak_bytes by phase, and tokens of prompts and completions."""


class PhaseClock(TrainerCallback):
    """Built on a trainer that has not trained yet; read `summary()` afterwards."""

    def __init__(self, trainer: Any, after_step: Callable[[list[Step]], None]):
        """`after_step(steps)` is called after every optimizer step, with all of them."""
        self.steps: list[Step] = []
        """The first one is warming up."""
        self.after_step = after_step
        self.peak_reserved = 0
        self.open_phases: list[str] = []
        for method, phase in METHODS.items():
            self._time(trainer, method, phase)
        trainer.add_callback(self)

    def _time(self, trainer: Any, method: str, phase: str) -> None:
        original = getattr(trainer, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._enter(phase)
            try:
                result = original(*arguments, **options)
            finally:
                self._leave()
            if phase == "score":
                self.steps[-1]["tokens"]["completion"] += int(result["completion_mask"].sum())
                self.steps[-1]["tokens"]["prompt"] += int(result["prompt_mask"].sum())
            return result

        setattr(trainer, method, timed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.steps.append(
            {
                "seconds": dict.fromkeys(PHASES, 0.0),
                "peak_bytes": dict.fromkeys(PHASES, 0),
                "tokens": {"prompt": 0, "completion": 0},
            }
        )
        self._enter("train")

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self._leave()
        self.after_step(self.steps)

    def _enter(self, phase: str) -> None:
        self._border()
        self.open_phases.append(phase)

    def _leave(self) -> None:
        self._border()
        self.open_phases.pop()

    def _border(self) -> None:
        """What passed since the last border belongs to the innermost phase that is open."""
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open_phases:
            phase, step = self.open_phases[-1], self.steps[-1]
            step["seconds"][phase] += now - self.since
            if on_gpu:
                step["peak_bytes"][phase] = max(step["peak_bytes"][phase], torch.cuda.max_memory_allocated())
        if on_gpu:
            self.peak_reserved = max(self.peak_reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        self.since = time.perf_counter()

    def summary(self) -> dict[str, Any]:
        """Medians of the timed steps' seconds, and the highest peak of all steps: a card must hold the first one too.

        Peaks are None without a GPU: there is no allocator to ask.
        """
        timed = self.steps[1:] or self.steps
        seconds = {phase: statistics.median(step["seconds"][phase] for step in timed) for phase in PHASES}
        peaks = {phase: max(step["peak_bytes"][phase] for step in self.steps) or None for phase in PHASES}
        return {
            "seconds": seconds,
            "seconds_per_step": statistics.median(sum(step["seconds"].values()) for step in timed),
            "tokens": self.steps[-1]["tokens"],
            "tokens_per_second": statistics.median(
                step["tokens"]["completion"] / step["seconds"]["generate"] for step in timed
            ),
            "peak_bytes": peaks,
            "peak_bytes_of_step": max((peak for peak in peaks.values() if peak), default=None),
            "peak_reserved_bytes": self.peak_reserved or None,
        }
