"""The exact 3B on the null GPU: PyTorch's CUDA allocator against the memory plan, and what one sampled token moves.

Each test reads what benchmarks.gpu.simulated has counted: for one recipe here and now, for all in benchmarks/results.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from apo_lora.preflight import time_plan
from benchmarks.gpu import simulated_table
from tools.null_gpu.build import obstacle

RESULTS = PROJECT / "benchmarks" / "results" / "simulated-2026-11"

CASES = [
    "gpu_8gb",
    pytest.param("colab_t4", marks=pytest.mark.matrix),
    pytest.param("single_gpu", marks=pytest.mark.matrix),
]


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "counts.json").read_text())["measured"]


def on_null_gpu(folder: Path, *command: str) -> dict:
    """The facts that a command leaves in facts.json."""
    if obstacle():
        pytest.skip(obstacle())
    own = {
        "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT),
        "TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
    }  # fmt: skip
    command = [sys.executable, "-m", "tools.null_gpu", *command]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module", params=CASES)
def simulated(request, tmp_path_factory):
    """(recipe, what was found): one step, of which two passes are done."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    options = ("--out", "facts.json", "--scratch", "scratch", "--passes", "2")
    return name, on_null_gpu(folder, "-m", "benchmarks.gpu.simulated", f"recipes/{name}", *options)


@pytest.mark.slow
def test_peaks_are_within_a_tenth_of_the_plan(simulated):
    _, found = simulated
    assert found["checks"] and all(check["ok"] for check in found["checks"])
    assert set(found["memory"]) == {"generate", "score", "train"}
    assert all(abs(ratio - 1) < 0.1 for ratio in found["memory"].values()), found["memory"]


@pytest.mark.slow
def test_the_committed_figures_are_still_true(simulated, committed):
    recipe, found = simulated
    known = committed[f"recipes-{recipe}"]
    for phase, bytes_ in found["peak_bytes"].items():
        if phase in simulated_table.PHASES:
            assert bytes_ == pytest.approx(known["peak_bytes"][phase], rel=0.02)
    for kind in ("operations", "launches", "bytes"):
        assert found["phases"]["token"][kind] == pytest.approx(known["phases"]["token"][kind], rel=0.02)


@pytest.mark.slow
def test_a_token_moves_little_more_than_weights_and_cache(simulated):
    recipe, found = simulated
    token = found["phases"]["token"]
    dequantised = sum(mover["bytes"] for name, mover in token["movers"].items() if name.endswith("dequantised"))
    assert (token["bytes"] - dequantised) / simulated_table.least_bytes_of_a_token(recipe) < 1.3
    assert dequantised == 0 or recipe == "single_gpu"  # with 64 rows bitsandbytes multiplies by 16-bit copies


@pytest.mark.matrix
def test_compiled_layers_are_compiled_for_the_first_two_lengths_alone(tmp_path):
    """50 scoring and 50 training passes, no two with the same lengths; as many graphs with 2 layers as with 8."""
    facts = on_null_gpu(tmp_path, str(PROJECT / "tests" / "support" / "compiled_layers.py"), "facts.json")
    graphs = facts["graphs"]
    assert len(graphs) == 50 and 0 < graphs[1] == graphs[-1] <= 25
    assert facts["breaks"] and all("<function attend at" in reason for reason in facts["breaks"])


# --- what is written down --------------------------------------------------------------------------------------------


def test_every_recipe_s_committed_peaks_are_within_a_tenth_of_today_s_plan(committed):
    for recipe in ("gpu_8gb", "colab_t4", "single_gpu"):
        peaks = simulated_table.planned(recipe).peaks
        peaks["generate"] = max(peaks["prefill"], peaks["decode"])
        for phase in simulated_table.PHASES:
            assert committed[f"recipes-{recipe}"]["peak_bytes"][phase] == pytest.approx(peaks[phase], rel=0.1)


def test_every_recipe_s_token_moves_at_most_1_3_times_16_bit_weights_and_cache(committed):
    recipes = [name.partition("-")[2] for name in committed if name.startswith("recipes-") and name.count("-") == 1]
    for recipe in recipes:
        least = simulated_table.least_bytes_of_a_token(recipe, in_4bit=False)
        assert committed[f"recipes-{recipe}"]["phases"]["token"]["bytes"] <= 1.3 * least, recipe
    assert len(recipes) >= 3


def test_the_tables_are_those_of_the_results(committed):
    collected = json.loads((RESULTS / "counts.json").read_text())
    assert (RESULTS / "results.md").read_text() == simulated_table.report(collected)
    page = (PROJECT / "docs" / "performance.md").read_text()
    for table in (simulated_table.peaks, simulated_table.tokens, simulated_table.steps):
        assert table(committed) in page
    assert all(simulated_table.times(recipe) in page for recipe in ("single_gpu", "colab_t4"))


@pytest.mark.parametrize("name", ["gpu_8gb", "colab_t4", "single_gpu"])
def test_the_modelled_time_counts_what_the_device_counted(committed, name):
    recipe, shape = simulated_table.recipe_and_shape(name)
    modelled = {
        "prefill": (time_plan.prefill(shape, recipe), 2),  # two rollouts and steps, of which two passes each are done
        "token": (time_plan.token(shape, recipe), 1),
        "score": (
            time_plan.score_pass(shape, recipe),
            2 * recipe.completions_per_step // recipe.grpo.completions_per_pass,
        ),
        "train": (time_plan.train_pass(shape, recipe), 4),
    }
    for phase, (work, times) in modelled.items():
        counted = committed[f"recipes-{name}"]["phases"][phase]
        assert work.times(times).launches == pytest.approx(counted["launches"], rel=0.1)
        assert work.times(times).bytes == pytest.approx(counted["bytes"], rel=0.1)
