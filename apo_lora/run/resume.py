"""Where a run continues: from which checkpoint, whether it is still the same run, and where its record is cut off.

`--resume auto` is safe on every start: it continues a run, restarts one that was cut before its first checkpoint, and
starts one that does not exist yet.
"""

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apo_lora.errors import RunDirError
from apo_lora.recipe.files import load_recipe
from apo_lora.recipe.schema import Recipe, differences
from apo_lora.run.checkpoints import checkpoint_step, checkpoints_in, is_sealed, remove_checkpoint, why_not_whole
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl

# Keys that may differ when a run is continued: they change its length or what is shown, not what it computes.
FREE_ON_RESUME = (
    "train.max_steps", "train.epochs", "train.save_steps", "train.save_minutes", "train.keep_checkpoints",
    "train.evaluate", "train.eval_steps", "train.eval_items", "train.patience", "train.preflight", "output.",
)  # fmt: skip


def checkpoint_to_continue(run_dir: RunDir, recipe: Recipe, resume: str | None) -> Path | None:
    """The checkpoint to continue from; None to begin at step 1. Nothing is written. Raises RunDirError."""
    if resume is None:
        run_dir.refuse_existing()
        return None
    checkpoint = find_checkpoint(run_dir, resume)
    run_dir.require_readable_record()
    if checkpoint is not None:
        _refuse_steps_of_another_run(run_dir, checkpoint)
    if run_dir.recipe.exists():
        before = load_recipe(run_dir.recipe)
        _refuse_another_recipe(run_dir, before, recipe)
        last_step = run_dir.last_metrics().get("step", 0)
        if checkpoint is None and last_step > before.train.save_steps:
            raise RunDirError(
                f"--resume auto: {run_dir.path} has recorded {last_step} steps but no longer contains a checkpoint; "
                "restore one, or start a new run with output.dir=DIR and without --resume"
            )
    elif checkpoint is not None:
        raise RunDirError(f"--resume: {run_dir.recipe} is missing, the recipe of {checkpoint}; restore it")
    return checkpoint


def of_its_run(recipe: Recipe, path: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe that was read from a run directory, with that as its output.dir: the folder may have been renamed since.

    Unless `overrides` (section.key=value) name another.
    """
    is_in_run = path.name == "recipe.yaml" and (path.parent / "checkpoints").is_dir()
    is_named = any(text.startswith("output.dir=") for text in overrides)
    return recipe.in_run_dir(path.parent) if is_in_run and not is_named else recipe


def find_checkpoint(run_dir: RunDir, wanted: str) -> Path | None:
    """`auto` is the last whole one, or None for a run that was cut before its first; otherwise a checkpoint's path.

    Raises RunDirError, for instance where a checkpoint was there and is damaged: the run is not started over.
    """
    if wanted != "auto":
        path = Path(wanted)
        if fault := why_not_whole(path):
            raise RunDirError(f"--resume {wanted}: not a complete checkpoint ({fault}); try --resume auto")
        if path.resolve().parent != run_dir.checkpoints.resolve():
            raise RunDirError(
                f"--resume {wanted}: not a checkpoint of {run_dir.path}, whose record would be cut to it; give "
                "output.dir=DIR of the run that the checkpoint belongs to"
            )
        return path
    if run_dir.path.is_file():
        raise RunDirError(f"output.dir: {run_dir.path} is a file; choose another with output.dir=DIR")
    faults = {path: why_not_whole(path) for path in checkpoints_in(run_dir.checkpoints)}
    if whole := [path for path, fault in faults.items() if fault is None]:
        return whole[-1]
    damaged = [fault for path, fault in faults.items() if is_sealed(path)]
    if damaged or run_dir.adapter.exists():
        raise RunDirError(
            f"--resume auto: {run_dir.path} no longer contains a complete checkpoint; restore one, or start a new run "
            "with output.dir=DIR and without --resume",
            *damaged,
        )
    if not run_dir.is_absent() and not run_dir.checkpoints.is_dir():
        raise RunDirError(
            f"--resume auto: {run_dir.path} contains other files but no run; choose another folder with output.dir=DIR"
        )
    return None


def _refuse_steps_of_another_run(run_dir: RunDir, checkpoint: Path) -> None:
    """A checkpoint repeats the figures of its last steps: those of a run that it was copied from are not on record."""
    try:
        history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    steps = {row["step"]: row for row in history if "reward" in row}
    for row in read_jsonl(run_dir.metrics) if run_dir.metrics.exists() else ():
        there = steps.get(row["step"], row)
        if any(repr(row.get(name)) != repr(there.get(name)) for name in _TELLING):
            raise RunDirError(
                f"--resume: {checkpoint} was saved by another run: its step {row['step']} is not the one in "
                f"{run_dir.metrics}; move it away, or restore the record that belongs to it"
            )


_TELLING = ("reward", "length", "kl")
"""Figures that two runs do not share at every step."""


def _refuse_another_recipe(run_dir: RunDir, before: Recipe, now: Recipe) -> None:
    changed = [
        f"{key}: {there!r} in the run, {here!r} now"
        for key, (there, here) in differences(before, now).items()
        if not key.startswith(FREE_ON_RESUME)
    ]
    if changed:
        raise RunDirError(
            f"--resume: {run_dir.path} was trained with another recipe; give the same values, or start a new run with "
            "output.dir=DIR",
            *changed,
        )


def rewind_record(run_dir: RunDir, checkpoint: Path | None) -> Iterator[str]:
    """Rewinds the run's record to the checkpoint, or restarts it; yields messages for the user."""
    run_dir.remove_temporaries()
    for path in checkpoints_in(run_dir.checkpoints):
        if fault := why_not_whole(path):
            shutil.rmtree(path)
            yield f"{path.name} is removed: {fault}."
    if checkpoint is None:
        yield f"No checkpoint in {run_dir.path} yet: starting at step 1."
        run_dir.start_again()
        return
    step = checkpoint_step(checkpoint)
    for later in checkpoints_in(run_dir.checkpoints):
        if checkpoint_step(later) > step:
            remove_checkpoint(later)
            yield f"{later.name} is removed: its steps are run again."
    run_dir.rewind(step)
    yield f"Continuing from {checkpoint}."


def environment_changes(run_dir: RunDir, now: Mapping[str, Any]) -> Iterator[str]:
    """One line on what differs from the machine and versions so far (environment.json), and what that means."""
    try:
        before = json.loads(run_dir.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    there, here = _facts(before), _facts(now)
    changed = [
        f"{name} from {value} to {here.get(name, 'none')}" for name, value in there.items() if value != here.get(name)
    ]
    if changed:
        yield (
            f"Changed since the run started: {'; '.join(changed)}. Rounding and random numbers may differ, so the run "
            "continues, but not bit for bit as it would have."
        )


def _facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What was recorded of all that changes rounding or random numbers, by name."""
    device = (environment.get("gpu") or {}).get("name", "CPU")
    facts = {"processes": environment.get("processes"), "engine": environment.get("engine"), "device": device}
    return {name: fact for name, fact in {**facts, **environment.get("packages", {})}.items() if fact is not None}


@contextmanager
def only_plain_data(checkpoint: Path | None) -> Iterator[None]:
    """A checkpoint's optimizer and random state are unpickled as plain tensors only; anything else is refused."""
    try:
        yield
    except pickle.UnpicklingError:
        raise RunDirError(
            f"--resume {checkpoint}: contains objects other than numbers and tensors, none of which were loaded; "
            "resume one of your own checkpoints, or start a new run"
        ) from None
