"""vLLM as rollout engine, as far as a host without it can tell: off by default, refused in one line, wired as asked."""

import sys
from types import SimpleNamespace

import pytest
import torch

from apo_lora.commands.main import main
from apo_lora.errors import RecipeError
from apo_lora.family.lookup import find_shape
from apo_lora.machine import versions
from apo_lora.policy.loading import load_policy
from apo_lora.preflight.memory_plan import plan
from apo_lora.preflight.plan_table import plan_lines
from apo_lora.recipe.files import find_recipe, load_recipe, shipped_recipes
from apo_lora.rollout import vllm as vllm_rollout
from apo_lora.rollout.vllm import generation_values, loading_options, vllm_problem


def recipe_of(*overrides, name="single_gpu"):
    return load_recipe(find_recipe(name), overrides)


VLLM = recipe_of("rollout.engine=vllm")


@pytest.mark.parametrize("name", shipped_recipes())
def test_it_is_off_by_default(name):
    recipe = recipe_of(name=name)
    assert recipe.rollout.engine == "transformers"
    assert vllm_problem(recipe, has_gpu=False) is None and loading_options(recipe) == {}
    assert generation_values(recipe, never_sampled=[]) == {"use_vllm": False}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.vision=true", "lora.vision: vLLM applies adapters only to language layers"),
        ("model.engine=transformers", "model.engine: .* needs Unsloth"),
        ("model.revision=abc", "model.revision: .* default branch"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_recipe(override, words):
    with pytest.raises(RecipeError, match=words):
        recipe_of("rollout.engine=vllm", override)
    recipe_of(override)


def test_where_it_is_not_installed_one_line_says_how(capsys):
    assert main(["train", "--recipe", "tiny_cpu", "rollout.engine=vllm", "output.dir=/nowhere/run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "vllm is not installed" in line and f"pip install {versions.VLLM}" in line
    assert "rollout.engine=transformers" in line


def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(vllm_rollout, "installed", lambda package: "0.19.1")
    assert "needs a CUDA GPU" in vllm_problem(VLLM, has_gpu=False)
    assert vllm_problem(VLLM, has_gpu=True) is None


def test_unsloth_is_asked_for_an_engine_that_holds_the_longest_row(monkeypatch):
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options)
        raise OSError("enough")

    unsloth = SimpleNamespace(FastVisionModel=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    monkeypatch.setattr("apo_lora.policy.loading.choose_engine", lambda requested, has_gpu: "unsloth")
    tiny = recipe_of("rollout.engine=vllm", "rollout.vllm_gpu_memory_utilization=0.3", "lora.r=8", name="tiny_cpu")
    with pytest.raises(Exception, match="enough"):
        load_policy(tiny.model, tiny.lora, tiny.data, seed=0, unsloth_options=loading_options(tiny))
    assert asked["fast_inference"] is True and asked["max_lora_rank"] == 8
    assert asked["gpu_memory_utilization"] == 0.3
    assert asked["max_seq_length"] == tiny.data.max_prompt_tokens + tiny.grpo.max_completion_length


def test_the_arguments_take_the_values(tiny_policy, tmp_path):
    """TRL knows every key, and vision tokens are held back in vLLM's words."""
    from apo_lora.config import APOConfig
    from apo_lora.rollout.training_arguments import changed_values, config_values

    tiny = recipe_of("rollout.engine=vllm", name="tiny_cpu")
    values = config_values(tiny, tiny_policy, tmp_path, 1)
    config = APOConfig(**values)
    assert changed_values(config, values) == []
    assert config.use_vllm and config.vllm_mode == "colocate" and not config.vllm_importance_sampling_correction
    assert set(config.generation_kwargs["logit_bias"]) == set(tiny_policy.never_sampled)


def test_the_plan_says_what_it_does_not_know():
    shape = find_shape(VLLM.model.name)
    shown = "\n".join(plan_lines("single_gpu", VLLM, shape, plan(shape, VLLM), 24))
    assert "vLLM reserves 50% of the GPU memory" in shown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM needs a GPU")
@pytest.mark.gpu
def test_it_samples_on_a_gpu(tmp_path):
    pytest.importorskip("vllm")
    arguments = ["rollout.engine=vllm", "model.engine=unsloth", "train.max_steps=2", f"output.dir={tmp_path}/run"]
    assert main(["train", "--recipe", "tiny_cpu", *arguments]) == 0
