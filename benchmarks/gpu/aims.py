"""What we want of ours beside its peers on a GPU, as ratios: aims that a measurement meets or misses.

Of several settings on a side, the best one for that figure counts: every peer at its best.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Measured = dict[str, Any]

OURS = ("peers/ours-group", "peers/ours-row")
UNSLOTH, TRL = ("peers/unsloth-default", "peers/unsloth-thriftiest"), ("peers/trl-group", "peers/trl-row")


def score_and_train(measured: Measured) -> float:
    """Seconds of a step."""
    return measured["seconds"]["score"] + measured["seconds"]["train"]


def peak(measured: Measured) -> float | None:
    """Bytes; None where nothing could be measured."""
    return measured["peak_bytes_of_step"]


class Aim(NamedTuple):
    words: str
    figure: Callable[[Measured], float | None]
    theirs: tuple[str, ...]
    at_most: float


AIMS = (
    Aim("seconds of score + train, to stock Unsloth", score_and_train, UNSLOTH, 0.5),
    Aim("seconds of score + train, to stock TRL", score_and_train, TRL, 0.5),
    Aim("peak memory, to stock Unsloth at its default", peak, UNSLOTH[:1], 0.5),
    Aim("peak memory, to stock Unsloth at its thriftiest", peak, UNSLOTH[1:], 0.85),
    Aim("peak memory, to stock TRL with the group at once", peak, TRL[:1], 0.5),
    Aim("peak memory, to stock TRL row by row", peak, TRL[1:], 0.85),
)


def ratios(results: dict[str, Measured]) -> Iterator[tuple[Aim, float]]:
    """Each aim that can be judged by what was measured, with ours over theirs."""
    for aim in AIMS:
        ours, theirs = (_best(results, names, aim.figure) for names in (OURS, aim.theirs))
        if ours and theirs:
            yield aim, ours / theirs


def _best(results: dict[str, Measured], names: tuple[str, ...], figure: Callable) -> float | None:
    measured = [results[name] for name in names if "seconds" in results.get(name, {})]
    return min((value for found in measured if (value := figure(found))), default=None)
