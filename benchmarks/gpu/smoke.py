"""Does the product work on this GPU? Four APO steps through the real entry point, and a look at everything that it
rests on. Each look is a named check; one that fails does not keep the others from being made.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from apo_lora.data import load_examples
from apo_lora.model import Policy, load_policy, reference_mode
from apo_lora.preflight import as_batch
from apo_lora.recipe import Recipe
from apo_lora.run_dir import RunDir, read_jsonl
from apo_lora.sampling import prompt_inputs
from apo_lora.scoring import token_logps
from apo_lora.train import train
from apo_lora.trainer import APOTrainer
from benchmarks.gpu import smoke_gradients
from benchmarks.gpu.measurements import Setting
from benchmarks.gpu.record import Finding, Record
from benchmarks.gpu.watch import bases, is_rewritten, watched_training
from benchmarks.gpu.work import recipe_on_random_model

STEPS, HALFWAY = 4, 2


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
    probe: dict[str, Any]
    """A batch of two prompts with arbitrary completions."""
    base_logps: Tensor
    """Of the probe's completions, adapters off, (B, T)."""
    adapter: Tensor


def train_and_check(record: Record, setting: Setting, dtype: str) -> None:
    run = f"smoke-{dtype}"
    shutil.rmtree(setting.folder / run, ignore_errors=True)
    recipe = smoke_recipe(setting, dtype, run)
    starts: list[Start] = []

    def look(trainer: APOTrainer) -> None:
        starts.append(note_start(trainer, recipe))
        check_loaded(record, trainer, torch.float16 if dtype == "float16" else torch.bfloat16)

    with watched_training(look):
        run_dir = train(recipe, recipe_name=run)
    (start,) = starts
    check_run(record, run_dir)
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
    probe = as_batch(inputs, ids, examples)
    return Start(trainer, policy, probe, base_logps(policy.model, probe), adapter_of(policy.model))


def base_logps(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with reference_mode(model):
        return token_logps(model, batch)[0]


def adapter_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten().clone() for p in model.parameters() if p.requires_grad])


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


# --- after training --------------------------------------------------------------------------------------------------


def check_run(record: Record, run_dir: RunDir) -> None:
    for found in json.loads(run_dir.preflight.read_text()):
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
    record.check("no step was skipped for a gradient that is not finite", lambda: (skipped == 0, skipped))
    record.check("the KL to the base starts at 0", lambda: (rows[0]["kl"] == 0, rows[0]["kl"]))


def check_weights(record: Record, start: Start) -> None:
    model = start.policy.model
    moved = (adapter_of(model) - start.adapter).abs().max().item()
    record.check("the adapter moved", lambda: (moved > 0, moved))
    record.check("the policy left the base", lambda: left_base(start))
    change = (base_logps(model, start.probe) - start.base_logps).abs().max().item()
    record.check("after training the reference is still the base, in nats", lambda: (change == 0, change))


def left_base(start: Start) -> Finding:
    found = (policy_logps(start.policy.model, start.probe) - start.base_logps).abs().mean().item()
    return found > 1e-3, f"{found:.2g} nats per token on average"


def policy_logps(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return token_logps(model, batch)[0]


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
    trained = policy_logps(start.policy.model, start.probe)
    fresh = load_policy(recipe.model, recipe.lora, recipe.data, seed=1)
    loaded = PeftModel.from_pretrained(fresh.model.unload(), run_dir.adapter)
    error = (policy_logps(loaded, start.probe) - trained).abs().mean().item()
    trained_by = (trained - start.base_logps).abs().mean().item()
    return error < 0.1 * trained_by, f"{error:.2g} nats per token, where training changed {trained_by:.2g}"


# --- resume ----------------------------------------------------------------------------------------------------------


def resume_and_check(record: Record, setting: Setting) -> None:
    """In a process of its own, as after a kill: from the checkpoint halfway, in a copy of the finished run."""
    whole, again = RunDir(setting.folder / "smoke-auto"), RunDir(setting.folder / "smoke-resumed")
    shutil.rmtree(again.path, ignore_errors=True)
    shutil.copytree(whole.path, again.path)
    recipe = smoke_recipe(setting, "auto", "smoke-auto", f"output.dir={again.path}")
    checkpoint = again.checkpoints / f"checkpoint-{HALFWAY}"
    halfway = saved_adapter(checkpoint)
    train(recipe, recipe_name="smoke-auto", resume=str(checkpoint))
    for step in range(HALFWAY + 1, STEPS + 1):
        record.check(f"resumed, step {step} samples the same", lambda step=step: same_completions(whole, again, step))
        record.check(f"resumed, step {step} has the same loss", lambda step=step: same_loss(whole, again, step))
    record.check("resumed, the adapter ends the same", lambda: same_adapter(whole, again, halfway))


def same_completions(whole: RunDir, again: RunDir, step: int) -> Finding:
    pairs = list(zip(texts_of(whole, step), texts_of(again, step), strict=True))
    same = sum(one == other for one, other in pairs)
    return bool(pairs) and same == len(pairs), f"{same} of {len(pairs)} completions"


def texts_of(run_dir: RunDir, step: int) -> list[str]:
    return [row["completion"] for row in read_jsonl(run_dir.completions) if row["step"] == step]


def same_loss(whole: RunDir, again: RunDir, step: int) -> Finding:
    one, other = (next(r["loss"] for r in read_jsonl(run.metrics) if r["step"] == step) for run in (whole, again))
    return math.isclose(one, other, rel_tol=1e-2, abs_tol=1e-5), f"{one:.6g} and {other:.6g}"


def same_adapter(whole: RunDir, again: RunDir, halfway: Tensor) -> Finding:
    one, other = saved_adapter(whole.adapter), saved_adapter(again.adapter)
    apart = ((one - other).norm() / (one - halfway).norm()).item()
    return apart < 0.05, f"apart by {apart:.2g} of what the steps after the checkpoint moved it"


def saved_adapter(folder: Path) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])
