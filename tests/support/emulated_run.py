"""Runs in a fresh interpreter on the null GPU for test_emulated_gpu.py: the real command on the tiny model, as facts.

    python -m tools.null_gpu tests/support/emulated_run.py facts.json

The tiny model goes through Unsloth's CUDA branch, as any model does on a GPU, and every operation is computed on the
CPU. The order of imports is the command's own: the trainer comes after the model.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import apo_lora.policy.loading as loading
import apo_lora.run.callbacks as callbacks
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.files import read_jsonl
from tools.null_gpu.on_cpu import ComputedOnCPU, launches

REWARD = Path(__file__).parents[1] / "faults/rewards.py"

RECIPE = [
    "model.engine=unsloth", "model.load_in_4bit=true", "model.gradient_checkpointing=true",
    "grpo.prompts_per_step=2", "grpo.num_generations=4", "grpo.completions_per_pass=4",
    "grpo.max_completion_length=16", "grpo.temperature=1.5", f"rewards.functions=[accuracy,'{REWARD}:by_text']",
    "data.limit=8", "data.eval=null", "data.general=null",
    "train.max_steps=2", "train.warmup_steps=0", "train.learning_rate=1e-4", "output.dir=run",
]  # fmt: skip


def prepare_unsloth() -> types.ModuleType:
    """Imports Unsloth, makes its offloading reach the tiny model's activations, and mends the CPU's 4-bit kernels."""
    import unsloth  # noqa: F401  # before trl and transformers
    import unsloth_zoo.gradient_checkpointing as offloading

    from apo_lora.machine.compat import dequantize_blocks_across_rows_on_cpu

    dequantize_blocks_across_rows_on_cpu()
    initialize = offloading.initialize_unsloth_gradient_checkpointing

    def initialize_for_small_ones(*arguments: Any, **options: Any) -> None:
        initialize(*arguments, **options)
        offloading.MINIMUM_SIZE = 0

    offloading.initialize_unsloth_gradient_checkpointing = initialize_for_small_ones
    return offloading


def stance() -> str:
    """Whether torch.compile would compile what it has not seen."""
    return torch._dynamo.eval_frame._stance.stance


def watch_passes(policies: list[loading.Policy], passes: set[tuple[str, str, str, str]]) -> None:
    """The policy that is loaded; what each pass of its language model is for, its autocast dtype, stance, and the dtype
    of the adapters."""
    load = loading.load_policy

    def load_and_watch(*arguments: Any, **options: Any) -> Any:
        policy = load(*arguments, **options)
        policies.append(policy)

        def note(module: nn.Module, inputs: tuple, options: dict) -> None:
            what = "training" if torch.is_grad_enabled() else "scoring"
            what = "sampling" if options.get("past_key_values") is not None else what
            arithmetic = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
            adapters = {str(p.dtype) for name, p in module.named_parameters() if "lora_" in name}
            passes.add((what, str(arithmetic), stance(), *adapters))

        policy.model.get_base_model().model.language_model.register_forward_pre_hook(note, with_kwargs=True)
        return policy

    loading.load_policy = load_and_watch


def watch_steps(steps: list[dict[str, Any]], offloading: types.ModuleType) -> None:
    guard = callbacks.NonFiniteGuard
    original = guard.on_pre_optimizer_step

    def note(self: Any, *arguments: Any, **options: Any) -> None:
        gradients = [p.grad for p in self.parameters]
        steps.append(
            {
                "dtypes": sorted({str(p.dtype) for p in self.parameters} | {str(g.dtype) for g in gradients}),
                "finite": all(bool(g.isfinite().all()) for g in gradients),
                "not zero": sum(bool(g.any()) for g in gradients),
                "all": len(gradients),
                "scale": scaler.get_scale() if (scaler := self.scaler()) else None,
                "offloaded": not offloading.USE_UNSLOTH_GC,  # cleared at an activation that is moved
            }
        )
        offloading.USE_UNSLOTH_GC = True
        original(self, *arguments, **options)

    guard.on_pre_optimizer_step = note


def main(file: Path) -> None:
    offloading = prepare_unsloth()
    policies: list[loading.Policy] = []
    passes: set[tuple[str, str, str, str]] = set()
    steps: list[dict[str, Any]] = []
    watch_passes(policies, passes)
    watch_steps(steps, offloading)
    from apo_lora.train import train

    recipe = load_recipe(find_recipe("tiny_cpu"), RECIPE)
    launched_before = launches()
    # Attention as CPU kernels know it; the card would take one of CUDA's own.
    with ComputedOnCPU(), sdpa_kernel(SDPBackend.MATH):
        run_dir = train(recipe, recipe_name="tiny_cpu")
        policies[0].model.generate(torch.ones(1, 4, dtype=torch.long, device="cuda"), max_new_tokens=4)
    facts = {
        "passes": sorted(passes),
        "steps": steps,
        "stance after generate": stance(),
        "not computed": launches() - launched_before,
        "preflight": json.loads(run_dir.preflight.read_text()),
        "metrics": list(read_jsonl(run_dir.metrics)),
        "adapter": sorted(file.name for file in run_dir.adapter.iterdir()),
    }
    file.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
