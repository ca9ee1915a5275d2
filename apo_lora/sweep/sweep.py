"""`apo-lora sweep`: runs what is left of an experiment, then compares all of its runs."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from apo_lora.errors import RecipeError
from apo_lora.machine.paths import as_word
from apo_lora.report.comparison import COMPARED, value
from apo_lora.report.runs import read_run
from apo_lora.run.directory import RunDir
from apo_lora.run.figures import format_figure
from apo_lora.sweep.experiment import Experiment, PlannedRun, find_experiment, load_experiment, plan_runs
from apo_lora.sweep.findings import closing_summary, record_child, spent_by_run, write_findings
from apo_lora.sweep.runs import Outcome, State, is_finished, run_all, states, steps_done


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
    Finished runs are kept, unfinished ones are continued. Returns 0, or 1 where a run failed. Raises UserError
    before anything is written if the file, a recipe or a folder is not valid.
    """
    path = find_experiment(name)
    experiment = load_experiment(path)
    if seeds:
        experiment = experiment.model_copy(update={"seeds": seeds})
    out = out or Path("runs") / path.stem
    planned = plan_runs(path, experiment, out, overrides)
    if unbounded := [run for run in planned if run.recipe.train.max_steps is None]:
        raise RecipeError(
            f"{path.name}: {unbounded[0].variant}: train.max_steps: must be set; a sweep needs steps, not epochs"
        )
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
        print(f"\n{closing_summary(findings)}\n")
        print(f"Results      {out / 'README.md'}, {out / 'sweep.json'}, {out / 'sweep.png'}")
        print(f"Report       apo-lora report {as_word(out)}/*/seed-*")
    if failed:
        lines = [f"  {outcome.run}: {outcome.reason}" for outcome in failed]
        remedy = f"The logs are in {out / 'logs'}; run the same command to try these again."
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
        record_child(out, outcome)
        if outcome.finished:
            accuracy = value(read_run(outcome.run.path), COMPARED[0], "after", experiment.final_steps)
            tail = f"accuracy {format_figure('accuracy', accuracy)}"
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
