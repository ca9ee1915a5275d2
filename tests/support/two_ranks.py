"""What one process of a run does, for test_ranks.py, which starts it once or twice.

python two_ranks.py gradient FOLDER             one step on completions that do not depend on the processes
python two_ranks.py command FOLDER ARGUMENTS    `apo-lora ARGUMENTS`, and what this process wrote
"""

import json
import os
import random
import sys
from pathlib import Path

PROMPTS, GENERATIONS, MAX_TOKENS = 3, 6, 24  # on two processes, the second group lies half here and half there


def gradient(folder: Path) -> None:
    from tiny_trainer import LOSSES

    from apo_lora.machine import ranks

    with ranks.joined():
        for name, options in LOSSES.items():
            save(gradient_of(folder / f"{name}-{ranks.rank()}", options), folder, name)


def save(facts: dict, folder: Path, name: str) -> None:
    import torch

    from apo_lora.machine import ranks

    torch.save(facts, folder / f"{name}-{ranks.num_processes()}-{ranks.rank()}.pt")


def gradient_of(folder: Path, options: dict) -> dict:
    """One step's gradient and figures, with these options of `grpo`, from an older policy's completions."""
    import torch
    from stirred_adapters import stir
    from tiny_trainer import from_an_older_policy
    from transformers import TrainerCallback

    from apo_lora.data.examples import load_examples
    from apo_lora.data.items import prompt_dataset
    from apo_lora.machine import ranks
    from apo_lora.policy.loading import load_policy
    from apo_lora.recipe.schema import Recipe
    from apo_lora.rollout.training_arguments import training_arguments
    from apo_lora.run.directory import RunDir
    from apo_lora.trainer import APOTrainer

    recipe = Recipe.model_validate(
        {
            "data": {"train": "boards", "limit": PROMPTS},
            "rewards": {"functions": ("accuracy",)},
            "grpo": {
                "num_generations": GENERATIONS, "prompts_per_step": PROMPTS, "completions_per_pass": 3,
                "max_completion_length": MAX_TOKENS, "beta": 0.1, "num_iterations": 2, **options,
            },
            "apo": {"dads": "complement_exp", "stcr": 1.05},
            "train": {"max_steps": 1, "learning_rate": 1e-2},
        }
    )  # fmt: skip

    def accuracy(completions, completion_ids, **columns):
        return [float(sum(ids) % 2) for ids in completion_ids]

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=0)
    stir(policy.model, scale=0.1)  # a fresh adapter has no KL
    run_dir = RunDir(folder)
    run_dir.create()
    examples = load_examples("boards", recipe.data, split="train", limit=PROMPTS).examples
    watch = Watch()
    trainer = APOTrainer(
        policy.model,
        [accuracy],
        training_arguments(recipe, policy, run_dir.checkpoints, 1),
        processing_class=policy.processor,
        train_dataset=prompt_dataset(examples, recipe.data),
        callbacks=[watch],
    )
    from_an_older_policy(trainer)
    generate = trainer._generate_single_turn

    def same_everywhere(prompt_ids, *arguments, **options):
        """Completions by their place in the rollout."""
        output = list(generate(prompt_ids, *arguments, **options))
        first = ranks.rank() * len(prompt_ids)
        output[0] = [completion(first + place, trainer.eos_token_ids) for place in range(len(prompt_ids))]
        return tuple(output)

    def remember(parameters):
        watch.alone = torch.cat([p.grad.flatten() for p in parameters])
        sum_gradients(parameters)

    trainer._generate_single_turn = same_everywhere
    sum_gradients, ranks.sum_gradients = ranks.sum_gradients, remember
    try:
        trainer.train()
    finally:
        ranks.sum_gradients = sum_gradients
    log = next(log for log in trainer.state.log_history if "reward" in log)
    return {"gradient": watch.gradient, "alone": watch.alone, "log": log}


def completion(place: int, ends: list[int]) -> list[int]:
    rng = random.Random(place)
    return [rng.randrange(10, 200) for _ in range(rng.randrange(2, MAX_TOKENS))] + list(ends)[:1]


def command(folder: Path, *arguments: str) -> int:
    """`apo-lora ARGUMENTS`; leaves the paths under FOLDER that this process opened for writing, made or removed."""
    written = set()

    def watch(event: str, details: tuple) -> None:
        if event == "open" and isinstance(details[0], str) and not details[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            path = str(details[0])
            if path.startswith(str(folder)):
                written.add(os.path.relpath(path, folder))

    sys.addaudithook(watch)
    from apo_lora.commands.main import main

    code = main(arguments)
    rank = os.environ.get("RANK", "0")
    (folder / f"written-{rank}.json").write_text(json.dumps(sorted(written)))
    return code


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    sys.exit({"gradient": gradient, "command": command}[what](Path(folder), *rest))
