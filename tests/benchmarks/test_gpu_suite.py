"""benchmarks/gpu, rehearsed: the same children on a tiny random model and a CPU, so that the suite cannot rot.

What it would measure on a GPU is not tested here, and its figures from here are results of nothing.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT
from PIL import Image
from unsloth_on_cpu import ENVIRONMENT

from apo_lora.data.inputs import open_inputs
from apo_lora.errors import DataError, ModelError
from apo_lora.family.lookup import shape_from_config
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.recipe.files import load_recipe
from apo_lora.recipe.schema import Recipe
from benchmarks.gpu import card, phase_clock, random_model, results, work
from benchmarks.gpu.__main__ import main, measure
from benchmarks.gpu.measurements import CARDS, MEASUREMENTS, Measurement, Setting, selected
from benchmarks.gpu.record import Record

SUITE = PROJECT / "benchmarks" / "gpu"
REHEARSAL = (sys.executable, str(PROJECT / "tests" / "support" / "rehearse_gpu_suite.py"))
PEERS = {"peers/ours-row", "peers/unsloth-thriftiest", "peers/trl-row"}
"""One of each engine; `python -m benchmarks.gpu --only peers` measures all six."""

# --- the rehearsal ---------------------------------------------------------------------------------------------------


def rehearse(folder: Path, only: str) -> int:
    return main(
        ["--out", str(folder / "out"), "--scratch", str(folder / "scratch"), "--size", "tiny", "--steps", "1",
         "--only", only],
        child=REHEARSAL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Two commands side by side, as on two machines. smoke/float16 cannot work on a CPU: it is the part that fails."""
    if torch.cuda.is_available():
        pytest.skip("a rehearsal is for hosts without a GPU")
    folders = [tmp_path_factory.mktemp("suite"), tmp_path_factory.mktemp("peers")]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with ThreadPoolExecutor() as pool:
            statuses = list(pool.map(rehearse, folders, ["smoke,recipes/gpu_8gb", ",".join(PEERS)]))
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


def test_a_rehearsal_refuses_a_gpu(monkeypatch):
    import rehearse_gpu_suite

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="run python -m benchmarks.gpu"):
        rehearse_gpu_suite.main()


# --- children --------------------------------------------------------------------------------------------------------

STUCK = """
import subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.record import Record
Record(Path(sys.argv[sys.argv.index("--record") + 1])).check("began", lambda: (True, 1))
worker = subprocess.Popen(["sleep", "60"])
Path("worker").write_text(str(worker.pid))
time.sleep(60)
"""


def runs(stat: Path) -> bool:
    """A killed process may stay as a zombie, where nobody waits for orphans."""
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_that_hangs_is_stopped_with_its_workers_and_keeps_what_it_found(tmp_path):
    started = time.monotonic()
    child = (sys.executable, "-c", STUCK)
    found = measure(Measurement("x/y", "", 1), Setting("tiny", tmp_path), 5, child, tmp_path / "log.txt")
    assert time.monotonic() - started < 30
    assert found["status"] == "stopped after 5 seconds" and found["checks"] == [
        {"name": "began", "ok": True, "found": 1}
    ]
    worker = Path("/proc") / (tmp_path / "worker").read_text() / "stat"
    while runs(worker) and time.monotonic() - started < 30:
        time.sleep(0.05)
    assert not runs(worker)


