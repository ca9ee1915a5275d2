"""How long a run will take: said before it from a model of the card, and after its first steps from what they took."""

from collections.abc import Sequence
from statistics import median

MODELLED = {"colab_t4": (75, 95)}
"""Recipe to seconds per step at full completion length: what `apo-lora plan` models for a T4, and up to a quarter
more for what it leaves out. No card has measured them."""
MEASURED_STEPS = 3
"""After the first one, which is slower: what is compiled and loaded on first use."""


def expected(recipe: str, steps: int | None) -> list[str]:
    """A line where there is a model for the recipe."""
    if recipe not in MODELLED or not steps:
        return []
    low, high = MODELLED[recipe]
    return [
        f"Expected: {steps} steps of {low} to {high} s (modelled, not measured), so {duration(steps * low)} to "
        f"{duration(steps * high)}; the time that it takes here is shown after the first steps."
    ]


def remaining(seconds: Sequence[float], steps: int, last: int) -> str | None:
    """`seconds`: of each step of this process so far; `last`: of `steps`, the one that was done last.

    None until enough steps have been measured, and where little is left.
    """
    if len(seconds) <= MEASURED_STEPS or steps <= last:
        return None
    each = median(seconds[1:])
    return f"Measured: {each:.3g} s per step, so {duration(each * (steps - last))} for the other {steps - last} steps."


def duration(seconds: float) -> str:
    """`1 h 20 min`, `5 min` or `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 100 else f"{minutes} min"
