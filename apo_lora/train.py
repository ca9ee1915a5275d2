"""A recipe in, an adapter out. Reads from top to bottom; the heavy imports come after everything cheap was checked."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from apo_lora.errors import DataError, RunDirError, UserError
from apo_lora.recipe import Recipe, load_recipe
from apo_lora.run_dir import RunDir, checkpoint_step, write_atomically, write_json

# Keys that may differ when a run is continued: they change how long it goes on or what is shown, not what it computes.
FREE_ON_RESUME = ("train.max_steps", "train.epochs", "train.save_steps", "train.keep_checkpoints", "train.evaluate",
                  "output.", "data.eval", "data.general", "grpo.completions_per_pass")  # fmt: skip


def train(recipe: Recipe, *, recipe_name: str, resume: str | None = None, dry_run: bool = False) -> RunDir:
    """Runs a recipe into its run directory, which is created, or continued with `resume` ("auto" or a checkpoint).

    Raises UserError for everything a user can mend, before anything is written where that is possible.
    """
    run_dir = RunDir(recipe.output.dir.replace("{recipe}", recipe_name))
    checkpoint = _checkpoint(run_dir, recipe, resume)
    _check_trackers(recipe)

    quiet_libraries()
    say("Loading libraries ...")
    from apo_lora.data import drop_long_prompts, load_examples, prompt_dataset
    from apo_lora.model import choose_engine, load_policy, load_processor, needs_gpu
    from apo_lora.reward_functions import reward_functions
    from apo_lora.verifier import Verifier

    if problem := needs_gpu(recipe.model):
        raise UserError(problem)
    data, seed = recipe.data, recipe.train.seed
    processor = load_processor(recipe.model, data)
    loaded = drop_long_prompts(load_examples(data.train, data, split=data.split, limit=data.limit, seed=seed), processor, data)
    say(loaded.summary())
    if len(loaded.examples) < recipe.prompts_per_rollout:
        raise DataError(
            f"data.train: {len(loaded.examples)} usable rows, and one rollout takes {recipe.prompts_per_rollout}; "
            "lower grpo.prompts_per_step or add data"
        )
    held_out = {
        title: drop_long_prompts(
            load_examples(spec, data, split=data.eval_split, limit=data.eval_limit, seed=seed), processor, data
        ).examples
        for title, spec in (("reasoning", data.eval), ("general", data.general))
        if spec and recipe.train.evaluate
    }
    with Verifier(seconds_per_item=recipe.rewards.seconds_per_item) as verifier:
        rewards = reward_functions(recipe.rewards, verifier)
        if dry_run:
            say(recipe.to_yaml() + f"\n{_plan(recipe, len(loaded.examples))}\nDry run: nothing was written.")
            return run_dir

        import torch

        if choose_engine(recipe.model.engine, torch.cuda.is_available()) == "unsloth":
            import unsloth  # noqa: F401  before trl: it rewrites the trainer
        from apo_lora.callbacks import MetricsWriter, OrderlyStop, Screen
        from apo_lora.environment import environment
        from apo_lora.evaluate import evaluate
        from apo_lora.rollout_record import rollout_writer
        from apo_lora.trainer import APOTrainer
        from apo_lora.trainer_config import grpo_config

        policy = load_policy(recipe.model, recipe.lora, data, seed=seed)
        say(policy.summary)
        say(_plan(recipe, len(loaded.examples)))

        if checkpoint is None:
            run_dir.create()
            write_atomically(run_dir.recipe, recipe.to_yaml())
        else:
            for unfinished in run_dir.remove_unfinished_checkpoints():
                say(f"{unfinished.name} was unfinished and is left out.")
            run_dir.rewind(checkpoint_step(checkpoint))
            say(f"Continuing from {checkpoint}.")
        write_json(run_dir.environment, environment())

        def measure(when: str) -> dict[str, Any]:
            return {
                title: evaluate(policy, examples, recipe, verifier.score, title=f"{when}: {title}")
                for title, examples in held_out.items()
            }

        evaluation = _read_evaluation(run_dir) if checkpoint else {}
        if "before" not in evaluation and checkpoint is None:
            evaluation["before"] = measure("before")
            write_json(run_dir.evaluation, evaluation)

        stop = OrderlyStop(recipe.steps_per_rollout)
        trainer = APOTrainer(
            recipe=recipe,
            run_dir=run_dir,
            record_rollout=rollout_writer(run_dir, loaded.examples) if recipe.output.log_completions else None,
            model=policy.model,
            processing_class=policy.processor,
            args=grpo_config(recipe, policy, run_dir.checkpoints),
            train_dataset=prompt_dataset(loaded.examples, data),
            reward_funcs=rewards,
            callbacks=[MetricsWriter(run_dir), Screen(recipe.output.logging_steps), stop],
        )
        use_own_screen(trainer)
        started = time.perf_counter()
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - started

        _save_adapter(policy.model, run_dir)
        stopped = stop.requested or trainer.nonfinite_guard.gave_up
        if not stopped:
            evaluation["after"] = measure("after")
            write_json(run_dir.evaluation, evaluation)
        verifier_counts = {"timeouts": verifier.timeouts, "crashes": verifier.crashes}
    _finish(recipe, run_dir, policy, evaluation, recipe_name, seconds, trainer.state.global_step, verifier_counts)
    if trainer.nonfinite_guard.gave_up:
        raise trainer.nonfinite_guard.stopped(trainer.state.global_step)
    return run_dir


def _finish(recipe, run_dir, policy, evaluation, recipe_name, seconds, steps, verifier_counts) -> None:
    from apo_lora.model_card import model_card
    from apo_lora.plots import write_plots
    from apo_lora.summary import closing_words

    plots = write_plots(run_dir)
    write_atomically(run_dir.model_card, model_card(recipe, policy.base_name, evaluation, steps))
    say(closing_words(recipe_name, run_dir, evaluation, plots, seconds, steps, verifier_counts))


def _checkpoint(run_dir: RunDir, recipe: Recipe, resume: str | None) -> Path | None:
    """The checkpoint to continue from; None for a fresh run, whose folder must not hold one yet."""
    if resume is None:
        run_dir.refuse_existing()
        return None
    checkpoint = run_dir.checkpoint_to_resume(resume)
    before = load_recipe(run_dir.recipe).model_dump()
    after = recipe.model_dump()
    changed = [
        f"{section}.{key}: {before[section][key]!r} there, {value!r} now"
        for section, keys in after.items()
        for key, value in keys.items()
        if value != before[section][key] and not f"{section}.{key}".startswith(FREE_ON_RESUME)
    ]
    if changed:
        raise RunDirError(
            f"--resume: {run_dir.path} was made by another recipe; give the same values, or start a new run with "
            "output.dir=DIR",
            *changed,
        )
    return checkpoint


def _check_trackers(recipe: Recipe) -> None:
    from apo_lora.environment import installed

    missing = [name for name in recipe.output.report_to if installed(name) is None]
    if missing:
        raise UserError(*(f"output.report_to: {name} is not installed; pip install {name}" for name in missing))


def _plan(recipe: Recipe, num_prompts: int) -> str:
    grpo = recipe.grpo
    steps = recipe.train.max_steps or int(
        num_prompts // recipe.prompts_per_rollout * recipe.steps_per_rollout * recipe.train.epochs
    )
    apo = recipe.apo
    method = " + ".join(
        ["GRPO", *(["DADS"] if apo.dads else []), *(["STCR"] if apo.stcr else [])]
    )
    return (
        f"{method}: {steps} steps of {grpo.prompts_per_step} prompts x {grpo.num_generations} completions, "
        f"{grpo.completions_per_pass} per pass, at most {grpo.max_completion_length} tokens each"
    )


def _read_evaluation(run_dir: RunDir) -> dict[str, Any]:
    import json

    return json.loads(run_dir.evaluation.read_text()) if run_dir.evaluation.exists() else {}


def _save_adapter(model: Any, run_dir: RunDir) -> None:
    """Into a folder beside it first: adapter/ is always whole."""
    temporary = run_dir.path / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the card of the run says more
    shutil.rmtree(run_dir.adapter, ignore_errors=True)
    temporary.rename(run_dir.adapter)


def use_own_screen(trainer: Any) -> None:
    """The Trainer's own printers of dicts go; ours says the same in words."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def quiet_libraries() -> None:
    """Upstream notices that a user can do nothing about; errors still show."""
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|accelerate)\b")


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """`python -m apo_lora.train ...` is `apo-lora train ...`."""
    from apo_lora.cli import main as cli

    return cli(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