def test_without_a_model_nothing_else_is_tried(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch"), "--size", "tiny"]
    assert main(arguments, child=(sys.executable, "-c", "raise SystemExit(3)")) == 1
    found = results.read(tmp_path / "out")
    assert {name: m["status"] for name, m in found.items()} == {"model": "failed with exit status 3"}
    assert "nothing else can be measured" in capsys.readouterr().out


def test_results_of_other_code_are_forgotten(tmp_path):
    setting = Setting("tiny", tmp_path / "scratch")
    setting.model.mkdir(parents=True)
    kept = {"status": "finished", "seconds_in_all": 1.0, "date": "2026-01-01T00:00", "checks": []}
    results.write(
        setting.folder,
        {
            "smoke/resume": {**kept, "setting": setting.fingerprint()},
            "smoke/bfloat16": {**kept, "setting": {**setting.fingerprint(), "code": "other"}},
        },
    )
    arguments = ["--out", str(tmp_path / "out"), "--scratch", str(setting.folder), "--size", "tiny", "--only", "smoke"]
    assert main([*arguments, "--budget", "0"]) == 1  # no time for what is missing
    assert list(results.read(tmp_path / "out")) == ["smoke/resume"]


def test_parts_are_selected_by_the_beginnings_of_their_names():
    assert [m.name for m in selected("peers/trl,model")] == ["model", "peers/trl-group", "peers/trl-row"]
    assert len(selected("")) == len(MEASUREMENTS)
    assert set(CARDS) == {m.name.removeprefix("recipes/") for m in selected("recipes")}
    with pytest.raises(ValueError, match="no measurement begins with smke"):
        selected("smke")


def test_a_check_that_raises_is_a_failed_one_and_the_next_is_made(tmp_path):
    record = Record(tmp_path / "record.json")
    record.check("breaks", lambda: 1 / 0)
    record.check("holds", lambda: (True, 3))
    first, second = json.loads(record.path.read_text())["checks"]
    assert first == {"name": "breaks", "ok": False, "found": "ZeroDivisionError: division by zero"}
    assert second == {"name": "holds", "ok": True, "found": 3}


def test_a_preflight_that_refuses_does_not_end_the_smoke(tmp_path, monkeypatch):
    from benchmarks.gpu import watch

    def train(recipe, recipe_name):
        if recipe.train.preflight:
            raise ModelError("scoring sees the image: it does not")
        return recipe_name

    monkeypatch.setattr(watch, "train", train)
    record = Record(tmp_path / "record.json")
    recipe = Recipe.model_validate({"data": {"train": "boards"}})
    assert watch.train_in_any_case(record, recipe, "run") == "run"
    (check,) = record.values["checks"]
    assert not check["ok"] and "it does not" in check["found"]


# --- the work --------------------------------------------------------------------------------------------------------


def test_the_random_model_has_the_published_shape_and_ids():
    ids = random_model.build_processor(random_model.ORDINARY_TOKENS["3b"]).tokenizer.get_vocab()
    published = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|image_pad|>": 151655}
    assert {token: ids[token] for token in published} == published and len(ids) == 151665
    built = random_model.build_config(QWEN2_5_VL.published["3b"], ids)
    with torch.device("meta"):
        model = random_model.Qwen2_5_VLForConditionalGeneration(built)
    expected = sum(QWEN2_5_VL.published["3b"].parameters().values())
    assert sum(p.numel() for p in model.parameters()) == expected == 3_754_622_976
    config = built.to_dict()
    assert shape_from_config(config, "random") == QWEN2_5_VL.published["3b"]
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [16, 24, 24]
    assert config["vision_config"]["fullatt_block_indexes"] == [7, 15, 23, 31]


@pytest.mark.parametrize(("pixels", "size"), [(802816, (896, 896)), (401408, (896, 448)), (200704, (448, 448))])
def test_a_picture_has_exactly_the_largest_size(pixels, size):
    assert work.picture_size(pixels) == size and size[0] * size[1] == pixels


@pytest.fixture(scope="module")
def tiny_setting(tmp_path_factory):
    setting = Setting("tiny", tmp_path_factory.mktemp("tiny"))
    random_model.make("tiny", setting.model)
    return setting


def shipped(name: str, *overrides: str) -> Recipe:
    return load_recipe(PROJECT / "recipes" / f"{name}.yaml", overrides)


GPU_RECIPES = [
    path.stem for path in sorted((PROJECT / "recipes").glob("*.yaml")) if shipped(path.stem).model.load_in_4bit
]


@pytest.mark.parametrize("name", GPU_RECIPES)
def test_the_suite_runs_every_gpu_recipe_without_a_network(tiny_setting, name):
    """conftest keeps the Hub out of reach, so what a recipe still reads from there is an error."""
    recipe = work.recipe_on_random_model(name, tiny_setting, f"offline-{name}")
    assert recipe.train.evaluate  # else held-out data would not be read anyway
    train, held_out = open_inputs(recipe)
    assert len(train.examples) == max(2, recipe.prompts_per_rollout) and not held_out
    assert Path(recipe.model.name).is_dir() and not recipe.data.benchmarks
    assert not recipe.output.report_to and not recipe.output.mirror


def test_held_out_data_of_a_recipe_needs_a_network(tiny_setting):
    """So the test above can fail."""
    assert set(CARDS) <= set(GPU_RECIPES) and shipped("colab_t4").data.eval
    recipe = work.recipe_on_random_model("colab_t4", tiny_setting, "online", "data.eval=hiyouga/geometry3k")
    with pytest.raises(DataError, match="hiyouga/geometry3k"):
        open_inputs(recipe)


def test_every_prompt_of_a_shipped_recipe_has_exactly_its_largest_length(tiny_setting):
    recipe = work.recipe_on_random_model("colab_t4", tiny_setting, "run")  # asserts it
    folder = Path(recipe.data.train).parent
    rows = [json.loads(line) for line in Path(recipe.data.train).read_text().splitlines()]
    assert len(rows) == recipe.grpo.prompts_per_step and recipe.model.dtype == "float16"
    assert {Image.open(folder / row["image"]).size for row in rows} == {work.picture_size(recipe.data.max_pixels)}


def test_every_group_is_half_right():
    assert work.alternating(["?"] * 4, answer=["3"] * 4) == [1, 0, 1, 0]


# --- how it is measured ----------------------------------------------------------------------------------------------


class FakeTrainer:
    """Calls what a GRPO trainer calls in a step; each method takes seconds of its own."""

    def __init__(self, clock):
        self.clock = clock

    def add_callback(self, callback):
        self.callback = callback

    def _generate(self):
        self.clock.now += 5

    def _calculate_rewards(self):
        self.clock.now += 0.5

    def _generate_and_score_completions(self):
        self.clock.now += 1
        self._generate()
        self._calculate_rewards()
        self.clock.now += 2
        return {"completion_mask": torch.ones(2, 10), "prompt_mask": torch.ones(2, 3)}

    def train(self, steps):
        for step in range(steps):
            self.clock.now += 100  # between steps: checkpoints, logs
            self.callback.on_step_begin(None, None, None)
            self._generate_and_score_completions()
            self.clock.now += 7 if step else 70
            self.callback.on_step_end(None, None, None)


def test_every_second_of_a_step_belongs_to_one_phase_and_the_first_step_is_not_timed(monkeypatch):
    time_ = SimpleNamespace(now=0.0)
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: time_.now)
    trainer, seen = FakeTrainer(time_), []
    clock = phase_clock.PhaseClock(trainer, lambda steps: seen.append(len(steps)))
    trainer.train(3)
    summary = clock.summary()
    assert summary["seconds"] == {"generate": 5, "reward": 0.5, "score": 3, "train": 7}
    assert summary["seconds_per_step"] == 15.5 and summary["tokens_per_second"] == 20 / 5
    assert summary["tokens"] == {"prompt": 6, "completion": 20} and seen == [1, 2, 3]


