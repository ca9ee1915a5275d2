"""The exact models on the null GPU: PyTorch's CUDA allocator against the memory plan, and what one sampled token moves.

Each test reads what benchmarks.gpu.simulated has counted: for some recipes here and now, for all, and for stock TRL and
Unsloth, in benchmarks/results.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from conftest import PROJECT

from apo_lora.preflight import time_plan
from benchmarks.gpu import simulated_table
from benchmarks.gpu.simulated import COUNTS
from benchmarks.gpu.simulated_table import RECIPES, peer_peak
from tools.null_gpu.build import obstacle

RESULTS = PROJECT / "benchmarks" / "results" / "simulated-2026-11"

CASES = [
    pytest.param(("gpu_8gb", "qwen3_vl_2b_8gb", "single_gpu", "qwen3_vl_4b"), id="bfloat16"),
    pytest.param(("colab_t4",), id="T4, float16"),
]


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "counts.json").read_text())["measured"]


def run(folder: Path, *arguments: str, t4: bool = False) -> None:
    if obstacle():
        pytest.skip(obstacle())
    caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    environment = {**os.environ, **forks.environment("t4"), **caches}
    if t4:
        done = forks.run(["-m", *arguments], kind="t4", cwd=folder, env=environment)
    else:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def counted(folder: Path, *names: str) -> dict:
    """One step each, of which two passes are done."""
    options = ("--out", str(folder), "--scratch", str(folder), "--steps", "1", "--passes", "2")
    if names == ("recipes-colab_t4",):
        run(folder, "benchmarks.gpu.simulated_child", *names, *options, t4=True)
    else:
        run(folder, "benchmarks.gpu.simulated", *options, "--only", ",".join(names))
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


@pytest.fixture(scope="module", params=CASES)
def simulated(request, tmp_path_factory):
    """What was found, by recipe."""
    found = counted(tmp_path_factory.mktemp("simulated"), *(f"recipes-{name}" for name in request.param))
    return {name.partition("-")[2]: facts for name, facts in found.items()}


def preflight_ratio(recipe: str, found: dict) -> float:
    planned = simulated_table.preflight_peak(simulated_table.planned_for(recipe))
    return found["phases"]["preflight"]["peak_bytes"] / planned


@pytest.mark.slow
def test_peaks_are_within_a_tenth_of_the_plan(simulated):
    for recipe, found in simulated.items():
        assert found["checks"] and all(check["ok"] for check in found["checks"])
        assert set(found["memory"]) == {"generate", "score", "train"}
        preflight = preflight_ratio(recipe, found)
        for phase, ratio in {**found["memory"], "preflight": preflight}.items():
            assert abs(ratio - 1) < 0.1, (recipe, phase, ratio)


@pytest.mark.slow
def test_the_committed_figures_are_still_true(simulated, committed):
    for recipe, found in simulated.items():
        known = committed[f"recipes-{recipe}"]
        for phase, bytes_ in found["peak_bytes"].items():
            if phase in simulated_table.PHASES:
                # The first step, which is the only one here, has no optimizer state until its end.
                assert bytes_ == pytest.approx(known["peak_bytes"][phase], rel=0.04)
        for kind in ("operations", "launches", "bytes"):
            assert found["phases"]["token"][kind] == pytest.approx(known["phases"]["token"][kind], rel=0.02)


@pytest.mark.slow
def test_a_token_moves_little_more_than_weights_and_cache(simulated):
    """Above 16 rows, bitsandbytes multiplies by 16-bit copies of some 4-bit matrices, which do not count here."""
    for recipe, found in simulated.items():
        token = found["phases"]["token"]
        dequantised = sum(mover["bytes"] for name, mover in token["movers"].items() if name.endswith("dequantised"))
        assert (token["bytes"] - dequantised) / simulated_table.least_bytes_of_a_token(recipe) < 1.3
        assert dequantised == 0 or recipe in ("single_gpu", "qwen3_vl_4b")


PEERS = ("ours-row", "unsloth-default", "unsloth-thriftiest", "trl-row")


@pytest.mark.matrix
@pytest.mark.parametrize("gpu", ["rtx4090", "t4"])
def test_peers_still_peak_where_the_committed_figures_say(committed, gpu, tmp_path):
    for name, found in counted(tmp_path, *(f"peers-{gpu}-{peer}" for peer in PEERS)).items():
        assert found["checks"] and all(check["ok"] for check in found["checks"])
        assert peer_peak(found) == pytest.approx(peer_peak(committed[name]), rel=0.02), name


@pytest.mark.matrix
def test_compiled_layers_are_compiled_for_the_first_two_lengths_alone(tmp_path):
    """50 scoring and 50 training passes, no two with the same lengths; as many graphs with 2 layers as with 8."""
    run(tmp_path, "tools.null_gpu", str(PROJECT / "tests" / "support" / "compiled_layers.py"), "facts.json")
    facts = json.loads((tmp_path / "facts.json").read_text())
    graphs = facts["graphs"]
    assert len(graphs) == 50 and 0 < graphs[1] == graphs[-1] <= 25
    assert facts["breaks"] and all("<function attend at" in reason for reason in facts["breaks"])


# --- what is written down --------------------------------------------------------------------------------------------


def test_every_recipe_and_peer_was_counted(committed):
    assert list(committed) == sorted(count.name for count in COUNTS)
    of_one_gpu = {
        path.stem for path in (PROJECT / "recipes").glob("*.yaml") if "load_in_4bit: true" in path.read_text()
    } - {"multi_gpu"}
    assert set(RECIPES) == of_one_gpu


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_s_committed_peaks_are_within_a_tenth_of_today_s_plan(committed, recipe):
    peaks = simulated_table.planned_for(recipe).peaks
    peaks["generate"] = max(peaks["prefill"], peaks["decode"])
    found = committed[f"recipes-{recipe}"]
    for phase in simulated_table.PHASES:
        assert found["peak_bytes"][phase] == pytest.approx(peaks[phase], rel=0.1)
    assert preflight_ratio(recipe, found) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("peer", "most"), [("unsloth-default", 0.65), ("unsloth-thriftiest", 0.95), ("trl-group", 0.5), ("trl-row", 0.95)]
)
@pytest.mark.parametrize("gpu", ["rtx4090", "t4"])
def test_peers_need_more_memory_for_the_same_work(committed, gpu, peer, most):
    own, other = (peer_peak(committed[f"peers-{gpu}-{name}"]) for name in ("ours-row", peer))
    assert own / other < most


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
    assert all(table in page for table in simulated_table.page_tables(committed))


@pytest.mark.parametrize("name", RECIPES)
def test_the_modelled_time_counts_what_the_device_counted(committed, name):
    recipe, shape = simulated_table.recipe_and_shape(name)
    modelled = {
        "prefill": (time_plan.prefill(shape, recipe), 2),  # two rollouts and steps, of which two passes each are done
        "token": (time_plan.token(shape, recipe), 1),
        "score": (time_plan.score_pass(shape, recipe), 4),
        "train": (time_plan.train_pass(shape, recipe), 4),
    }
    for phase, (work, times) in modelled.items():
        counted = committed[f"recipes-{name}"]["phases"][phase]
        assert work.times(times).launches == pytest.approx(counted["launches"], rel=0.1)
        assert work.times(times).bytes == pytest.approx(counted["bytes"], rel=0.1)
