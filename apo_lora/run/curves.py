"""A figure over optimizer steps: of one run as measured and as a running mean, of several as a mean with a band."""

from collections.abc import Sequence

import numpy
from pandas import DataFrame, Series, concat, to_numeric

from apo_lora.run.directory import RunDir
from apo_lora.run.figures import FIGURES, PER_STEP, VALIDATION
from apo_lora.run.files import read_jsonl

WINDOW = 5
"""Steps of the running mean."""


def read_steps(run_dir: RunDir) -> DataFrame:
    """metrics.jsonl: a row per step, a column of numbers per figure; NaN for what is absent or not finite.

    Of a step that is there twice the later record counts.
    """
    rows = read_jsonl(run_dir.metrics) if run_dir.metrics.is_file() else ()
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    steps = DataFrame(rows).apply(to_numeric, errors="coerce").replace([numpy.inf, -numpy.inf], numpy.nan)
    names = dict.fromkeys(["step", *(figure.name for figure in (*PER_STEP, *VALIDATION)), *steps.columns])
    steps = steps.reindex(columns=list(names)).astype({"step": int})
    return steps.drop_duplicates("step", keep="last").set_index("step").sort_index()


def figure_curve(runs: Sequence[DataFrame], name: str) -> DataFrame:
    """A figure's `curve` over the runs' steps. One with an interval is measured at some steps only: it is not smoothed,
    and of a single run `low` and `high` are that interval."""
    low, high = f"{name}_low", f"{name}_high"
    if low not in FIGURES:
        return curve([steps[name] for steps in runs])
    measured = [part for steps in runs if len(part := steps[[name, low, high]].dropna())]
    if len(measured) == 1:
        return measured[0].set_axis(["mean", "low", "high"], axis=1)
    means = concat([part[name] for part in measured], axis=1, join="inner") if measured else DataFrame()
    return DataFrame({"mean": means.mean(axis=1), "low": means.min(axis=1), "high": means.max(axis=1)})


def curve(runs: Sequence[Series]) -> DataFrame:
    """By step `mean` with, of one run, `raw`; of several runs, `low` and `high`. NaN is a gap.

    `mean` is the running mean of the last WINDOW steps, over those of them that have a value. Of several runs it is the
    mean of theirs, as far as every run has come; one that never has a value does not count.
    """
    measured = [values for values in runs if values.notna().any()]
    if not measured:
        return DataFrame({"mean": [], "raw": []})
    means = concat([values.rolling(WINDOW, min_periods=1).mean() for values in measured], axis=1, join="inner")
    if len(measured) == 1:
        return DataFrame({"mean": means.iloc[:, 0], "raw": measured[0]})
    over = {"axis": 1, "skipna": False}
    return DataFrame({"mean": means.mean(**over), "low": means.min(**over), "high": means.max(**over)})


def thinned(curve: DataFrame, most: int = 240) -> DataFrame:
    """At most as many rows as a small chart has pixels: the last value of each stretch of steps; a gap only where a
    whole stretch has none."""
    stretch = numpy.arange(len(curve)) // max(1, -(-len(curve) // most))
    return curve.groupby(stretch).last().set_axis(curve.index.to_series().groupby(stretch).last())
