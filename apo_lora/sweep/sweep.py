"""`apo-lora sweep`: the runs of an experiment that are still to be made, then what all of them say."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from apo_lora.errors import RecipeError
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl, read_jsonl, write_atomically, write_json
from apo_lora.sweep.experiment import Experiment, PlannedRun, find_experiment, load_experiment, plan_runs
from apo_lora.sweep.figures import FIGURES, Record, figures_before, figures_of, read_record
from apo_lora.sweep.findings import Estimate, compare, mean_over_seeds
from apo_lora.sweep.queue import Outcome, run_all
from apo_lora.sweep.runs import State, is_finished, states, steps_done
from apo_lora.sweep.tables import closing_words, report


def sweep(
    name: str,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    jobs: int | None = None,
    seeds: tuple[int, ...] | None = None,
    dry_run: bool = False,
) -> int:
    """Runs the experiment into `out` (default runs/NAME) and writes sweep.json, README.md and sweep.png there.

    `jobs` runs at once; none is one per core without a GPU, and one with a GPU. `seeds` replace the file's.
    Finished runs are left as they are, half-done ones continued. Returns 0, or 1 where a run failed. Raises UserError
    before anything is written if the file, a recipe or a folder is not as it should be.
    """
    path = find_experiment(name)
    experiment = load_experiment(path)
    if seeds:
        experiment = experiment.model_copy(update={"seeds": seeds})
    out = out or Path("runs") / path.stem
    planned = plan_runs(path, experiment, out, overrides)
    if unbounded := [run for run in planned if run.recipe.train.max_steps is None]:
        raise RecipeError(f"{path.name}: {unbounded[0].variant}: train.max_steps: give the steps of a run, not epochs")
    found = states(planned)
    pending = [run for run in planned if found[run] is not State.FINISHED]
    jobs = min(jobs or default_jobs(), max(1, len(pending)))
    print(_plan(path.stem, experiment, out, planned, found, jobs), flush=True)
    if dry_run:
        width = max(len(str(run)) for run in planned)
        print("\n".join(f"  {str(run):<{width}}  {found[run].value}" for run in planned))
        print("Dry run: nothing was written.")
        return 0

    out.mkdir(parents=True, exist_ok=True)
    failed = _run(pending, planned, experiment, out, jobs) if pending else []
    findings = write_findings(path.stem, experiment, planned, out, overrides)
    if findings:
        print(f"\n{closing_words(findings)}\n")
        print(f"Written      {out / 'README.md'}, {out / 'sweep.json'}, {out / 'sweep.png'}")
        print(f"As a page    apo-lora report {out}/*/seed-*")
    if failed:
        lines = [f"  {outcome.run}: {outcome.reason}" for outcome in failed]
        remedy = f"The logs are in {out / 'logs'}; the same command tries these again."
        print("\n".join([f"{len(failed)} of {len(planned)} runs failed:", *lines, remedy]), file=sys.stderr)
    return 1 if failed else 0


def default_jobs() -> int:
    """Several tiny models with a thread each are faster than one with all threads; a GPU is for one run."""
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def _plan(
    name: str,
    experiment: Experiment,
    out: Path,
    planned: Sequence[PlannedRun],
    found: dict[PlannedRun, State],
    jobs: int,
) -> str:
    count = {state: sum(value is state for value in found.values()) for state in State}
    words = ", ".join(f"{number} {state.value}" for state, number in count.items() if number)
    known = [spent["seconds"] for spent in spent_by_run(out).values()]
    one = sum(known) / len(known) if known else experiment.seconds_per_run
    left = sum(count[state] for state in (State.ABSENT, State.HALF_DONE))
    estimate = f"; about {left * one / jobs / 60:.0f} minutes" if one and left else ""
    size = f"{len(experiment.variants)} variants x {len(experiment.seeds)} seeds = {len(planned)} runs"
    return f"{name}: {size} into {out}: {words}; {jobs} at once{estimate}"


def _run(
    pending: Sequence[PlannedRun], planned: Sequence[PlannedRun], experiment: Experiment, out: Path, jobs: int
) -> list[Outcome]:
    """Runs what is pending under one progress bar. Returns what failed."""
    failed = []
    total = sum(run.recipe.train.max_steps for run in planned)
    bar = tqdm(total=total, desc="sweep", unit="step", initial=total_steps(planned), smoothing=0.02)

    def on_poll() -> None:
        bar.update(total_steps(planned) - bar.n)

    def on_end(outcome: Outcome) -> None:
        on_poll()
        run = {"variant": outcome.run.variant, "seed": outcome.run.seed}
        spent = {"seconds": round(outcome.seconds, 2), "cpu_seconds": round(outcome.cpu_seconds, 2)}
        append_jsonl(_journal(out), [{**run, **spent, "finished": outcome.finished, "ended": _now()}])
        if outcome.finished:
            figures = figures_of(read_record(RunDir(outcome.run.path)), experiment.final_steps)
            tail = f"accuracy {figures['accuracy']:.3f}" if figures["accuracy"] is not None else "done"
        else:
            failed.append(outcome)
            tail = outcome.reason
        done = sum(is_finished(RunDir(each.path)) for each in planned)
        bar.write(f"{outcome.run}: {outcome.seconds:.0f} s, {tail} ({done} of {len(planned)} runs done)")

    with bar:
        run_all(pending, out, jobs, on_end, on_poll)
    return failed


def total_steps(planned: Sequence[PlannedRun]) -> int:
    return sum(steps_done(run) for run in planned)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _journal(out: Path) -> Path:
    return out / "logs" / "children.jsonl"


def spent_by_run(out: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Wall clock and CPU seconds of each finished run, its interrupted parts added up."""
    spent: dict[tuple[str, int], dict[str, float]] = {}
    finished = set()
    for row in read_jsonl(_journal(out)) if _journal(out).exists() else ():
        key = row["variant"], row["seed"]
        total = spent.setdefault(key, {"seconds": 0.0, "cpu_seconds": 0.0})
        for name in total:
            total[name] += row[name]
        finished |= {key} if row["finished"] else set()
    return {key: total for key, total in spent.items() if key in finished}


