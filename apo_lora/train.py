"""A recipe in, an adapter out. Cheap checks come first, then heavy imports, then data, then the model; the run
directory is created only when all of that has succeeded.
"""

import json
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo_lora.data.inputs import Inputs, open_inputs, require_trainable
from apo_lora.errors import ModelError, RecipeError
from apo_lora.machine import ranks
from apo_lora.machine.process import prepare_process
from apo_lora.machine.versions import environment
from apo_lora.machine.vllm_environment import VERSION
from apo_lora.recipe.combinations import combination_problems
from apo_lora.recipe.schema import Recipe
from apo_lora.rewards.calls import RewardFunction
from apo_lora.rewards.plugins import find_rewards
from apo_lora.run.adapter import save_adapter
from apo_lora.run.directory import RunDir, RunLock
from apo_lora.run.disk import checkpoint_bytes, disk_errors_as_one_line, require_room
from apo_lora.run.files import write_atomically, write_json
from apo_lora.run.inputs import changes_of_inputs, inputs_of, recorded_start, start_of
from apo_lora.run.mirror import Mirrors
from apo_lora.run.model_card import model_card
from apo_lora.run.recipes import fitted_as_before, record_recipes
from apo_lora.run.resume import checkpoint_to_continue, environment_changes, only_plain_data, rewind_record
from apo_lora.run.start import start_line, with_start
from apo_lora.run.summary import closing_summary
from apo_lora.run.trackers import require_trackers, trackers_in

if TYPE_CHECKING:
    from apo_lora.data.examples import Example
    from apo_lora.evaluation.held_out import HeldOut
    from apo_lora.policy.loading import Policy
    from apo_lora.preflight.checks import Check
    from apo_lora.rewards.verifier import Verifier
    from apo_lora.rollout.sampling import Sampler
    from apo_lora.rollout.vllm.server import Servers
    from apo_lora.run.callbacks import OrderlyStop
    from apo_lora.trainer import APOTrainer


@dataclass(frozen=True)
class Start:
    """What is settled before anything heavy is loaded."""

    recipe: Recipe
    recipe_name: str
    run_dir: RunDir
    lock: RunLock
    mirrors: Mirrors
    resume: str | None
    checkpoint: Path | None


def train(recipe: Recipe, *, recipe_name: str, resume: str | None = None, dry_run: bool = False) -> RunDir:
    """Runs a recipe into its run directory, which is created, or continued with `resume` ("auto" or a checkpoint).

    Raises UserError for everything that a user can fix, before anything is written where possible.
    """
    run_dir = RunDir(recipe.output.dir.replace("{recipe}", recipe_name))
    recipe = with_start(recipe).in_run_dir(run_dir.path)
    with RunLock(run_dir) as lock:
        start = _start(recipe, recipe_name, run_dir, lock, resume, dry_run)
        inputs = _inputs(recipe, needs_device=not dry_run)  # a dry run may be on another machine
        kept = f"Complete checkpoints in {run_dir.checkpoints} are kept"
        from apo_lora.rewards.functions import verifier_of

        with (
            ranks.lost_process_as_one_line(kept),
            disk_errors_as_one_line(run_dir.path, kept),
            ranks.joined(),
            verifier_of(recipe.rewards) as verifier,
            trackers_in(run_dir),
        ):
            rewards = _rewards(recipe, verifier, inputs)
            used = inputs_of(inputs.train, inputs.held_out_examples, recipe.rewards.functions, start_of(recipe))
            for line in changes_of_inputs(run_dir, used) if start.checkpoint else ():
                say(line)
            if dry_run:
                plan = _plan(recipe, len(inputs.train.examples))
                say(f"{recipe.to_yaml()}\n{plan}\nDry run: nothing was written.")
            else:
                _train(start, inputs, used, rewards, verifier)
    return run_dir


def _start(
    recipe: Recipe, recipe_name: str, run_dir: RunDir, lock: RunLock, resume: str | None, dry_run: bool
) -> Start:
    mirrors = Mirrors(recipe.output.mirror, run_dir)
    if resume == "auto" and run_dir.is_absent() and not dry_run:
        _restored(mirrors, run_dir)
    if resume and not dry_run:
        lock.take()
    checkpoint = checkpoint_to_continue(run_dir, recipe, resume)
    if checkpoint is None and ranks.is_main():
        mirrors.refuse_existing()
    _refuse_at_once(recipe, recipe_name)
    return Start(recipe, recipe_name, run_dir, lock, mirrors, resume, checkpoint)


