"""What the shipped recipes take on cards of their size: memory and time by phase, and memory against the plan."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from apo_lora.family.lookup import find_shape
from apo_lora.preflight.memory_plan import Plan, plan
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.recipes import trained_recipe
from apo_lora.trainer import APOTrainer
from benchmarks.gpu.card import pretend_card
from benchmarks.gpu.measurements import Setting
from benchmarks.gpu.phase_clock import PhaseClock
from benchmarks.gpu.record import Record
from benchmarks.gpu.watch import bases, is_rewritten, train_in_any_case, watched_training
from benchmarks.gpu.work import full_length_only, recipe_on_random_model

TOLERANCE = 0.15
"""How far a measured peak may be from the planned one."""


def measure(record: Record, setting: Setting, name: str, card: float, overrides: Sequence[str] = ()) -> None:
    run = f"recipe-{name}"
    shutil.rmtree(setting.folder / run, ignore_errors=True)
    recipe = recipe_on_random_model(name, setting, run, f"train.max_steps={1 + setting.steps}", *overrides)
    the_plan = plan(find_shape(recipe.model.name), recipe)
    planned = planned_peaks(the_plan)
    record.put(card_gib=card, load=asdict(the_plan.load), planned_bytes=planned)
    watched: list[tuple[APOTrainer, PhaseClock]] = []

    def look(trainer: APOTrainer) -> None:
        full_length_only(trainer)
        watched.append((trainer, PhaseClock(trainer, lambda steps: record.put(steps=steps))))

    # Not before: the random model's 16-bit weights are quantised while they are read, published 4-bit ones are not.
    with watched_training(look, after_loading=lambda: record.put(cap_bytes=pretend_card(card))):
        train_in_any_case(record, recipe, run)
    ((trainer, clock),) = watched
    summary = clock.summary()
    record.put(**summary)
    check(record, recipe, trainer, summary)
    record.put(memory=compare(record, planned, summary["peak_bytes"]))


def planned_peaks(planned: Plan) -> dict[str, int]:
    """By the clock's phases: it cannot tell the reading of prompts from the writing of completions."""
    peaks = planned.peaks
    return {
        "generate": max(peaks["prefill"], peaks["decode"]),
        "score": peaks["score"],
        "train": peaks["train"],
    }


def check(record: Record, recipe: Recipe, trainer: APOTrainer, summary: dict[str, Any]) -> None:
    record.check("the trainer is ours on Unsloth's rewritten one", lambda: (is_rewritten(trainer), bases(trainer)))
    wanted = recipe.completions_per_step * recipe.grpo.max_completion_length
    found = summary["tokens"]["completion"]
    record.check("every completion had its full length", lambda: (found == wanted, f"{found:,} tokens in a step"))
    rows = trainer.pass_size.rows
    trained = trained_recipe(RunDir(recipe.output.dir))
    fits = trained.grpo == recipe.grpo and trained.data == recipe.data and rows == recipe.grpo.completions_per_pass
    record.check("the card holds the recipe as it stands", lambda: (fits, f"{rows} completions per pass"))


def compare(record: Record, planned: dict[str, int], peaks: dict[str, int | None]) -> dict[str, float | None]:
    """Measured over planned, by phase; None where nothing could be measured."""
    ratios = {phase: peaks[phase] and peaks[phase] / planned[phase] for phase in planned}
    for phase, ratio in ratios.items():
        if ratio is not None:
            within = abs(ratio - 1) <= TOLERANCE
            record.check(f"memory of {phase} is as planned", lambda within=within, ratio=ratio: (within, ratio))
    return ratios
