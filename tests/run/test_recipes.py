"""The recipe as asked for and as trained: both are recorded, and whatever reads a run reads what was trained."""

import json

import pytest
import torch

from apo_lora.commands.main import main
from apo_lora.preflight import checks
from apo_lora.recipe.files import load_recipe
from apo_lora.report.runs import prompt_groups, read_runs
from apo_lora.run.adapter import find_adapter
from apo_lora.run.directory import RunDir
from apo_lora.run.recipes import FITTED, fitted_as_before, trained_recipe

TINY = [
    "train.max_steps=1", "train.save_steps=1", "grpo.prompts_per_step=2", "grpo.num_generations=4",
    "grpo.completions_per_pass=8", "grpo.max_completion_length=16", "data.general=null", "data.eval_limit=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a machine that holds two completions per prompt and small images only."""
    path = tmp_path_factory.mktemp("fitted") / "run"
    real = checks.forward_and_backward

    def small_machine(policy, example, recipe):
        if recipe.grpo.num_generations > 2:
            raise torch.OutOfMemoryError("pretended")
        real(policy, example, recipe)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checks, "forward_and_backward", small_machine)
        assert main(["train", "--recipe", "tiny_cpu", *TINY, f"output.dir={path}"]) == 0
    return RunDir(path)


def test_both_are_recorded(run):
    asked, trained = load_recipe(run.recipe), load_recipe(run.recipe_trained)
    assert (asked.grpo.num_generations, trained.grpo.num_generations) == (4, 2)
    assert asked.grpo.completions_per_pass == 8 > trained.grpo.completions_per_pass
    assert asked.data.max_pixels is None and trained.data.max_pixels is not None


def test_readers_take_what_was_trained(run):
    trained = load_recipe(run.recipe_trained)
    assert trained_recipe(run) == find_adapter(run.path).recipe == trained
    (read,) = read_runs([run.path])
    assert read.recipe == trained
    assert len(list(prompt_groups(read))) == 2  # by the asked group size there would be one, of two prompts
    assert main(["eval", str(run.path), "--limit", "2"]) == 0
    settings = json.loads((run.evaluations / "held_out" / "settings.json").read_text())
    assert settings["recipe"]["data"]["max_pixels"] == trained.data.max_pixels


def test_a_continued_run_is_fitted_as_before(run):
    asked = load_recipe(run.recipe)
    assert fitted_as_before(asked, run) == load_recipe(run.recipe_trained)
    assert main(["train", "--recipe", str(run.recipe), "--resume", "auto", "train.max_steps=2"]) == 0
    assert load_recipe(run.recipe_trained).grpo.num_generations == 2  # this machine would hold four
    assert load_recipe(run.recipe).grpo.num_generations == 4


def test_a_run_of_an_earlier_version_has_one_recipe(run, tmp_path):
    old = RunDir(tmp_path)
    old.recipe.write_text(run.recipe.read_text())
    assert trained_recipe(old) == load_recipe(run.recipe)
    assert fitted_as_before(load_recipe(old.recipe), old) == load_recipe(old.recipe)


def test_preflight_changes_no_other_keys():
    assert set(checks.LADDER) <= set(FITTED)
