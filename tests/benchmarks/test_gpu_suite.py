"""The parts of benchmarks/gpu: the processes it starts, and the work it gives them. test_gpu_rehearsal.py runs it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from PIL import Image

from apo_lora.data.inputs import open_inputs
from apo_lora.errors import DataError, ModelError
from apo_lora.family.lookup import shape_from_config
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.machine import vllm_environment
from apo_lora.recipe.files import load_recipe
from apo_lora.recipe.schema import Recipe
from benchmarks.gpu import random_model, results, sampling, work
from benchmarks.gpu.__main__ import described, exit_status, is_done, main, measure
from benchmarks.gpu.measurements import CARDS, MEASUREMENTS, Measurement, Setting, selected
from benchmarks.gpu.record import Record

SUITE = PROJECT / "benchmarks" / "gpu"

# --- sampling --------------------------------------------------------------------------------------------------------


def test_without_vllms_environment_its_rows_are_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv(vllm_environment.PLACE, str(tmp_path / "nowhere"))
    record = Record(tmp_path / "record.json")
    sampling.steps(record, Setting("tiny", tmp_path), "vllm")
    found = {"status": "finished", "seconds_in_all": 1.0, **json.loads((tmp_path / "record.json").read_text())}
    assert "apo-lora setup-vllm" in found["skipped"] and described(found).startswith("skipped: vLLM's environment")
    assert not is_done(found)  # it is tried again once there is one
    results_by_name = {"sampling/vllm": found}
    assert exit_status(results_by_name, selected("sampling/vllm")[:1]) == 0
    table = results.table(results_by_name)
    assert "| sampling/vllm | skipped: vLLM's environment is not there" in table and "## Sampling" not in table


# --- children ---------------------------------------------------------------------------------------------------------

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


# --- the work ---------------------------------------------------------------------------------------------------------


def test_the_random_model_has_the_published_shape_and_ids():
    ids = random_model.build_processor(random_model.PUBLISHED_TOKENS).tokenizer.get_vocab()
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


@pytest.mark.parametrize(("size", "parameters"), [("qwen3-vl-2b", 2_127_532_032), ("qwen3-vl-4b", 4_437_815_808)])
def test_a_random_qwen3_vl_has_the_published_shape(size, parameters):
    ids = random_model.build_processor(random_model.PUBLISHED_TOKENS, of_qwen3=True).tokenizer.get_vocab()
    built = random_model.build_config(random_model.SHAPES[size], ids)
    with torch.device("meta"):
        model = random_model.Qwen3VLForConditionalGeneration(built)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert shape_from_config(built.to_dict(), "random") == random_model.SHAPES[size]
    assert built.vision_config.deepstack_visual_indexes == [5, 11, 17]


@pytest.mark.parametrize(("pixels", "size"), [(802816, (896, 896)), (401408, (896, 448)), (200704, (448, 448))])
def test_a_picture_has_exactly_the_largest_size(pixels, size):
    assert work.picture_size(pixels, 28) == size and size[0] * size[1] == pixels


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
    assert {Image.open(folder / row["image"]).size for row in rows} == {work.picture_size(recipe.data.max_pixels, 28)}


def test_every_group_is_half_right():
    assert work.alternating(["?"] * 4, answer=["3"] * 4) == [1, 0, 1, 0]


# --- house rules ------------------------------------------------------------------------------------------------------


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
