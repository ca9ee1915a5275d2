"""What DADS and STCR cost: a step of APO against a step of plain GRPO, in one trainer and on the same completions.

    python -m benchmarks.apo_overhead --out apo_overhead.json            (two minutes; the embedded model, a CPU)

A step here is what the two may do differently: credit for the rollout, forward and backward of the loss. Sampling and
the reference's log-probs are the same work and left out, which makes the ratio stricter. Seconds are those of the CPU,
in turns, one pair after the other; the ratio's interval is that of the median over pairs (bootstrap, 95 %).
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from apo_lora.machine.process import prepare_process

prepare_process()


from apo_lora.data.examples import load_examples  # noqa: E402
from apo_lora.data.items import prompt_dataset  # noqa: E402
from apo_lora.machine.versions import environment  # noqa: E402
from apo_lora.policy.loading import load_policy  # noqa: E402
from apo_lora.recipe.files import find_recipe, load_recipe  # noqa: E402
from apo_lora.recipe.schema import Recipe  # noqa: E402
from apo_lora.rollout.credit import CreditRule  # noqa: E402
from apo_lora.rollout.training_arguments import training_arguments  # noqa: E402
from apo_lora.run.directory import RunDir  # noqa: E402
from apo_lora.run.files import write_json  # noqa: E402
from apo_lora.trainer import APOTrainer  # noqa: E402
from benchmarks.gpu.witness import stir  # noqa: E402


def length_parity(completions: Sequence, completion_ids: Sequence[Sequence[int]], **columns: object) -> list[float]:
    """A reward with variance in nearly every group, whatever the model says."""
    return [float(len(ids) % 2) for ids in completion_ids]


def build_trainer(recipe: Recipe, folder: Path) -> APOTrainer:
    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=0)
    examples = load_examples(recipe.data.train, recipe.data, split="train", limit=64).examples
    run_dir = RunDir(folder / "run")
    run_dir.create()
    length_parity.__name__ = "accuracy"
    return APOTrainer(
        policy.model,
        [length_parity],
        training_arguments(recipe, policy, run_dir.checkpoints, 1),
        processing_class=policy.processor,
        train_dataset=prompt_dataset(examples, recipe.data),
    )


def step_seconds(trainer: APOTrainer, credit_of: CreditRule) -> tuple[float, float]:
    """(CPU seconds, loss) of one optimizer step's credit and gradients on the buffered rollout."""
    trainer.model.zero_grad()
    started = time.process_time()
    credit = credit_of(trainer.rollout).credit
    loss, first = 0.0, 0
    for batch in trainer._buffered_inputs:
        rows = slice(first, first := first + len(batch["prompt_ids"]))
        batch["advantages"] = credit.advantages_NG.flatten()[rows]
        batch["kl_weights"] = credit.kl_weights_NG.flatten()[rows]
        loss += trainer.compute_loss(trainer.model, batch).item()
    return time.process_time() - started, loss


def seconds_of_credit(trainer: APOTrainer, credit_of: CreditRule, repeats: int = 300) -> float:
    """The only code that differs: the loss computes the same with other weights."""
    started = time.process_time()
    for _ in range(repeats):
        credit_of(trainer.rollout)
    return (time.process_time() - started) / repeats


def median_interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("overrides", nargs="*", help="keys of the recipe tiny_cpu")
    given = parser.parse_args(arguments)
    recipe = load_recipe(find_recipe("tiny_cpu"), ["rewards.functions=[accuracy]", *given.overrides])
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe, Path(folder))
        trainer.train()  # one step: its rollout is what both are measured on
        trainer.model.train()
        stir(trainer.model, scale=0.02)  # a fresh adapter has no KL for DADS to weigh
        rules = {"GRPO": replace(trainer.credit_of, dads=None, stcr=None), "APO": trainer.credit_of}
        for rule in rules.values():
            step_seconds(trainer, rule)  # warms up
        credit_seconds = {name: seconds_of_credit(trainer, rule) for name, rule in rules.items()}
        pairs = []
        for number in range(given.pairs):
            order = list(rules) if number % 2 else list(reversed(rules))
            found = {name: step_seconds(trainer, rules[name]) for name in order}
            pairs.append({name: found[name] for name in rules})
    ratios = [pair["APO"][0] / pair["GRPO"][0] for pair in pairs]
    low, high = median_interval(ratios)
    seconds = {name: statistics.median(pair[name][0] for pair in pairs) for name in rules}
    losses = {name: pairs[0][name][1] for name in rules}
    for name in rules:
        print(f"{name:4} {seconds[name]:.4f} s of CPU, loss {losses[name]:.5f}")
    extra = credit_seconds["APO"] - credit_seconds["GRPO"]
    print(f"credit alone: {1e6 * extra:+.0f} us, {extra / seconds['GRPO']:+.2%} of a step")
    print(f"APO / GRPO: {statistics.median(ratios):.4f} (95 % interval {low:.4f} to {high:.4f}, {given.pairs} pairs)")
    if given.out:
        write_json(
            given.out,
            {
                "environment": environment(),
                "date": time.strftime("%Y-%m-%d"),
                "cpu_seconds": seconds,
                "cpu_seconds_of_credit": credit_seconds,
                "losses": losses,
                "ratio": {"median": statistics.median(ratios), "low": low, "high": high, "pairs": ratios},
            },
        )


if __name__ == "__main__":
    main()
