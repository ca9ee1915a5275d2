"""An adapter is found in a run or in its own folder. What is none is in bad_input_cases.py."""

import json

import pytest

from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.adapter import CONFIG, WEIGHTS, find_adapter, on_its_base, recipe_for


@pytest.fixture
def run(tmp_path):
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / CONFIG).write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (adapter / WEIGHTS).write_bytes(b"")
    (tmp_path / "run" / "recipe.yaml").write_text(find_recipe("tiny_cpu").read_text())
    return tmp_path / "run"


def test_a_run_knows_its_recipe(run):
    source = find_adapter(run)
    assert source.folder == run / "adapter" and source.base_name == "some/base"
    assert source.recipe.model.name == "tiny" and source.run.path == run


def test_a_folder_of_its_own_has_no_run(run):
    source = find_adapter(str(run / "adapter"))
    assert source.folder == run / "adapter" and source.run is None and source.recipe is None


def named(run, base):
    (run / "adapter" / CONFIG).write_text(json.dumps({"base_model_name_or_path": base}))
    return find_adapter(run)


def test_a_base_named_from_where_it_was_trained_is_found(run, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert named(run, "models/mine").base_name == "models/mine"  # nothing is there: a Hub id
    base = tmp_path / "models" / "mine"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    assert named(run, "models/mine").base_name == named(run, "./models/mine").base_name == str(base)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named(run, "~/models/mine").base_name == str(base)


def test_a_run_is_asked_on_the_base_that_its_adapter_names(run, tmp_path, monkeypatch):
    recipe = load_recipe(find_recipe("tiny_cpu"), ["model.name=models/mine"])
    base = tmp_path / "models" / "mine"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    source = named(run, str(base))
    monkeypatch.chdir("/")
    assert recipe_for(source, None).model.name == str(base)
    monkeypatch.chdir(tmp_path)
    assert recipe_for(source, None).model.name == "models/mine"
    assert on_its_base(load_recipe(find_recipe("tiny_cpu")), source).model.name == "tiny"
