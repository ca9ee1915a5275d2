"""Does the product work on this GPU? Four APO steps through the real entry point, and a look at everything that it
rests on. Each look is a named check; one that fails does not keep the others from being made.
"""

import json
import math
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn

from apo_lora.data.examples import load_examples
from apo_lora.policy.loading import Policy, load_policy, reference_mode
from apo_lora.policy.scoring import token_logps
from apo_lora.preflight.sample import as_batch
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.sampling import generating, prompt_inputs
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl
from apo_lora.trainer import APOTrainer
from benchmarks.gpu import smoke_gradients
from benchmarks.gpu.measurements import Setting
from benchmarks.gpu.record import Finding, Record
from benchmarks.gpu.watch import bases, is_rewritten, train_in_any_case, watched_training
from benchmarks.gpu.work import recipe_on_random_model

STEPS, HALFWAY = 4, 2  # a checkpoint each at 2 and 4


def smoke_recipe(setting: Setting, dtype: str, run: str, *overrides: str) -> Recipe:
    return recipe_on_random_model(
        "single_gpu",
        setting,
        run,
        f"model.dtype={dtype}",
        "data.max_pixels=200704",
        "data.max_prompt_tokens=600",
        "grpo.num_generations=4",
        "grpo.prompts_per_step=2",
        "grpo.completions_per_pass=4",
        "grpo.max_completion_length=64",
        "grpo.beta=0.1",  # so large that the KL's share of the gradient shows
        f"train.max_steps={STEPS}",
        f"train.save_steps={HALFWAY}",
        "train.learning_rate=1e-3",  # so large that four steps show
        *overrides,
    )


@dataclass
class Start:
    """What is kept of the moment before training."""

    trainer: APOTrainer
    policy: Policy
    batch: dict[str, Any]
    """A batch of two prompts with arbitrary completions."""
    base_logps: Tensor
    """Of the batch's completions, adapters off, (B, T)."""
    adapter: Tensor
    base_checksum: int


def train_and_check(record: Record, setting: Setting, dtype: str) -> None:
    run = f"smoke-{dtype}"
    shutil.rmtree(setting.folder / run, ignore_errors=True)
    recipe = smoke_recipe(setting, dtype, run)
    starts: list[Start] = []

    def look(trainer: APOTrainer) -> None:
        starts.append(note_start(trainer, recipe))
        check_loaded(record, trainer, torch.float16 if dtype == "float16" else torch.bfloat16)

    with watched_training(look):
        run_dir = train_in_any_case(record, recipe, run)
    (start,) = starts
    check_run(record, run_dir, most_skipped=2 if dtype == "float16" else 0)
    check_weights(record, start)
    check_optimizer(record, start.trainer, dtype)
    record.check("the saved adapter, loaded by PEFT, is the trained one", lambda: reloads(recipe, run_dir, start))
    smoke_gradients.check(record, start.trainer)  # last: it changes the adapter


def note_start(trainer: APOTrainer, recipe: Recipe) -> Start:
    policy = Policy(
        trainer.model,
        trainer.processing_class,
        engine="unsloth",
        dtype=trainer.model.get_output_embeddings().weight.dtype,
        base_name=recipe.model.name,
    )
    examples = load_examples(recipe.data.train, recipe.data, split="train").examples[:2]
    inputs = prompt_inputs(policy, examples, recipe)
    # Ordinary tokens: the first 256 are the bytes.
    ids = torch.arange(2 * 32, device=policy.model.device).view(2, 32)
    batch = as_batch(inputs, ids, examples)
    model = policy.model
    return Start(trainer, policy, batch, base_logps(model, batch), adapter_of(model), base_checksum(model))


def base_logps(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with generating(model), reference_mode(model):
        return token_logps(model, batch)[0]


def policy_logps(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with generating(model), torch.no_grad():
        return token_logps(model, batch)[0]


def adapter_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten().clone() for p in model.parameters() if p.requires_grad])


def base_checksum(model: nn.Module) -> int:
    """Of the bytes of every frozen weight, as they are stored."""
    frozen = [p.detach() for p in model.parameters() if not p.requires_grad]
    return sum((n + 1) * int(p.flatten().view(torch.uint8).sum(dtype=torch.int64)) for n, p in enumerate(frozen))


# --- before training -------------------------------------------------------------------------------------------------


