"""benchmarks/gpu, rehearsed: the same children on a tiny random model and a CPU, so that the suite cannot rot.

What it would measure on a GPU is not tested here, and its figures from here are results of nothing.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT
from forks import environment, forks_address

from apo_lora.errors import ModelError
from apo_lora.machine import vllm_environment
from benchmarks.gpu import results
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.measurements import MEASUREMENTS

CHILD = PROJECT / "tests" / "support" / "rehearsal_child.py"
PEERS = {"peers/ours-row", "peers/unsloth-thriftiest", "peers/trl-row"}
"""One of each engine; `python -m benchmarks.gpu --only peers` measures all six."""


def rehearse(folder: Path, only: str) -> int:
    return main(
        ["--out", str(folder / "out"), "--scratch", str(folder / "scratch"), "--size", "tiny", "--steps", "1",
         "--only", only],
        child=(sys.executable, str(CHILD), forks_address("unsloth")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Two commands, as on two machines. smoke/float16 cannot work on a CPU: it is the part that fails."""
    if torch.cuda.is_available():
        pytest.skip("a rehearsal is for hosts without a GPU")
    folders = [tmp_path_factory.mktemp("suite"), tmp_path_factory.mktemp("peers")]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment("unsloth").items():
            patch.setenv(name, value)
        statuses = list(map(rehearse, folders, ["smoke,recipes/gpu_8gb", ",".join(PEERS)]))
        yield SimpleNamespace(
            suite=folders[0],
            statuses=statuses,
            found=results.read(folders[0] / "out") | results.read(folders[1] / "out"),
        )


def checks(measured: dict) -> dict[str, bool]:
    return {check["name"]: check["ok"] for check in measured["checks"]}


@pytest.mark.slow
def test_a_failing_part_leaves_the_others_results(rehearsal):
    ended = {name: measured["status"] for name, measured in rehearsal.found.items()}
    assert ended.pop("smoke/float16") == "failed with exit status 1"
    assert any("float16 needs a GPU" in line for line in rehearsal.found["smoke/float16"]["last_words"])
    assert ended == dict.fromkeys(
        ["model", "smoke/bfloat16", "smoke/resume", "recipes/gpu_8gb", *sorted(PEERS)], "finished"
    )
    assert rehearsal.statuses == [1, 0]


@pytest.mark.slow
def test_the_smoke_checks_see_what_a_cpu_lacks_and_find_the_rest_in_order(rehearsal):
    found = checks(rehearsal.found["smoke/bfloat16"])
    assert {name for name, ok in found.items() if not ok} == {
        "the vision tower is torch.bfloat16",
        "the optimizer is 8-bit Adam",
        "checkpointing offloads to the host's memory",
    }
    for name in (
        "every adapted layer is 4-bit",
        "the vision tower is not quantised",
        "the trainer is ours on Unsloth's rewritten one",
        "preflight: generation uses its cache",
        "4 steps, every loss finite",
        "the adapter moved",
        "the policy left the base",
        "no weight of the base changed",
        "the reference is still the base",
        "the saved adapter, loaded by PEFT, is the trained one",
        "our loss has the gradient of Unsloth's kernel",
        "checkpointing changes no gradient",
    ):
        assert found[name], name


@pytest.mark.slow
def test_the_gradient_check_would_see_a_missing_weight(rehearsal):
    found = {check["name"]: check["found"] for check in rehearsal.found["smoke/bfloat16"]["checks"]}
    gradient = found["our loss has the gradient of Unsloth's kernel"]
    assert gradient["of the gradient"] < 1e-5  # float32 here
    assert gradient["of the gradient where the weights are left out"] > 0.1  # far over what 16 bits could explain


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_whole_one(rehearsal):
    found = checks(rehearsal.found["smoke/resume"])
    assert len(found) == 5 and all(found.values())


@pytest.mark.slow
def test_a_recipe_is_measured_against_its_plan(rehearsal):
    measured = rehearsal.found["recipes/gpu_8gb"]
    assert all(checks(measured).values()) and len(measured["checks"]) == 3
    assert all(bytes_ > 0 for bytes_ in measured["planned_bytes"].values())
    assert measured["memory"] == {"generate": None, "score": None, "train": None}  # no allocator to ask
    assert measured["load"]["rollout"] == 16 and measured["load"]["rows"] == 1
    assert measured["tokens"] == {"prompt": 16 * 280, "completion": 16 * 16}


@pytest.mark.slow
def test_peers_do_the_same_work_each_with_its_own_trainer(rehearsal):
    peers = {name: rehearsal.found[name] for name in PEERS}
    assert {m.name for m in MEASUREMENTS} >= PEERS
    assert {(m["tokens"]["prompt"], m["tokens"]["completion"]) for m in peers.values()} == {(8 * 280, 8 * 16)}
    for name, measured in peers.items():
        assert all(checks(measured).values()), name
        rewritten = (
            "the trainer is not rewritten by Unsloth" if "trl" in name else "the trainer is rewritten by Unsloth"
        )
        assert rewritten in checks(measured)
        assert all(measured["seconds"][phase] > 0 for phase in ("generate", "score", "train"))
    assert peers["peers/unsloth-thriftiest"]["switches"] == {"UNSLOTH_GRPO_LOGPROB_RECOMPUTE": "1"}


@pytest.mark.slow
def test_json_and_table_come_out_and_say_what_they_are(rehearsal):
    out = rehearsal.suite / "out"
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.json", "results.md"]
    table = results.table(rehearsal.found)
    assert table.startswith("# A rehearsal without a GPU: none of these figures is a result")
    assert "Everybody read 2,240 and wrote 128 tokens a step." in table
    (row,) = [line for line in table.splitlines() if line.startswith("| trl-row |")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:6] == ["trl-row", "1", "-", "-", "-", "-"]  # memory is a dash here
    assert all("(" in cell for cell in cells[6:])  # a time comes with its ratio to ours
    assert "smoke/float16" in (out / "log.txt").read_text()


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(rehearsal):
    dates = {name: measured["date"] for name, measured in results.read(rehearsal.suite / "out").items()}
    assert rehearse(rehearsal.suite, "smoke/resume") == 0
    assert {name: m["date"] for name, m in results.read(rehearsal.suite / "out").items()} == dates


@pytest.mark.matrix
def test_sampling_with_vllm_is_measured_beside_generate(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a rehearsal is for hosts without a GPU")
    try:
        vllm_environment.set_up()
    except ModelError as error:
        pytest.skip(f"vLLM's packages cannot be had here: {error}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment("unsloth").items():
            patch.setenv(name, value)
        assert rehearse(tmp_path, "sampling") == 0
    found = results.read(tmp_path / "out")
    steps = [found[f"sampling/{way}"] for way in ("transformers", "vllm", "vllm-ahead", "vllm-16")]
    assert all(all(checks(way).values()) and way["tokens"]["completion"] == 64 * 16 for way in steps)
    assert [row["G"] for row in found["sampling/ragged"]["rollouts"]] == [8, 16]
    table = results.table(found)
    assert "| vllm-ahead |" in table and "Completions of ragged lengths" in table


def test_a_rehearsal_refuses_a_gpu(monkeypatch):
    import rehearse_gpu_suite

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="run python -m benchmarks.gpu"):
        rehearse_gpu_suite.main()
