"""A metric over optimizer steps: of one run as measured and as a running mean, of several as a mean with a band."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from apo_lora.report.runs import Run

WINDOW = 5
"""Steps of the running mean."""
MOST_POINTS = 240
"""A panel is about that many pixels wide."""

Points = list[tuple[float, float]]
"""(step, value)"""


@dataclass(frozen=True)
class Curve:
    """Lists of unbroken stretches: a step without a value is a gap."""

    line: list[Points]
    """The running mean; of several runs, the mean of their running means."""
    band: list[list[tuple[float, float, float]]] = field(default_factory=list)
    """(step, lowest, highest) of several runs' running means."""
    raw: list[Points] = field(default_factory=list)
    """As measured, of a single run."""

    @property
    def values(self) -> list[float]:
        """All that is drawn, to find the axis."""
        drawn = [value for stretch in (*self.line, *self.raw) for _, value in stretch]
        return drawn + [value for stretch in self.band for _, *ends in stretch for value in ends]

    @property
    def ends(self) -> tuple[float, float] | None:
        """First and last value of the line."""
        return (self.line[0][0][1], self.line[-1][-1][1]) if self.line else None


def curve(runs: Sequence[Run], metric: str) -> Curve:
    """Of several runs only the steps that all of them have: a mean over fewer would jump where a run ends.

    A run that never has a value does not count.
    """
    measured = [values for run in runs if (values := run.values(metric))]
    if not measured:
        return Curve([])
    means, chunks = [running_mean(values) for values in measured], _chunks(runs)
    shared = {step: [mean[step] for mean in means] for step in set.intersection(*map(set, means))}
    line = _stretches({step: (sum(values) / len(values),) for step, values in shared.items()}, chunks)
    if len(measured) > 1:
        return Curve(line, band=_stretches({step: (min(v), max(v)) for step, v in shared.items()}, chunks))
    return Curve(line, raw=_stretches({step: (value,) for step, value in measured[0].items()}, chunks))


def last_value(runs: Sequence[Run], metric: str) -> list[float]:
    """The last running mean of each run that has one."""
    means = [running_mean(run.values(metric)) for run in runs]
    return [mean[max(mean)] for mean in means if mean]


def running_mean(values: dict[int, float], window: int = WINDOW) -> dict[int, float]:
    """Over the steps up to each that lie within the window and have a value; only at steps that have one."""
    means = {}
    for step in values:
        inside = [values[s] for s in range(step - window + 1, step + 1) if s in values]
        means[step] = sum(inside) / len(inside)
    return means


def _chunks(runs: Sequence[Run]) -> list[list[int]]:
    """Every recorded step, in as many chunks as a panel can show."""
    steps = sorted({row["step"] for run in runs for row in run.steps})
    size = -(-len(steps) // MOST_POINTS)
    return [steps[start : start + size] for start in range(0, len(steps), size or 1)]


def _stretches(values: dict[int, tuple[float, ...]], chunks: Sequence[Sequence[int]]) -> list[list[tuple]]:
    """Of each chunk the last step that has a value; a chunk without one is a gap."""
    stretches: list[list[tuple]] = [[]]
    for chunk in chunks:
        step = next((step for step in reversed(chunk) if step in values), None)
        if step is not None:
            stretches[-1].append((step, *values[step]))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]