def _train(
    start: Start, inputs: Inputs, used: dict[str, Any], rewards: list[RewardFunction], verifier: "Verifier"
) -> None:
    """From the model to the run's summary."""
    from apo_lora.evaluation.held_out import HeldOut
    from apo_lora.rollout.vllm.sampler import sampler_of
    from apo_lora.rollout.vllm.server import serving
    from apo_lora.run.callbacks import OrderlyStop

    run_dir, recipe, examples = start.run_dir, start.recipe, inputs.train.examples
    # Before the model is loaded: a server takes its share of a GPU's memory first.
    with serving(recipe, run_dir.path, examples) as servers:
        policy = _load_policy(recipe)
        say(_plan(recipe, len(examples)))
        wanted = fitted_as_before(recipe, run_dir) if start.checkpoint else recipe
        checks, fitted = _checked(policy, examples, wanted, run_dir, servers)
        if ranks.is_main():
            start.lock.make_and_take()
            _open_run(start, fitted, policy.engine)
            write_json(run_dir.inputs, used)
            if checks:
                write_json(run_dir.preflight, [asdict(check) for check in checks])
        ranks.wait()

        held_out = HeldOut(inputs.held_out_examples, policy, fitted, verifier.score, run_dir)
        if start.checkpoint is None:
            held_out.measure("before")

        def troubles() -> dict[str, float]:
            return ranks.summed(
                {
                    "verifier_timeouts": verifier.timeouts,
                    "verifier_crashes": verifier.crashes,
                    "nonfinite_rewards": trainer.checked_rewards.replaced,
                }
            )

        stop = OrderlyStop(fitted.steps_per_rollout)
        sampler = sampler_of(servers, policy, fitted)
        trainer = _trainer(fitted, run_dir, policy, examples, rewards, troubles, start.mirrors, stop, sampler, held_out)
        started = time.perf_counter()
        with stop, only_plain_data(start.checkpoint):
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        seconds, guard = time.perf_counter() - started, trainer.nonfinite_guard

        if ranks.is_main():
            save_adapter(policy.model, run_dir.adapter)
        if not (stop.requested or guard.gave_up):
            held_out.measure("after")
        counts = troubles() | {"non-finite steps skipped": guard.skipped}
        done, steps = trainer.state.global_step, trainer.args.max_steps
        if ranks.is_main():
            _close_run(run_dir, fitted, policy.base_name, held_out.figures, seconds, done, counts)
            start.mirrors.finish()
        ranks.wait()  # where one process ends with an error, the launcher ends the others
    if guard.gave_up:
        raise guard.stopped(done)
    if stop.requested:
        raise stop.stopped(done, steps)


def _inputs(recipe: Recipe, *, needs_device: bool) -> Inputs:
    """The rows to train on and to measure, whose prompts are not too long; also imports the heavy libraries."""
    prepare_process()
    if needs_device:
        _require_device(recipe)
    inputs = open_inputs(recipe)
    require_trainable(inputs, recipe)
    say("Loading libraries ...")
    from apo_lora.policy.loading import import_engine, load_processor

    import_engine(recipe.model)
    inputs = inputs.fitting(load_processor(recipe.model, recipe.data), recipe.data)
    require_trainable(inputs, recipe)
    eventful = [rows for rows in inputs.held_out.values() if rows.dropped or rows.warnings]
    say("\n".join(line for rows in (inputs.train, *eventful) for line in rows.lines()))
    return inputs


def _rewards(recipe: Recipe, verifier: "Verifier", inputs: Inputs) -> list[RewardFunction]:
    """The reward functions, called once: a user's own fails here, before the model is loaded."""
    from apo_lora.data.items import prompt_dataset
    from apo_lora.rewards.functions import probe, reward_functions

    rewards = reward_functions(recipe.rewards, verifier, recipe.grpo.max_completion_length)
    probe(rewards, prompt_dataset(inputs.train.examples, recipe.data)[0], recipe.grpo.num_generations)
    return rewards