def check_loaded(record: Record, trainer: APOTrainer, dtype: torch.dtype) -> None:
    modules = dict(trainer.model.named_modules())
    adapted = {name: m.base_layer for name, m in modules.items() if hasattr(m, "base_layer")}
    tower = {name: m for name, m in modules.items() if "visual" in name and hasattr(m, "weight")}
    in_4bit = [name for name, layer in adapted.items() if isinstance(layer, Linear4bit)]
    record.check(
        "every adapted layer is 4-bit",
        lambda: (bool(adapted) and len(in_4bit) == len(adapted), f"{len(in_4bit)} of {len(adapted)} layers"),
    )
    record.check(
        "adapters are on the language model only",
        lambda: (bool(adapted) and all("language_model" in name for name in adapted), f"{len(adapted)} layers"),
    )
    record.check(
        "the vision tower is not quantised",
        lambda: (bool(tower) and not any(isinstance(m, Linear4bit) for m in tower.values()), f"{len(tower)} layers"),
    )
    dtypes = sorted({str(m.weight.dtype) for m in tower.values()})
    record.check(f"the vision tower is {dtype}", lambda: (dtypes == [str(dtype)], dtypes))
    record.check("the trainer is ours on Unsloth's rewritten one", lambda: (is_rewritten(trainer), bases(trainer)))
    # Preflight switches it off where it gives something else, and says so in a check of its own.
    record.check("completions share their prompt", lambda: (trainer.shares_prompts, trainer.shares_prompts))


# --- after training --------------------------------------------------------------------------------------------------


def check_run(record: Record, run_dir: RunDir, most_skipped: int) -> None:
    """In float16 a step or two may be skipped until the scaler has found its scale."""
    for found in json.loads(run_dir.preflight.read_text()) if run_dir.preflight.exists() else ():
        record.check(f"preflight: {found['name']}", lambda found=found: (found["ok"], found["found"]))
    rows = list(read_jsonl(run_dir.metrics))
    record.put(
        metrics=[{key: row[key] for key in ("step", "loss", "kl", "grad_norm", "reward", "seconds")} for row in rows]
    )
    record.check(
        f"{STEPS} steps, every loss finite",
        lambda: (len(rows) == STEPS and all(math.isfinite(row["loss"]) for row in rows), [row["loss"] for row in rows]),
    )
    skipped = rows[-1]["skipped_nonfinite_steps"]
    record.check("gradients are finite; skipped steps", lambda: (skipped <= most_skipped, skipped))
    record.check("the KL to the base starts at 0", lambda: (rows[0]["kl"] < 1e-4, rows[0]["kl"]))


def check_weights(record: Record, start: Start) -> None:
    model = start.policy.model
    moved = (adapter_of(model) - start.adapter).abs().max().item()
    record.check("the adapter moved", lambda: (moved > 0, moved))
    record.check("the policy left the base", lambda: left_base(start))
    record.check("no weight of the base changed", lambda: same_base(start))
    record.check("the reference is still the base", lambda: same_reference(start))


def left_base(start: Start) -> Finding:
    found = (policy_logps(start.policy.model, start.batch) - start.base_logps).abs().mean().item()
    return found > 1e-3, f"{found:.2g} nats per token on average"


def same_base(start: Start) -> Finding:
    now = base_checksum(start.policy.model)
    return now == start.base_checksum, f"checksum {start.base_checksum} before, {now} after"


def same_reference(start: Start) -> Finding:
    """Its log-probs may differ by rounding: Unsloth leaves the model in another mode."""
    error = (base_logps(start.policy.model, start.batch) - start.base_logps).abs().mean().item()
    change = (policy_logps(start.policy.model, start.batch) - start.base_logps).abs().mean().item()
    return error < 0.1 * change, f"{error:.2g} nats per token, where training changed the policy by {change:.2g}"


def check_optimizer(record: Record, trainer: APOTrainer, dtype: str) -> None:
    record.check("the optimizer is 8-bit Adam", lambda: eight_bit_adam(trainer))
    if dtype == "float16":
        record.check("float16 gradients are scaled", lambda: gradient_scale(trainer))


def eight_bit_adam(trainer: APOTrainer) -> Finding:
    states = [state for tensors in trainer.optimizer.state.values() for state in tensors.values()]
    # bitsandbytes keeps the states of tensors under 4,096 elements in 32 bits.
    dtypes = sorted({str(s.dtype) for s in states if isinstance(s, Tensor) and s.numel() >= 4096})
    return "torch.uint8" in dtypes, f"{trainer.args.optim}, large states in {dtypes}"


def gradient_scale(trainer: APOTrainer) -> Finding:
    scaler = trainer.accelerator.scaler
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 0, scaler and scaler.get_scale()


def reloads(recipe: Recipe, run_dir: RunDir, start: Start) -> Finding:
    """Between the two lies at most rounding, where PEFT computes in another order than Unsloth."""
    trained = policy_logps(start.policy.model, start.batch)
    fresh = load_policy(recipe.model, recipe.lora, recipe.data, seed=1)
    loaded = PeftModel.from_pretrained(fresh.model.unload(), run_dir.adapter)
    error = (policy_logps(loaded, start.batch) - trained).abs().mean().item()
    trained_by = (trained - start.base_logps).abs().mean().item()
    return error < 0.1 * trained_by, f"{error:.2g} nats per token, where training changed {trained_by:.2g}"
