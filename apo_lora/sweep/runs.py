"""The state of an experiment's runs: finished, unfinished, absent, or another run in their folder."""

import json
import shutil
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from apo_lora.errors import RecipeError, RunDirError
from apo_lora.recipe.files import load_recipe
from apo_lora.recipe.schema import differences
from apo_lora.run.directory import RunDir
from apo_lora.run.files import locked
from apo_lora.sweep.experiment import PlannedRun


class State(Enum):
    ABSENT = "to run"
    HALF_DONE = "to continue"
    FINISHED = "done"


def state_of(run: PlannedRun) -> State:
    """Raises RunDirError if the folder holds something that is not this run."""
    run_dir = RunDir(run.path)
    if not run.path.exists() or (run.path.is_dir() and not any(run.path.iterdir())):
        return State.ABSENT
    if not run_dir.recipe.is_file():
        raise RunDirError(f"{run.path}: is not a run of this sweep; move it away, or use another folder with --out DIR")
    try:
        there = load_recipe(run_dir.recipe)
    except RecipeError as error:
        raise RunDirError(f"{run.path}: its recipe cannot be read ({error.problems[0]}); move it away") from None
    changed = {key: values for key, values in differences(there, run.recipe).items() if key != "output.dir"}
    if changed:
        was = "; ".join(f"{key} was {before!r} and is {after!r} now" for key, (before, after) in changed.items())
        raise RunDirError(
            f"{run.path}: was trained with another recipe ({was}); use another --out DIR, or remove that folder"
        )
    return State.FINISHED if is_finished(run_dir) else State.HALF_DONE


def is_finished(run_dir: RunDir) -> bool:
    """The model card is written last, and also by a run that stopped itself, which has no evaluation after training."""
    return run_dir.model_card.is_file() and "after" in json.loads(run_dir.evaluation.read_text(encoding="utf-8"))


def states(runs: Iterable[PlannedRun]) -> dict[PlannedRun, State]:
    """Of all runs. Raises RunDirError with one line per folder that is in the way."""
    found, problems = {}, []
    for run in runs:
        try:
            found[run] = state_of(run)
        except RunDirError as error:
            problems += error.problems
    if problems:
        raise RunDirError(*problems)
    return found


def steps_done(run: PlannedRun) -> int:
    """Optimizer steps on record; 0 where there is no record yet."""
    try:
        with RunDir(run.path).metrics.open("rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


def ready_to_resume(run: PlannedRun) -> bool:
    """Whether a half-done run can be continued. One that has no whole checkpoint is cleared away, to start again."""
    run_dir = RunDir(run.path)
    if run_dir.valid_checkpoints():
        return True
    with locked(run.path):
        shutil.rmtree(run.path)
    return False


def log_file(out: Path, run: PlannedRun) -> Path:
    return out / "logs" / f"{run.variant}-{run.seed}.log"