def _refuse_at_once(recipe: Recipe, recipe_name: str) -> None:
    """Problems that can be found before anything heavy is loaded."""
    require_trackers(recipe)
    if problems := list(combination_problems(recipe, ranks.num_processes())):
        raise RecipeError(*(f"{recipe_name}: {problem}" for problem in problems))
    find_rewards(recipe.rewards.functions)


def _checked(
    policy: "Policy", examples: list["Example"], recipe: Recipe, run_dir: RunDir, servers: "Servers | None"
) -> tuple[list["Check"], Recipe]:
    """The checks before step 1, and the recipe as it fits this machine. Raises ModelError, RunDirError."""
    from apo_lora.preflight.checks import preflight

    checks, fitted = preflight(policy, examples, recipe, servers) if recipe.train.preflight else ([], recipe)
    if failed := report_checks(checks):
        raise ModelError(*failed)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    require_room(run_dir.path, checkpoint_bytes(run_dir, trained), "a checkpoint", "Nothing was written")
    return checks, fitted


def _trainer(
    recipe: Recipe,
    run_dir: RunDir,
    policy: "Policy",
    examples: list["Example"],
    rewards: list[RewardFunction],
    troubles: Callable[[], dict[str, float]],
    mirrors: Mirrors,
    stop: "OrderlyStop",
    sampler: "Sampler | None",
    held_out: "HeldOut",
) -> "APOTrainer":
    """The drop-in trainer, with the run's record as callbacks."""
    from transformers import PrinterCallback, ProgressCallback

    from apo_lora.data.items import prompt_dataset, training_order
    from apo_lora.rollout.record import CompletionsView, CompletionsWriter
    from apo_lora.rollout.training_arguments import refuse_changes, training_arguments
    from apo_lora.run.callbacks import MetricsWriter, Screen, TimedSave, Validation
    from apo_lora.run.hooks import Figures
    from apo_lora.run.sealing import SealedCheckpoints
    from apo_lora.run.validation import measured, why_stopped
    from apo_lora.trainer import APOTrainer

    steps = recipe.total_steps(len(examples))
    if reason := why_stopped(measured(run_dir), recipe.train.patience):
        steps = run_dir.last_metrics()["step"]
        say(f"Not trained on after step {steps}: {reason}.")
    # Whole rollouts, also where the last one feeds more steps than are left.
    num_rollouts = -(-steps // recipe.steps_per_rollout)
    order = training_order(len(examples), num_rollouts * recipe.prompts_per_rollout, recipe.train.seed)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    every = recipe.output.show_completions
    names = [reward.__name__ for reward in rewards]

    def keep_best() -> None:
        save_adapter(policy.model, run_dir.adapter_best, recipe)

    record = [
        *([CompletionsWriter(run_dir, examples)] if recipe.output.log_completions else []),
        *([CompletionsView(examples, names, every, recipe.steps_per_rollout)] if every else []),
        *([Validation(run_dir, recipe, held_out.validate, keep_best)] if recipe.train.eval_steps else []),
        *([MetricsWriter(run_dir), Screen(recipe.output.logging_steps)] if ranks.is_main() else []),
        *([TimedSave(minutes, recipe.steps_per_rollout)] if (minutes := recipe.train.save_minutes) else []),
    ]
    arguments = training_arguments(recipe, policy, run_dir.checkpoints, steps)
    trainer = APOTrainer(
        policy.model,
        rewards,
        arguments,
        processing_class=policy.processor,
        train_dataset=prompt_dataset(examples, recipe.data, order),
        callbacks=[
            Figures(troubles),
            *record,
            SealedCheckpoints(run_dir, trained, mirrors, recipe.train.keep_checkpoints),
            stop,
        ],
        sampler=sampler,
    )
    refuse_changes(trainer.args, vars(arguments), by=type(trainer).__mro__[1])
    for upstream_screen in (PrinterCallback, ProgressCallback):  # dicts of raw numbers; Screen prints readable lines
        trainer.remove_callback(upstream_screen)
    trainer.create_model_card = lambda *args, **kwargs: None  # ours is written once, at the end
    trainer.nonfinite_guard.skipped = run_dir.last_metrics().get("skipped_nonfinite_steps", 0)
    return trainer


def _close_run(
    run_dir: RunDir,
    recipe: Recipe,
    base_name: str,
    evaluation: dict[str, Any],
    seconds: float,
    steps: int,
    troubles: dict[str, int],
) -> None:
    from apo_lora.run.plots import write_plots

    plots = write_plots(run_dir)
    versions = json.loads(run_dir.environment.read_text(encoding="utf-8"))
    card = model_card(recipe, base_name, evaluation, steps, versions, start=recorded_start(run_dir))
    write_atomically(run_dir.model_card, card)
    say(closing_summary(run_dir, evaluation, plots, seconds, steps, troubles))


def _plan(recipe: Recipe, num_prompts: int) -> str:
    grpo = recipe.grpo
    processes = f" of each of {ranks.num_processes()} processes" if ranks.num_processes() > 1 else ""
    is_on_policy = recipe.steps_per_rollout == 1 and (grpo.epsilon_high is not None or grpo.ratio != "token")
    unclipped = (
        "\ngrpo.ratio and grpo.epsilon_high change nothing here: each rollout feeds one step, and all ratios are 1; "
        "raise grpo.prompts_per_rollout or grpo.num_iterations"
    ) * is_on_policy
    return (
        f"{recipe.method}: {recipe.total_steps(num_prompts)} steps of {grpo.prompts_per_step} prompts "
        f"x {grpo.num_generations} completions, "
        f"{grpo.completions_per_pass} per pass{processes}, at most {grpo.max_completion_length} tokens each"
        f"{unclipped}"
    )


def _restored(mirrors: Mirrors, run_dir: RunDir) -> None:
    """Restores a run whose directory is missing. The main process does it; the others wait for it."""
    if ranks.is_main():
        if place := mirrors.restore():
            say(f"{run_dir.path} was missing and has been restored from {place}.")
    else:
        mirrors.wait_for_restored()


def _open_run(start: Start, fitted: Recipe, engine: str) -> None:
    """Creates the run directory, or rewinds its record to the checkpoint."""
    here = environment(engine)
    if (start.recipe.rollout.engine, start.recipe.rollout.servers) == ("vllm", "auto"):
        here["packages"]["vllm"] = VERSION
    if start.resume is None:
        start.run_dir.create()
    else:
        rewound = rewind_record(start.run_dir, start.checkpoint)
        for line in [*rewound, *environment_changes(start.run_dir, here)]:
            say(line)
    record_recipes(start.run_dir, start.recipe, fitted)
    write_json(start.run_dir.environment, here)


def run_preflight(recipe: Recipe) -> bool:
    """`apo-lora preflight`: only the checks. Nothing is written; True if all passed."""
    recipe = with_start(recipe)
    inputs = _inputs(recipe, needs_device=True)
    from apo_lora.preflight.checks import preflight
    from apo_lora.rollout.vllm.server import serving

    with serving(recipe, Path(recipe.output.dir), inputs.train.examples) as servers:  # has its share of a GPU's memory
        checks, _ = preflight(_load_policy(recipe), inputs.train.examples, recipe, servers)
    return not report_checks(checks)


def _require_device(recipe: Recipe) -> None:
    """Raises ModelError for what this machine lacks, before anything is downloaded or a heavy library is imported."""
    if recipe.model.name == "tiny" and recipe.rollout.engine == "transformers":
        return  # runs anywhere

    from apo_lora.policy.loading import needs_gpu
    from apo_lora.rollout.vllm.server import servers_problem

    problems = needs_gpu(recipe.model), servers_problem(recipe)
    if any(problems):
        raise ModelError(*filter(None, problems))


def _load_policy(recipe: Recipe) -> "Policy":
    from apo_lora.policy.loading import load_policy
    from apo_lora.policy.tuned import load_start

    if recipe.lora.start:
        policy = load_start(recipe)
        say(start_line(recipe))
    else:
        policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=recipe.train.seed)
    say(policy.summary)
    return policy


def report_checks(checks: list["Check"]) -> list[str]:
    """Prints one line per check. Returns the lines of those that failed, on whichever process."""
    for check in checks:
        say(check.line())
    return list(dict.fromkeys(ranks.gathered([check.line() for check in checks if not check.ok])))


def say(text: str) -> None:
    if ranks.is_main():
        print(text, flush=True)


if __name__ == "__main__":  # `python -m apo_lora.train ...` is `python -m apo_lora train ...`
    sys.argv.insert(1, "train")
    runpy.run_module("apo_lora", run_name="__main__")
