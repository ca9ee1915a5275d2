"""The command on Unsloth's CUDA branch, from loading to the adapter, with every operation computed on the CPU.

Each test reads the facts that one run of emulated_run.py on the null GPU left behind (tools/null_gpu says what that
shows and what it does not): once on a card with bfloat16, once on one without.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest

from tools.null_gpu.build import build, obstacle

SCRIPT = Path(__file__).parent / "support" / "emulated_run.py"
PROJECT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
]


CARDS = [
    pytest.param(("89", "torch.bfloat16"), id="bfloat16", marks=pytest.mark.matrix),
    pytest.param(("75", "torch.float16"), id="float16"),
]
"""Compute capabilities of an RTX 4090 and of a T4."""


@pytest.fixture(scope="module", params=CARDS)
def run(request, tmp_path_factory):
    """(facts, dtype) of a run on a card of compute capability 8.9, an RTX 4090's, and of 7.5, a T4's."""
    capability, dtype = request.param
    folder = tmp_path_factory.mktemp(f"capability-{capability}")
    caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    environment = {**os.environ, **forks.environment("t4"), **caches, "NULLGPU_CC": capability}
    if capability == "75":
        finished = forks.run([SCRIPT, "facts.json"], kind="t4", cwd=folder, env=environment)
    else:
        command = [sys.executable, "-m", "tools.null_gpu", str(SCRIPT), "facts.json"]
        finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return json.loads((folder / "facts.json").read_text()), dtype


def test_a_run_ends_with_an_adapter(run):
    facts, _ = run
    assert "adapter_model.safetensors" in facts["adapter"]
    assert [row["step"] for row in facts["metrics"]] == [1, 2]
    assert all(row["skipped_nonfinite_steps"] == 0 for row in facts["metrics"])
    assert facts["metrics"][0]["kl"] == 0 and facts["metrics"][1]["kl"] > 0  # the policy has left the base
    assert facts["preflight"] and all(check["ok"] for check in facts["preflight"])


def test_every_operation_was_computed(run):
    """Else what the other tests look at would be memory that nobody has written to."""
    assert run[0]["not computed"] == 0


def test_gradients_are_finite_float32_and_not_zero(run):
    first, second = run[0]["steps"]
    for step in (first, second):
        assert step["dtypes"] == ["torch.float32"] and step["finite"]
    assert first["not zero"] == first["all"] / 2  # B starts at 0, so A has no gradient yet
    assert second["not zero"] == second["all"]


def test_arithmetic_is_in_the_16_bits_that_the_card_has(run):
    facts, dtype = run
    assert {(what, arithmetic) for what, arithmetic, *_ in facts["passes"]} == {
        (what, dtype) for what in ("sampling", "scoring", "training")
    }
    scaled = [step["scale"] is not None for step in facts["steps"]]
    assert scaled == [dtype == "torch.float16"] * 2  # gradients overflow in float16 alone


def test_adapters_are_converted_once_for_all_tokens(run):
    facts, dtype = run
    found = {(what, adapters) for what, *_, adapters in facts["passes"]}
    assert found >= {("sampling", dtype), ("scoring", "torch.float32"), ("training", "torch.float32")}


def test_checkpointing_offloads_in_every_step(run):
    assert all(step["offloaded"] for step in run[0]["steps"])


def test_scoring_and_training_compile_after_unsloth_has_sampled(run):
    facts, _ = run
    assert facts["stance after generate"] == "eager_on_recompile"  # else compat.kept_compiler_stance can go
    assert {stance for what, _, stance, _ in facts["passes"] if what != "sampling"} == {"default"}


# --- the null GPU itself ---------------------------------------------------------------------------------------------


def test_the_null_gpu_refuses_to_load_beside_a_real_one(tmp_path):
    def loaded(*real_gpu_files: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "LD_PRELOAD": str(build(tmp_path, real_gpu_files))}
        return subprocess.run(["true"], env=environment, capture_output=True, text=True)

    assert loaded("/absent").returncode == 0
    refused = loaded("/absent", "/dev/null")
    assert refused.returncode == 2 and "beside a real GPU (/dev/null)" in refused.stderr


def test_what_the_null_gpu_computes_is_what_the_cpu_does(tmp_path):
    script = tmp_path / "product.py"
    script.write_text(PRODUCT)
    command = [sys.executable, "-m", "tools.null_gpu", str(script)]
    done = subprocess.run(command, cwd=PROJECT, env={**os.environ, "NULLGPU_BYTES": "1073741824"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == {
        "left out": [False, False, True],  # what is asked for is counted, and does not happen
        "computed": [True, True, False],
        "fits": False,
    }


PRODUCT = """
import json
import torch
from tools.null_gpu.on_cpu import ComputedOnCPU, launches

a, b = torch.randn(8, 4), torch.randn(4, 3)

def product(device):
    weight = b.to(device, copy=True).requires_grad_()
    result = a.to(device) @ weight
    result.sum().backward()
    return result.detach().cpu(), weight.grad.cpu()

expected = product("cpu")

def found():
    before = launches()
    same = [torch.equal(one, other) for one, other in zip(product("cuda"), expected)]
    return [*same, launches() > before]

left_out = found()
with ComputedOnCPU():
    computed = found()
try:
    fits = bool(torch.empty(2**30 + 1, dtype=torch.uint8, device="cuda").numel())
except torch.OutOfMemoryError:
    fits = False
print(json.dumps({"computed": computed, "left out": left_out, "fits": fits}))
"""
