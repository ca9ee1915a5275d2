"""The model's own generate() against a vLLM server on the same card: whole steps, and rollouts of ragged lengths.

Without a simulated card: the server is another process, and takes its share of the real one.
"""

import shutil

from apo_lora.machine.vllm_environment import problem
from apo_lora.trainer import APOTrainer
from benchmarks.gpu.measurements import Setting
from benchmarks.gpu.phase_clock import PhaseClock
from benchmarks.gpu.record import Record
from benchmarks.gpu.watch import train_in_any_case, watched_training
from benchmarks.gpu.work import full_length_only, recipe_on_random_model

RECIPE = "single_gpu"
LONGEST = {"3b": 1024, "tiny": 32}
PROMPTS, REPEATS = 1, 2
COMPLETIONS = 64
"""Of a step, as the recipe has them."""


def steps(record: Record, setting: Setting, engine: str, ahead: int = 0, generations: int = 8) -> None:
    """Steps of 64 completions, `generations` to a prompt, all of full length."""
    if engine == "vllm" and (why := problem()):
        record.put(skipped=why)
        return
    run = f"sampling-{engine}-{ahead}-{generations}"
    shutil.rmtree(setting.folder / run, ignore_errors=True)
    group = (f"grpo.num_generations={generations}", f"grpo.prompts_per_step={COMPLETIONS // generations}")
    keys = (f"rollout.engine={engine}", f"rollout.ahead={ahead}", f"train.max_steps={1 + setting.steps}")
    recipe = recipe_on_random_model(RECIPE, setting, run, *group, *keys)
    clocks: list[PhaseClock] = []

    def look(trainer: APOTrainer) -> None:
        full_length_only(trainer)
        clocks.append(PhaseClock(trainer, lambda done: record.put(steps=done)))

    with watched_training(look):
        train_in_any_case(record, recipe, run)
    summary = clocks[0].summary()
    record.put(**summary | ({"tokens_per_second": None} if ahead else {}))
    wanted = recipe.completions_per_step * recipe.grpo.max_completion_length
    found = summary["tokens"]["completion"]
    record.check("every completion had its full length", lambda: (found == wanted, f"{found:,} tokens in a step"))


def ragged(record: Record, setting: Setting) -> None:
    """One prompt, 8 and 16 completions of lengths from 16 tokens on: both engines in turns."""
    if why := problem():
        record.put(skipped=why)
        return
    from benchmarks.sampling import rollouts

    longest = LONGEST[setting.size]
    record.put(rollouts=rollouts(str(setting.model), setting.size, PROMPTS, longest, REPEATS))
