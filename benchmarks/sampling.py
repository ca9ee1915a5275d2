"""Who samples faster, the model's own generate() or a vLLM server: completions of ragged lengths, and whole steps.

    python -m benchmarks.sampling --out sampling.json          (an hour on two CPU cores; needs setup-vllm)

Lengths are drawn log-uniformly from 16 to 1,024 tokens, the same for both, and every completion has exactly its length.
generate() computes every row until the longest is done; vLLM computes no row for longer than it needs. Prompts are
boards of the embedded task, G completions each. Seconds are wall-clock, from messages and images to token ids, after
one rollout that is not counted. Steps are those of `apo-lora train`, with the lengths that the model chooses, by
generate(), by vLLM, and by vLLM while the rollout before trains (rollout.ahead=1).
"""

import argparse
import math
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apo_lora.machine.process import prepare_process

prepare_process()

import torch  # noqa: E402
from transformers import StoppingCriteria, StoppingCriteriaList  # noqa: E402

from apo_lora.commands.main import main as apo_lora  # noqa: E402
from apo_lora.data.examples import Example, load_examples  # noqa: E402
from apo_lora.family.lookup import inner_model_of  # noqa: E402
from apo_lora.machine.versions import environment  # noqa: E402
from apo_lora.machine.vllm_environment import VERSION  # noqa: E402
from apo_lora.policy.loading import Policy, load_policy  # noqa: E402
from apo_lora.policy.shared_prompt.prefill import prompts_read_once  # noqa: E402
from apo_lora.preflight.sample import sample_by_vllm  # noqa: E402
from apo_lora.recipe.files import find_recipe, load_recipe  # noqa: E402
from apo_lora.recipe.schema import Recipe  # noqa: E402
from apo_lora.rollout.sampling import generating, generation_options, prompt_inputs  # noqa: E402
from apo_lora.rollout.vllm.sampler import Group, VllmSampler  # noqa: E402
from apo_lora.rollout.vllm.server import KEY, serving  # noqa: E402
from apo_lora.run.directory import RunDir  # noqa: E402
from apo_lora.run.files import read_jsonl, write_json  # noqa: E402
from benchmarks.gpu.random_model import make  # noqa: E402

SHORTEST, LONGEST = 16, 1024
SIZES = ("embedded", "31m")
GROUPS = (8, 16)
STEP_PROMPTS = {"embedded": 8, "31m": 1}
"""Prompts of a step."""


def ragged_lengths(rows: int, longest: int, seed: int = 0) -> list[int]:
    """Log-uniform, and one of them the longest."""
    rng = random.Random(seed)
    drawn = [round(math.exp(rng.uniform(math.log(SHORTEST), math.log(longest)))) for _ in range(rows - 1)]
    return [*drawn, longest]


class RowEnds(StoppingCriteria):
    """Each row is done at its own length."""

    def __init__(self, prompt: int, lengths: Sequence[int]):
        self.ends = torch.tensor(lengths) + prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return (input_ids.shape[1] >= self.ends).to(input_ids.device)


@torch.no_grad()
def by_generate(policy: Policy, examples: Sequence[Example], recipe: Recipe, lengths: Sequence[int]) -> float:
    """Seconds of one rollout as the trainer samples it: each prompt read once."""
    generations = recipe.grpo.num_generations
    rows = [example for example in examples for _ in range(generations)]
    groups = [number for number in range(len(examples)) for _ in range(generations)]
    started = time.perf_counter()
    inputs = prompt_inputs(policy, rows, recipe)
    options = generation_options(policy, recipe)
    ends = policy.model.generation_config.eos_token_id
    options["suppress_tokens"] = [*options["suppress_tokens"], *(ends if isinstance(ends, list) else [ends])]
    options["stopping_criteria"] = StoppingCriteriaList([RowEnds(inputs["input_ids"].shape[1], lengths)])
    images = [len(row.images) for row in rows]
    with generating(policy.model), prompts_read_once(inner_model_of(policy.model), groups, images):
        policy.model.generate(**inputs, **options | {"max_new_tokens": max(lengths)})
    return time.perf_counter() - started


class RaggedSampler(VllmSampler):
    """Every row is a request of its own length."""

    lengths: Sequence[int]

    def options_of(self, group: Group) -> dict[str, Any]:
        length = self.lengths[group.rows[0]]
        return super().options_of(group) | {
            "max_tokens": length,
            "min_tokens": length,
            "ignore_eos": True,
            "stop_token_ids": [],
        }


def by_vllm(
    sampler: RaggedSampler,
    policy: Policy,
    examples: Sequence[Example],
    recipe: Recipe,
    lengths: Sequence[int],
    step: int,
) -> float:
    """Seconds of one rollout, its adapter's loading included."""
    rows = [example for example in examples for _ in range(recipe.grpo.num_generations)]
    started = time.perf_counter()
    sampler.lengths = lengths
    _, sampled = sample_by_vllm(sampler, policy, rows, recipe, step)
    seconds = time.perf_counter() - started
    if [len(row) for row in sampled.ids] != list(lengths):
        raise SystemExit("vLLM did not sample the lengths that it was asked for")
    return seconds


