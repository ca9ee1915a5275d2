"""A recipe in, an adapter out. Cheap checks come first, then heavy imports, then data, then the model; the run
directory is made only when all of that has worked.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo_lora import ranks
from apo_lora.disk import checkpoint_bytes, full_disk_in_words, require_room
from apo_lora.environment import environment, installed
from apo_lora.errors import DataError, ModelError, RecipeError, UserError
from apo_lora.finite_rewards import FiniteRewards
from apo_lora.mirror import Mirrors
from apo_lora.model_card import model_card
from apo_lora.process import prepare_process
from apo_lora.recipe import Recipe, combination_problems
from apo_lora.resume import changes_of_place, checkpoint_to_continue, take_back
from apo_lora.run_dir import RunDir, write_atomically, write_json
from apo_lora.summary import closing_words

if TYPE_CHECKING:
    from apo_lora.data import Example, Loaded
    from apo_lora.model import Policy
    from apo_lora.preflight import Check


def train(recipe: Recipe, *, recipe_name: str, resume: str | None = None, dry_run: bool = False) -> RunDir:
    """Runs a recipe into its run directory, which is created, or continued with `resume` ("auto" or a checkpoint).

    Raises UserError for everything a user can mend, before anything is written where that is possible.
    """
    run_dir = RunDir(recipe.output.dir.replace("{recipe}", recipe_name))
    recipe = recipe.in_run_dir(run_dir.path)
    mirrors = Mirrors(recipe.output.mirror, run_dir)
    if resume == "auto" and run_dir.is_absent() and not dry_run:
        _restored(mirrors, run_dir)
    checkpoint = checkpoint_to_continue(run_dir, recipe, resume)
    if checkpoint is None and ranks.is_main():
        mirrors.refuse_existing()
    _check_trackers(recipe)
    if problems := list(combination_problems(recipe, ranks.num_processes())):
        raise RecipeError(*(f"{recipe_name}: {problem}" for problem in problems))

    prepare_process()
    say("Loading libraries ...")
    _import_engine(recipe, dry_run=dry_run)
    from apo_lora.callbacks import MetricsWriter, OrderlyStop, Screen, TimedSave
    from apo_lora.data import prompt_dataset, training_order
    from apo_lora.evaluate import evaluate
    from apo_lora.model import load_processor
    from apo_lora.plots import write_plots
    from apo_lora.preflight import preflight
    from apo_lora.reward_functions import reward_functions
    from apo_lora.rollout_record import rollout_writer
    from apo_lora.trainer import APOTrainer
    from apo_lora.trainer_config import grpo_config
    from apo_lora.verifier import Verifier

    processor = load_processor(recipe.model, recipe.data)
    loaded, held_out = _load_data(recipe, processor)
    say(loaded.summary())
    seconds_per_item = recipe.rewards.seconds_per_item
    kept = f"Whole checkpoints in {run_dir.checkpoints} are kept"
    with (
        ranks.lost_process_in_words(kept),
        full_disk_in_words(run_dir.path, kept),
        ranks.joined(),
        Verifier(seconds_per_item=seconds_per_item) as verifier,
        _trackers_in(run_dir),
    ):
        finite = FiniteRewards()
        rewards = [finite.watching(function) for function in reward_functions(recipe.rewards, verifier)]
        if dry_run:
            say(f"{recipe.to_yaml()}\n{_plan(recipe, len(loaded.examples))}\nDry run: nothing was written.")
            return run_dir
        policy = _load_policy(recipe)
        say(_plan(recipe, len(loaded.examples)))
        given = recipe
        if recipe.train.preflight:
            checks, recipe = preflight(policy, loaded.examples, recipe)
            failed = report_checks(checks)
            if failed:
                raise ModelError(*failed)
        require_room(
            run_dir.path,
            checkpoint_bytes(run_dir, [p for p in policy.model.parameters() if p.requires_grad]),
            "a checkpoint",
            "Nothing was written",
        )
        if ranks.is_main():
            _open_run(run_dir, given, checkpoint, resume, policy.engine)
            if recipe.train.preflight:
                write_json(run_dir.preflight, [asdict(check) for check in checks])
        ranks.wait()

        def measure(when: str) -> None:
            evaluation[when] = {
                title: evaluate(policy, examples, recipe, verifier.score, title=f"{when}: {title}")
                for title, examples in held_out.items()
            }
            if ranks.is_main():
                write_json(run_dir.evaluation, evaluation)

        evaluation = json.loads(run_dir.evaluation.read_text()) if run_dir.evaluation.exists() else {}
        if checkpoint is None:
            measure("before")
        steps = recipe.total_steps(len(loaded.examples))
        # Whole rollouts, also where the last one feeds more steps than are left.
        num_rollouts = -(-steps // recipe.steps_per_rollout)
        order = training_order(len(loaded.examples), num_rollouts * recipe.prompts_per_rollout, recipe.train.seed)
        stop = OrderlyStop(recipe.steps_per_rollout)

        def checkpoint_saved() -> None:
            mirrors.copy()
            run_dir.remove_old_checkpoints(recipe.train.keep_checkpoints, spare=mirrors.in_use)

        trainer = APOTrainer(
            recipe=recipe,
            run_dir=run_dir,
            record_rollout=rollout_writer(run_dir, loaded.examples) if recipe.output.log_completions else None,
            more_figures=lambda: ranks.summed(
                {
                    "verifier_timeouts": verifier.timeouts,
                    "verifier_crashes": verifier.crashes,
                    "nonfinite_rewards": finite.replaced,
                }
            ),
            checkpoint_saved=checkpoint_saved,
            model=policy.model,
            processing_class=policy.processor,
            args=grpo_config(recipe, policy, run_dir.checkpoints, steps),
            train_dataset=prompt_dataset(loaded.examples, recipe.data, order),
            reward_funcs=rewards,
            callbacks=[
                *([MetricsWriter(run_dir), Screen(recipe.output.logging_steps)] if ranks.is_main() else []),
                *([TimedSave(minutes, recipe.steps_per_rollout)] if (minutes := recipe.train.save_minutes) else []),
                stop,
            ],
        )
        started = time.perf_counter()
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds, done = time.perf_counter() - started, trainer.state.global_step

        if ranks.is_main():
            _save_adapter(policy.model, run_dir)
        if not (stop.requested or trainer.nonfinite_guard.gave_up):
            measure("after")
        troubles = trainer.more_figures() | {"steps skipped as not finite": trainer.nonfinite_guard.skipped}
        if ranks.is_main():
            plots = write_plots(run_dir)
            versions = json.loads(run_dir.environment.read_text())
            write_atomically(run_dir.model_card, model_card(recipe, policy.base_name, evaluation, done, versions))
            say(closing_words(run_dir, evaluation, plots, seconds, done, troubles))
            mirrors.finish()
        ranks.wait()  # where one process ends with an error, the launcher ends the others
    if trainer.nonfinite_guard.gave_up:
        raise trainer.nonfinite_guard.stopped(done)
    if stop.requested:
        raise stop.stopped(done, steps)
    return run_dir


@contextmanager
def _trackers_in(run_dir: RunDir) -> Iterator[None]:
    """Inside, what trackers write goes beside the run's own record, unless the user's environment says otherwise."""
    places = {"TENSORBOARD_LOGGING_DIR": run_dir.path / "tensorboard", "WANDB_DIR": run_dir.path}
    ours = {name: str(path) for name, path in places.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _check_trackers(recipe: Recipe) -> None:
    missing = [name for name in recipe.output.report_to if installed(name) is None]
    if missing:
        raise UserError(*(f"output.report_to: {name} is not installed; pip install {name}" for name in missing))


def _load_data(recipe: Recipe, processor: Any) -> tuple["Loaded", dict[str, list["Example"]]]:
    """Training rows, and what is measured before and after, by title."""
    from apo_lora.data import drop_long_prompts, load_examples

    data = recipe.data

    def load(spec: str, split: str, limit: int | None) -> "Loaded":
        rows = load_examples(spec, data, split=split, limit=limit, seed=recipe.train.seed)
        return drop_long_prompts(rows, processor, data)

    loaded = load(data.train, data.split, data.limit)
    if len(loaded.examples) < recipe.prompts_per_rollout:
        raise DataError(
            f"data.train: {len(loaded.examples)} usable rows, and one rollout takes {recipe.prompts_per_rollout}; "
            "lower grpo.prompts_per_step or add data"
        )
    titles = {"reasoning": data.eval, "general": data.general} if recipe.train.evaluate else {}
    return loaded, {
        title: load(spec, data.eval_split, data.eval_limit).examples for title, spec in titles.items() if spec
    }


def _plan(recipe: Recipe, num_prompts: int) -> str:
    grpo = recipe.grpo
    processes = f" of each of {ranks.num_processes()} processes" if ranks.num_processes() > 1 else ""
    return (
        f"{recipe.method}: {recipe.total_steps(num_prompts)} steps of {grpo.prompts_per_step} prompts "
        f"x {grpo.num_generations} completions, "
        f"{grpo.completions_per_pass} per pass{processes}, at most {grpo.max_completion_length} tokens each"
    )


def _restored(mirrors: Mirrors, run_dir: RunDir) -> None:
    """Brings a run back whose directory is gone. The main process does it; the others see it done."""
    if ranks.is_main():
        if place := mirrors.restore():
            say(f"{run_dir.path} was gone and is restored from {place}.")
    else:
        mirrors.wait_for_restored()


def _open_run(run_dir: RunDir, recipe: Recipe, checkpoint: Path | None, resume: str | None, engine: str) -> None:
    """Makes the run directory, or takes its record back to the checkpoint."""
    here = environment(engine)
    if resume is None:
        run_dir.create()
    else:
        for line in [*take_back(run_dir, checkpoint), *changes_of_place(run_dir, here)]:
            say(line)
    write_atomically(run_dir.recipe, recipe.to_yaml())
    write_json(run_dir.environment, here)


def run_preflight(recipe: Recipe) -> bool:
    """`apo-lora preflight`: the checks alone. Nothing is written; True if all passed."""
    prepare_process()
    _import_engine(recipe)
    from apo_lora.model import load_processor
    from apo_lora.preflight import preflight

    loaded, _ = _load_data(recipe, load_processor(recipe.model, recipe.data))
    policy = _load_policy(recipe)
    checks, _ = preflight(policy, loaded.examples, recipe)
    return not report_checks(checks)


def _import_engine(recipe: Recipe, *, dry_run: bool = False) -> None:
    """Unsloth, where it is the engine, comes before trl is imported: it rewrites the trainer.

    Raises ModelError for what this machine lacks; a dry run may be made on another one.
    """
    import torch

    from apo_lora.model import choose_engine, needs_gpu
    from apo_lora.vllm_rollout import vllm_problem

    problems = needs_gpu(recipe.model), vllm_problem(recipe, has_gpu=torch.cuda.is_available())
    if any(problems) and not dry_run:
        raise ModelError(*filter(None, problems))
    if choose_engine(recipe.model.engine, torch.cuda.is_available()) == "unsloth":
        import unsloth  # noqa: F401


def _load_policy(recipe: Recipe) -> "Policy":
    from apo_lora.model import load_policy
    from apo_lora.vllm_rollout import loading_options

    policy = load_policy(
        recipe.model, recipe.lora, recipe.data, seed=recipe.train.seed, unsloth_options=loading_options(recipe)
    )
    say(policy.summary)
    return policy


def report_checks(checks: list["Check"]) -> list[str]:
    """Prints one line per check. Returns the lines of those that failed, on whichever process."""
    for check in checks:
        say(check.line())
    return list(dict.fromkeys(ranks.gathered([check.line() for check in checks if not check.ok])))


def _save_adapter(model: Any, run_dir: RunDir) -> None:
    """Into a folder beside it first: adapter/ is always whole."""
    temporary, old = run_dir.path / ".adapter.tmp", run_dir.path / ".adapter-old.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the card of the run says more
    if run_dir.adapter.exists():
        run_dir.adapter.rename(old)
    temporary.rename(run_dir.adapter)
    shutil.rmtree(old, ignore_errors=True)


def say(text: str) -> None:
    if ranks.is_main():
        print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """`python -m apo_lora.train ...` is `apo-lora train ...`."""
    from apo_lora.cli import main as cli

    return cli(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