def test_a_phases_peak_is_its_own(monkeypatch):
    memory = SimpleNamespace(peak=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory.peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: memory.peak + 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(memory, "peak", 0))

    class Allocating(FakeTrainer):
        def _generate(self):
            memory.peak = 40

        def _generate_and_score_completions(self):
            memory.peak = 10
            return super()._generate_and_score_completions()

    trainer = Allocating(SimpleNamespace(now=0.0))
    clock = phase_clock.PhaseClock(trainer, lambda steps: setattr(memory, "peak", 99))  # after a step: nobody's
    trainer.callback.on_step_begin(None, None, None)
    trainer._generate_and_score_completions()
    memory.peak = 30
    trainer.callback.on_step_end(None, None, None)
    assert clock.steps[0]["peak_bytes"] == {"generate": 40, "reward": 0, "score": 10, "train": 30}
    assert clock.peak_reserved == 41


def test_a_large_card_pretends_to_be_a_small_one(monkeypatch):
    GiB = 2**30
    capped = []
    assert card.pretend_card(8) is None  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (70 * GiB, 80 * GiB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 3 * GiB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", capped.append)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=None: capped[0], raising=False)
    assert card.pretend_card(80.5) is None and capped == []  # no larger than that
    cap = card.pretend_card(8)
    assert cap == 7.5 * GiB and capped == [7.5 / 80]
    assert torch.cuda.mem_get_info() == (4.5 * GiB, cap)
    assert torch.cuda.get_per_process_memory_fraction() == 1


# --- the table -------------------------------------------------------------------------------------------------------


def peer(engine: str, rows: int, gib: float, seconds: float, tokens: int = 4096) -> dict:
    phases = ("generate", "reward", "score", "train")
    return {
        "status": "finished", "seconds_in_all": 1.0, "date": "2026-12-01T00:00", "checks": [],
        "setting": {"size": "3b", "steps": 2, "code": "abc"}, "engine": engine, "rows_at_once": rows,
        "peak_bytes": dict.fromkeys(phases, gib * 2**30), "peak_bytes_of_step": gib * 2**30,
        "seconds": dict.fromkeys(phases, seconds), "seconds_per_step": 4 * seconds,
        "tokens": {"prompt": 6144, "completion": tokens}, "tokens_per_second": tokens / seconds,
        "environment": {
            "python": "3.12.0", "packages": {"torch": "2.11.0", "xformers": None},
            "gpu": {"name": "Some Card", "memory_bytes": 80 * 2**30, "cuda": "13.0"},
        },
    }  # fmt: skip


def test_a_peer_is_set_against_ours_with_as_many_rows_at_once():
    found = {
        "peers/ours-group": peer("ours", 8, 4, 2),
        "peers/ours-row": peer("ours", 1, 2, 5),
        "peers/trl-row": peer("trl", 1, 6, 10),
    }
    table = results.table(found)
    assert table.startswith("# Measured on a GPU")
    assert "2026-12-01: Some Card, 80 GiB, CUDA 13.0; Python 3.12.0; torch 2.11.0; random weights of the 3b" in table
    (row,) = [line for line in table.splitlines() if line.startswith("| trl-row |")]
    assert row == (
        "| trl-row | 1 | 6.00 (3.00) | 6.00 (3.00) | 6.00 (3.00) | 6.00 (3.00) "
        "| 10.00 (2.00) | 10.00 (2.00) | 10.00 (2.00) | 40.00 (2.00) | 410 (0.50) |"
    )
    assert "Everybody read 6,144 and wrote 4,096 tokens a step." in table


def test_aims_are_met_or_missed_with_each_side_at_its_best():
    found = {
        "peers/ours-group": peer("ours", 8, 4, 2),
        "peers/ours-row": peer("ours", 1, 2, 5),
        "peers/unsloth-default": peer("unsloth", 8, 5, 5),
        "peers/trl-row": peer("trl", 1, 2.2, 3),
    }
    table = results.table(found)
    assert "| seconds of score + train, to stock Unsloth | 0.40 | at most 0.5 | met |" in table
    assert "| seconds of score + train, to stock TRL | 0.67 | at most 0.5 | **missed** |" in table
    assert "| peak memory, to stock Unsloth at its default | 0.40 | at most 0.5 | met |" in table
    assert "| peak memory, to stock TRL row by row | 0.91 | at most 0.85 | **missed** |" in table
    assert "thriftiest" not in table and "with the group at once" not in table  # not measured


def test_unequal_work_is_called_so():
    table = results.table({"peers/ours-row": peer("ours", 1, 2, 5), "peers/trl-row": peer("trl", 1, 6, 10, 4095)})
    assert "**Not comparable**" in table and "Everybody" not in table


def test_results_of_several_commands_are_put_together(tmp_path, monkeypatch):
    for name, number in (("a", 1.0), ("b", 2.0)):
        results.write(
            tmp_path / name, {"peers/ours-row": peer("ours", 1, number, 1), f"peers/{name}": peer("x", 1, 3, 1)}
        )
    files = [str(tmp_path / name / results.RESULTS) for name in "ab"]
    monkeypatch.setattr(sys, "argv", ["results", *files, "--to", str(tmp_path / "both")])
    results.main()
    both = results.read(tmp_path / "both")
    assert sorted(both) == ["peers/a", "peers/b", "peers/ours-row"]
    assert both["peers/ours-row"]["peak_bytes_of_step"] == 2 * 2**30  # the later file's
    assert "| a | 1 | 3.00 (1.50) |" in (tmp_path / "both" / results.TABLE).read_text()


# --- house rules -----------------------------------------------------------------------------------------------------


def test_the_suites_files_are_small_and_need_no_tests():
    for path in SUITE.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 250, path.name
        assert not any(word in text for word in ("import tests", "from tests", "unsloth_on_cpu", "UNSLOTH_ALLOW_CPU"))


def test_the_parent_needs_no_torch():
    code = "import sys, benchmarks.gpu.__main__; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "False"


def test_no_result_is_committed_that_was_not_measured_on_a_gpu():
    for path in (PROJECT / "benchmarks" / "results").rglob(results.RESULTS):
        for name, measured in json.loads(path.read_text()).items():
            assert measured["environment"]["gpu"] and measured["setting"]["size"] == "3b", name
