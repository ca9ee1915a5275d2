"""Whether a run has something to learn from: groups whose completions earn different rewards. No torch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

SIGNAL_ALARM_STEPS = 10
"""Steps in a row with little reward variance, or mostly truncated, before a word is said."""

ALARM_SHARE = 0.5
"""Of the groups without reward variance, or of the completions that were truncated: more than that is too many."""

Figures = Mapping[str, float | None]


def is_without_signal(figures: Figures) -> bool:
    """Of one step: most groups have no reward variance."""
    return (figures.get("zero_variance_groups") or 0.0) > ALARM_SHARE


def no_signal_warning(figures: Figures) -> str:
    """What to do when most groups are all alike, which depends on which way they are alike."""
    start = f"warning: most groups have had no reward variance for {SIGNAL_ALARM_STEPS} steps, so they teach nothing. "
    return start + remedy(figures)


def remedy(figures: Figures) -> str:
    if (figures.get("all_right_groups") or 0.0) >= (figures.get("all_wrong_groups") or 0.0):
        return "They are all right: the data is too easy by now. Stop here, or use harder data."
    return (
        "They are all wrong: the data is too hard, answers are cut, or right answers are scored wrong. "
        "Run `apo-lora check-rewards`, look at completions.jsonl, or use easier data."
    )


class Verdict(NamedTuple):
    level: str
    """`enough`, `came back`, `gone`, or `unknown` where no step was recorded."""
    words: str


def verdict(steps: Sequence[Figures]) -> Verdict:
    """In plain words, by the alarm that the screen raises during training. `steps` are rows of metrics.jsonl."""
    if not steps:
        return Verdict("unknown", "No step was recorded.")
    stretches = [(first, last) for first, last in _stretches(steps) if last - first + 1 >= SIGNAL_ALARM_STEPS]
    recent = steps[-SIGNAL_ALARM_STEPS:]
    share = 1.0 - sum(row.get("zero_variance_groups") or 0.0 for row in recent) / len(recent)
    now = f"in the last {len(recent)} steps, {100 * share:.0f} % of the groups had reward variance"
    if not stretches:
        return Verdict("enough", f"Enough to learn from all the way: {now}.")
    first, last = stretches[-1]
    when = f"from step {steps[first]['step']} to {steps[last]['step']}, most groups had no reward variance"
    if last == len(steps) - 1:
        return Verdict("gone", f"Little to learn from at the end: {when}. {remedy(steps[-1])}")
    return Verdict("came back", f"A stretch with little to learn from: {when}; {now}.")


def _stretches(steps: Sequence[Figures]) -> list[tuple[int, int]]:
    """(first, last) places of the longest possible runs of steps without signal."""
    found: list[tuple[int, int]] = []
    for place, figures in enumerate(steps):
        if not is_without_signal(figures):
            continue
        if found and found[-1][1] == place - 1:
            found[-1] = (found[-1][0], place)
        else:
            found.append((place, place))
    return found
