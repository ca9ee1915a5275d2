"""Does a run that was stopped go on as if it had not been? From the checkpoint halfway, in a copy of smoke.py's run."""

import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl
from apo_lora.train import train
from benchmarks.gpu.measurements import Setting
from benchmarks.gpu.record import Finding, Record
from benchmarks.gpu.smoke import HALFWAY, STEPS, smoke_recipe


def resume_and_check(record: Record, setting: Setting) -> None:
    """In another process than the run's, as after a kill."""
    whole, again = RunDir(setting.folder / "smoke-auto"), RunDir(setting.folder / "smoke-resumed")
    shutil.rmtree(again.path, ignore_errors=True)
    shutil.copytree(whole.path, again.path)
    recipe = smoke_recipe(setting, "auto", "smoke-auto", f"output.dir={again.path}", "train.preflight=false")
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
