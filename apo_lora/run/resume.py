"""Where a run goes on: which checkpoint, whether this is still the same run, and what its record is taken back to.

`--resume auto` is safe to write on every start: it continues a run, starts one that was cut before its first checkpoint
over, and begins one that is not there.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apo_lora.errors import RunDirError
from apo_lora.recipe.files import load_recipe
from apo_lora.recipe.schema import Recipe, differences
from apo_lora.run.directory import RunDir, checkpoint_step, read_jsonl

# Keys that may differ when a run is continued: they change how long it goes on or what is shown, not what it computes.
FREE_ON_RESUME = (
    "train.max_steps", "train.epochs", "train.save_steps", "train.save_minutes", "train.keep_checkpoints",
    "train.evaluate", "train.preflight", "output.",
)  # fmt: skip


def checkpoint_to_continue(run_dir: RunDir, recipe: Recipe, resume: str | None) -> Path | None:
    """The checkpoint to continue from; None to begin at step 1. Nothing is written. Raises RunDirError."""
    if resume is None:
        run_dir.refuse_existing()
        return None
    checkpoint = run_dir.checkpoint_to_resume(resume)
    if run_dir.recipe.exists():
        before = load_recipe(run_dir.recipe)
        _refuse_another_recipe(run_dir, before, recipe)
        if checkpoint is None and _last_step(run_dir) > before.train.save_steps:
            raise RunDirError(
                f"--resume auto: {run_dir.path} has recorded {_last_step(run_dir)} steps and holds no checkpoint any "
                "more; bring one back, or start a new run with output.dir=DIR and without --resume"
            )
    elif checkpoint is not None:
        raise RunDirError(f"--resume: {run_dir.recipe} is missing, which says how {checkpoint} was made; bring it back")
    return checkpoint


def _refuse_another_recipe(run_dir: RunDir, before: Recipe, now: Recipe) -> None:
    changed = [
        f"{key}: {there!r} there, {here!r} now"
        for key, (there, here) in differences(before, now).items()
        if not key.startswith(FREE_ON_RESUME)
    ]
    if changed:
        raise RunDirError(
            f"--resume: {run_dir.path} was made by another recipe; give the same values, or start a new run with "
            "output.dir=DIR",
            *changed,
        )


def _last_step(run_dir: RunDir) -> int:
    rows = read_jsonl(run_dir.metrics) if run_dir.metrics.exists() else ()
    return max((row["step"] for row in rows), default=0)


def take_back(run_dir: RunDir, checkpoint: Path | None) -> Iterator[str]:
    """Takes the run's record back to the checkpoint, or to its start; yields what to say of it."""
    run_dir.remove_temporaries()
    for name, fault in run_dir.remove_all_but_whole_checkpoints().items():
        yield f"{name} is left out: {fault}."
    if checkpoint is None:
        yield f"No checkpoint in {run_dir.path} yet: starting at step 1."
        run_dir.start_again()
        return
    step = checkpoint_step(checkpoint)
    for later in run_dir.remove_later_checkpoints(step):
        yield f"{later.name} is removed: its steps are made again."
    run_dir.rewind(step)
    yield f"Continuing from {checkpoint}."


# --- another place ---------------------------------------------------------------------------------------------------


def changes_of_place(run_dir: RunDir, now: Mapping[str, Any]) -> Iterator[str]:
    """What is different from where the run was until now (environment.json), and what that means; one line each."""
    try:
        before = json.loads(run_dir.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if before.get("processes", now["processes"]) != now["processes"]:
        yield (
            f"changed: {before['processes']} processes until now, {now['processes']} from here. The recipe's step and "
            "its gradient are the same; completions are drawn from other random numbers."
        )
    if before.get("engine", now["engine"]) != now["engine"]:
        yield (
            f"changed: engine {before['engine']} until now, {now['engine']} from here. The same adapter goes on; "
            "kernels round otherwise and draw other random numbers."
        )
    rounds_otherwise = [
        f"{name} {there} until now, {here}"
        for name, there, here in (
            ("device", _device(before), _device(now)),
            *((name, before.get("packages", {}).get(name), now["packages"].get(name)) for name in now["packages"]),
        )
        if there is not None and there != here
    ]
    if rounds_otherwise:
        yield f"changed: {'; '.join(rounds_otherwise)}. The run goes on, and is not to the bit what it would have been."


def _device(environment: Mapping[str, Any]) -> str:
    return (environment.get("gpu") or {}).get("name", "CPU")