def rollouts(model: str, name: str, prompts: int, longest: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each G: both engines in turns on the same prompts and lengths, best of the repeats."""
    recipe = load_recipe(
        find_recipe("tiny_cpu"),
        [
            f"model.name={model}", "rollout.engine=vllm", f"grpo.max_completion_length={longest}",
            f"grpo.num_generations={max(GROUPS)}", f"grpo.prompts_per_step={prompts}", "data.max_prompt_tokens=256",
            "grpo.completions_per_pass=1",
        ],
    )  # fmt: skip
    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=0)
    examples = load_examples("boards", recipe.data, split="train", limit=prompts).examples
    found, step = [], 0
    with serving(recipe, Path("."), examples) as servers:
        sampler = RaggedSampler(servers, policy, recipe)
        for generations in GROUPS:
            grpo = recipe.grpo.model_copy(update={"num_generations": generations})
            own = recipe.model_copy(update={"grpo": grpo})
            lengths = ragged_lengths(prompts * generations, longest)
            seconds: dict[str, list[float]] = {"transformers": [], "vllm": []}
            by_vllm(sampler, policy, examples, own, [SHORTEST] * len(lengths), step)
            by_generate(policy, examples, own, [SHORTEST] * len(lengths))
            for _ in range(repeats):
                step += 1
                seconds["vllm"].append(by_vllm(sampler, policy, examples, own, lengths, step))
                seconds["transformers"].append(by_generate(policy, examples, own, lengths))
            tokens = sum(lengths)
            rates = {engine: tokens / min(times) for engine, times in seconds.items()}
            row = {"model": name, "G": generations, "prompts": prompts, "tokens": tokens, "lengths": lengths}
            found.append({**row, "seconds": seconds, "tokens_per_second": rates})
            print(f"{name}, {prompts} x {generations}, {tokens} tokens: " + ", ".join(
                f"{engine} {min(times):.1f} s, {rates[engine]:.0f} tokens/s" for engine, times in seconds.items()
            ), flush=True)  # fmt: skip
    return found


WAYS = {
    "transformers": ("rollout.engine=transformers",),
    "vllm": (),
    "vllm, ahead": ("rollout.ahead=1",),
}
"""Of a run to sample, and the keys that choose each."""


def steps(
    folder: Path, model: str, name: str, prompts: int, generations: int, number: int, repeats: int
) -> list[dict[str, Any]]:
    """Seconds per step of tiny_cpu.yaml with this model and G, by each way in turns and with one server; a run's first
    two steps are not counted: what is sampled ahead is there from the second on.
    """
    common = [
        f"model.name={model}", "rollout.engine=vllm", f"grpo.prompts_per_step={prompts}",
        f"grpo.num_generations={generations}", f"grpo.completions_per_pass={generations * prompts}",
    ]  # fmt: skip
    recipe = load_recipe(find_recipe("tiny_cpu"), common)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    examples = load_examples("boards", recipe.data, split="train", limit=1).examples
    with serving(recipe, folder, examples) as server:
        os.environ[KEY] = server.endpoints[0].key
        for repeat in range(repeats):
            for way, changes in WAYS.items():
                run = RunDir(folder / f"{name}-{generations}-{way}-{repeat}")
                arguments = [
                    *common, f"rollout.servers=['{server.endpoints[0].url}']", f"train.max_steps={number + 2}",
                    "train.evaluate=false", "train.preflight=false", f"output.dir={run.path}", *changes,
                ]  # fmt: skip
                if apo_lora(["train", "--recipe", "tiny_cpu", *arguments]) != 0:
                    raise SystemExit(f"the run with {way} failed")
                rows = list(read_jsonl(run.metrics))[2:]
                names = ("seconds", "seconds_generate", "generated_tokens")
                found[way].append({key: sum(row[key] for row in rows) / len(rows) for key in names})
    for way, runs in found.items():
        seconds = ", ".join(f"{run['seconds']:.2f}" for run in runs)
        print(f"{name}, {prompts} x {generations}, {way}: {seconds} s per step", flush=True)
    shape = {"model": name, "G": generations, "prompts": prompts}
    return [{**shape, "way": way, "runs": runs} for way, runs in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make("31m", folder / "31m")
        models = {"embedded": "tiny", "31m": str(folder / "31m")}
        found = {
            "steps": [
                row
                for name, prompts in STEP_PROMPTS.items()
                for generations in GROUPS
                for row in steps(folder, models[name], name, prompts, generations, options.steps, options.repeats)
            ],
            "rollouts": [
                row
                for name in SIZES
                for row in rollouts(models[name], name, options.prompts, options.longest, options.repeats)
            ],
        }
        write_json(options.out, {"environment": environment() | {"vllm": VERSION}, **found})


if __name__ == "__main__":
    main()
