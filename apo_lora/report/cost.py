"""Where a step's seconds and the memory went, over the steps of a group of runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from apo_lora.report.runs import Run, is_number

PHASES = {
    "generate": "sampling",
    "reward": "rewards",
    "score": "scoring with the reference",
    "train": "forward, backward, optimizer",
}
"""The `seconds_` metrics of a step, in words."""


@dataclass(frozen=True)
class Phase:
    name: str
    words: str
    seconds: float
    """Mean of a step."""
    share: float


@dataclass(frozen=True)
class Cost:
    phases: list[Phase]
    seconds: float
    """Mean of a step."""
    whole: str
    """All recorded steps of a run, in words; of several runs, the mean."""
    tokens_per_second: float | None
    """Sampled, mean over steps."""
    peak_memory: str | None
    """GiB; of the GPU where there is one, else of the process."""

    @property
    def summary(self) -> str:
        return ", ".join(f"{phase.words} {100 * phase.share:.0f} %" for phase in self.phases)


def cost(runs: Sequence[Run]) -> Cost | None:
    """None where no step was timed."""
    timed = [row for run in runs for row in run.steps if is_number(row.get("seconds")) and row["seconds"] > 0]
    if not timed:
        return None
    seconds = _mean([row["seconds"] for row in timed])
    spent = {name: _mean([row.get(f"seconds_{name}") or 0.0 for row in timed]) for name in PHASES}
    speeds = [row["tokens_per_second"] for row in timed if is_number(row.get("tokens_per_second"))]
    return Cost(
        phases=[
            Phase(name, PHASES[name], value, value / (sum(spent.values()) or 1.0)) for name, value in spent.items()
        ],
        seconds=seconds,
        whole=duration(seconds * len(timed) / len(runs)),
        tokens_per_second=_mean(speeds) if speeds else None,
        peak_memory=_peak_memory(runs),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _peak_memory(runs: Sequence[Run]) -> str | None:
    peaks = [row["peak_memory_bytes"] for run in runs for row in run.steps if is_number(row.get("peak_memory_bytes"))]
    if not peaks:
        return None
    gpu = runs[0].environment.get("gpu")
    return f"{max(peaks) / 2**30:.2f}" + (f" of {gpu['memory_bytes'] / 2**30:.1f}" if gpu else "")
