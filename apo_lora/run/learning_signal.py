"""Whether a run has something to learn from: groups whose completions earn different rewards. No torch."""

from collections.abc import Mapping
from typing import NamedTuple

from pandas import DataFrame

from apo_lora.run.figures import ALARM_SHARE

SIGNAL_ALARM_STEPS = 10
"""Steps in a row with little reward variance, or mostly truncated, before the screen warns."""

StepFigures = Mapping[str, float | None]


def is_without_signal(figures: StepFigures) -> bool:
    """Of one step: most groups have no reward variance."""
    return (figures.get("zero_variance_groups") or 0.0) > ALARM_SHARE


def no_signal_warning(figures: StepFigures) -> str:
    return (
        f"warning: for {SIGNAL_ALARM_STEPS} steps most groups have had no reward variance, so they teach nothing. "
        + remedy(figures)
    )


def remedy(figures: StepFigures) -> str:
    """What to do when most groups are uniform, which depends on whether they are right or wrong."""
    if (figures.get("all_right_groups") or 0.0) >= (figures.get("all_wrong_groups") or 0.0):
        return "Their completions are all right: the data is now too easy. Stop here, or use harder data."
    return (
        "Their completions are all wrong: the data is too hard, answers are cut, or right answers are scored as wrong. "
        "Run `apo-lora check-rewards`, look at completions.jsonl, or use easier data."
    )


class Verdict(NamedTuple):
    level: str
    """`enough`, `came back`, `gone`, or `unknown` where no step was recorded."""
    text: str


def verdict(steps: DataFrame) -> Verdict:
    """By the same alarm that the screen shows during training. `steps` as curves.read_steps gives them."""
    if steps.empty:
        return Verdict("unknown", "No step has been recorded.")
    uniform = steps["zero_variance_groups"].fillna(0.0)
    recent = uniform.tail(SIGNAL_ALARM_STEPS)
    share = 100 * (1 - recent.mean())
    now = f"in the last {len(recent)} steps, {share:.0f} % of the groups had reward variance"
    is_without = uniform > ALARM_SHARE
    stretch = (is_without != is_without.shift()).cumsum()[is_without]
    long = [steps.index for _, steps in stretch.groupby(stretch) if len(steps) >= SIGNAL_ALARM_STEPS]
    if not long:
        return Verdict("enough", f"Enough learning signal throughout: {now}.")
    first, last = long[-1][0], long[-1][-1]
    when = f"from step {first} to {last}, most groups had no reward variance"
    if last == steps.index[-1]:
        return Verdict("gone", f"Little learning signal at the end: {when}. {remedy(steps.iloc[-1])}")
    return Verdict("came back", f"Little learning signal for a while: {when}; {now}.")