def write_findings(
    name: str, experiment: Experiment, planned: Sequence[PlannedRun], out: Path, overrides: Sequence[str] = ()
) -> dict[str, Any] | None:
    """sweep.json, README.md and sweep.png from the runs that are finished. Returns sweep.json; None if none is."""
    from apo_lora.sweep.picture import draw

    records: dict[str, dict[int, Record]] = {variant: {} for variant in experiment.variants}
    for run in planned:
        if is_finished(RunDir(run.path)):
            records[run.variant][run.seed] = read_record(RunDir(run.path))
    first = next((run for run in planned if run.seed in records[run.variant]), None)
    if first is None:
        return None
    spent = spent_by_run(out)
    findings = {
        "experiment": name,
        "date": _now(),
        "cpu_cores": os.cpu_count(),
        "environment": json.loads(RunDir(first.path).environment.read_text()),
        "overrides": list(overrides),
        "variants": {variant: changes or {} for variant, changes in experiment.variants.items()},
        "baseline": next(iter(experiment.variants)),
        "seeds": list(experiment.seeds),
        "final_steps": experiment.final_steps,
        "recipe": _without_own_keys(planned[0]),
        "figures": _findings(records, experiment),
        "runs": [
            {
                "variant": run.variant,
                "seed": run.seed,
                "finished": run.seed in records[run.variant],
                **spent.get((run.variant, run.seed), {"seconds": None, "cpu_seconds": None}),
            }
            for run in planned
        ],
    }
    write_json(out / "sweep.json", findings)
    write_atomically(out / "README.md", report(findings))
    draw(records, findings, out / "sweep.png")
    return findings


def _without_own_keys(run: PlannedRun) -> dict[str, Any]:
    """The baseline's resolved recipe, less what differs from run to run."""
    tree = run.recipe.model_dump(mode="json")
    del tree["train"]["seed"], tree["output"]["dir"]
    return tree


def _findings(records: dict[str, dict[int, Record]], experiment: Experiment) -> dict[str, Any]:
    """Figure's key to its base value, the variants' means and the differences to the first of them."""
    baseline = next(iter(records))
    values = {
        variant: {seed: figures_of(record, experiment.final_steps) for seed, record in by_seed.items()}
        for variant, by_seed in records.items()
    }
    # All variants start from the same base, seed by seed.
    starts = {seed: figures_before(record) for by_seed in records.values() for seed, record in by_seed.items()}
    found = {}
    for figure in FIGURES:
        of_figure = {v: {seed: row[figure.key] for seed, row in by_seed.items()} for v, by_seed in values.items()}
        means, differences = compare(of_figure, baseline)
        before = mean_over_seeds([start[figure.key] for start in starts.values() if start[figure.key] is not None])
        found[figure.key] = {
            "title": figure.title,
            "unit": figure.unit,
            "before": _plain(before),
            "variants": {v: _plain(mean, by_seed=of_figure[v]) for v, mean in means.items()},
            "differences": {v: _plain(difference) for v, difference in differences.items()},
        }
    return found


def _plain(estimate: Estimate | None, **more: Any) -> dict[str, Any] | None:
    return None if estimate is None else {**asdict(estimate), "excludes_zero": estimate.excludes_zero, **more}
