"""What happens between two lines of a training log: figures of each optimizer step, and where its time went."""

import time
from collections import defaultdict
from collections.abc import Mapping

from apo_lora.machine.memory import peak_memory


class LogWindow:
    def __init__(self) -> None:
        self.seconds = {"generate": 0.0, "reward": 0.0, "score": 0.0}
        """By phase of the steps, the rest of which is training."""
        self.sampled_tokens = 0.0
        self.steps = 0
        self._started = time.perf_counter()
        self._figures: dict[str, list[float]] = defaultdict(list)

    def add_step(self, figures: Mapping[str, float | None]) -> None:
        """None is the mean of nothing."""
        self.steps += 1
        for name, value in figures.items():
            self._figures[name] += [value] if value is not None else []

    def means(self) -> dict[str, float | None]:
        """Of each figure over the steps."""
        return {name: sum(values) / len(values) if values else None for name, values in self._figures.items()}

    def cost(self, elsewhere: float = 0.0) -> dict[str, float]:
        """Of one optimizer step, without the seconds that were spent `elsewhere`."""
        seconds = (time.perf_counter() - self._started - elsewhere) / self.steps
        phases = {phase: spent / self.steps for phase, spent in self.seconds.items()}
        return {
            **{f"seconds_{phase}": spent for phase, spent in phases.items()},
            "seconds_train": seconds - sum(phases.values()),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
        }
