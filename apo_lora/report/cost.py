"""Where a step's seconds and the memory went, over the steps of a group of runs."""

from collections.abc import Sequence
from typing import NamedTuple

from pandas import concat

from apo_lora.report.runs import Run
from apo_lora.run.figures import PHASES


class Phase(NamedTuple):
    label: str
    seconds: float
    """Mean of a step."""
    share: float


class Cost(NamedTuple):
    phases: list[Phase]
    seconds: float
    """Mean of a step."""
    whole: str
    """Duration of all recorded steps of a run, as text; of several runs, the mean."""
    tokens_per_second: float
    """Sampled, mean over steps; NaN where it was not recorded."""
    peak_memory: str | None
    """GiB; of the GPU where there is one, else of the process."""

    @property
    def summary(self) -> str:
        return ", ".join(f"{phase.label} {100 * phase.share:.0f} %" for phase in self.phases)


def cost(runs: Sequence[Run]) -> Cost | None:
    """None where no step was timed."""
    steps = concat([run.steps for run in runs])
    timed = steps[steps["seconds"] > 0]
    if timed.empty:
        return None
    seconds = timed["seconds"].mean()
    spent = timed[[phase.name for phase in PHASES]].fillna(0.0).mean()
    shares = spent / (spent.sum() or 1.0)
    return Cost(
        phases=[Phase(phase.label, spent[phase.name], shares[phase.name]) for phase in PHASES],
        seconds=seconds,
        whole=duration(seconds * len(timed) / len(runs)),
        tokens_per_second=timed["tokens_per_second"].mean(),
        peak_memory=_peak_memory(steps["peak_memory_bytes"].max(), runs[0].environment.get("gpu")),
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _peak_memory(peak: float, gpu: dict | None) -> str | None:
    if peak != peak:  # NaN: never recorded
        return None
    return f"{peak / 2**30:.2f}" + (f" of {gpu['memory_bytes'] / 2**30:.1f}" if gpu else "")
