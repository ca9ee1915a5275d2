"""Runs on the null GPU for test_simulated_gpu.py: how often Unsloth's compiled layers are compiled anew, as facts.

    python -m tools.null_gpu tests/support/compiled_layers.py facts.json

Scoring and training passes of a random model of two layers, every one with other lengths, families and rows. Layers are
traced as for a GPU; what the compiler behind Dynamo would make of a graph is left out.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from apo_lora.machine.process import prepare_process

prepare_process()

import torch  # noqa: E402

compile_for_gpu = torch.compile


def compile_to_graphs(model: Any = None, **options: Any) -> Any:
    kept = {name: value for name, value in options.items() if name in ("fullgraph", "dynamic")}
    return compile_for_gpu(model, backend="eager", **kept)


torch.compile = compile_to_graphs

import unsloth  # noqa: E402, F401

from apo_lora.policy.loading import load_policy, reference_mode  # noqa: E402
from apo_lora.policy.shared_prompt.attention import PromptGroup, PromptGroups  # noqa: E402
from apo_lora.recipe.schema import DataSection, LoraSection, ModelSection  # noqa: E402
from benchmarks.gpu.random_model import make  # noqa: E402

PASSES = 50


def main(file: Path) -> None:
    make("tiny", Path("model"), sparse=True)
    section = ModelSection(name="model", engine="unsloth", load_in_4bit=True, gradient_checkpointing=True)
    policy = load_policy(section, LoraSection(), DataSection(train="boards"), seed=0)
    policy.model.for_training()
    language_model, rng, graphs = policy.model.get_base_model().model.language_model, random.Random(0), []
    counters = torch._dynamo.utils.counters

    def one(with_gradient: bool) -> None:
        sizes = [(rng.randint(40, 300), [rng.randint(1, 90) for _ in range(rng.randint(1, 6))]) for _ in range(2)]
        sizes = sizes[: rng.randint(1, 2)]
        length = sum(prompt + sum(completions) for prompt, completions in sizes)
        width = language_model.config.hidden_size
        embeds = torch.zeros(1, length, width, device="cuda", dtype=policy.dtype, requires_grad=with_gradient)
        hidden = language_model(
            inputs_embeds=embeds,
            position_ids=torch.zeros(3, 1, length, device="cuda", dtype=torch.long),
            prompt_groups=PromptGroups(*(PromptGroup(p, tuple(c)) for p, c in sizes)),
            use_cache=False,
        )[0]
        if with_gradient:
            hidden.sum().backward()

    for _ in range(PASSES):
        with policy.autocast(), reference_mode(policy.model):
            one(with_gradient=False)
        with policy.autocast():
            one(with_gradient=True)
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = {reason: times for kind in ("graph_break", "unimplemented") for reason, times in counters[kind].items()}
    file.write_text(json.dumps({"graphs": graphs, "breaks": breaks}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
