"""Qwen3-VL from training to export. That its prompts are shared without a difference says tests/policy."""

import json

import pytest
import torch
from conftest import PROJECT, load_base
from PIL import Image

from apo_lora.commands.main import main
from apo_lora.family.lookup import find_shape
from apo_lora.family.qwen3_vl import QWEN3_VL
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.shared_prompt.vision_features import image_features
from apo_lora.preflight.memory_plan import plan
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.model_card import model_card

BY_TEXT = f"rewards.functions=[accuracy,{PROJECT / 'tests/faults/rewards.py'}:by_text]"
LESS = ["data.eval_limit=4", "data.general=null", "grpo.max_completion_length=12"]


@pytest.fixture(scope="module")
def run(small_qwen3_vl, tmp_path_factory):
    """A folder of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = [f"model.name={small_qwen3_vl}", f"output.dir={folder}", BY_TEXT, *LESS]
    steps = ["train.max_steps=2", "train.warmup_steps=0", "grpo.num_generations=4", "grpo.prompts_per_step=2"]
    rows = ["grpo.completions_per_pass=4", "data.limit=8"]
    assert main(["train", "--recipe", "tiny_cpu", *model, *steps, *rows]) == 0
    return folder


def test_it_trains_behind_shared_prompts(run):
    checks = json.loads((run / "preflight.json").read_text())
    shared = next(check for check in checks if "shared prompt" in check["name"])
    assert all(check["ok"] for check in checks) and "LoRA gradients" in shared["found"]
    assert load_recipe(run / "recipe_trained.yaml").grpo.shared_prompt
    first, second = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert first["kl"] == 0 and second["kl"] > 0 and first["grad_norm"] > 0


def test_it_is_evaluated_asked_and_exported(run, tmp_path, capsys):
    assert main(["eval", str(run), "--limit", "2"]) == 0
    assert (run / "evaluations" / "held_out" / "eval.json").is_file()
    Image.new("RGB", (120, 80), "red").save(tmp_path / "red.png")
    assert main(["chat", str(run), "How many?", "--image", str(tmp_path / "red.png"), "--max-tokens", "4"]) == 0
    assert main(["export", str(run), "--to", "merged"]) == 0
    report = json.loads((run / "merged" / "export_report.json").read_text())
    assert [check["kind"] for check in report["checks"]] == ["text", "image"]
    assert "tuned: run" in capsys.readouterr().out


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_layer_reads_features_of_its_own(small_qwen3_vl, make_batch, layer):
    """Without one of them, the scores of a shared prompt are others."""
    policy = load_base(small_qwen3_vl)
    inner, batch = policy.model.get_base_model().model, make_batch(policy, ((96, 64), (64, 128)), lengths=(5, 3))
    batch["group"] = torch.arange(2)
    shape = find_shape(small_qwen3_vl)
    features = image_features(inner, batch)
    assert [part.shape for part in features] == [(6, shape.feature_width), (8, shape.feature_width)]
    expected, _ = token_logps(policy.model, batch)
    for part in features:
        part[:, layer * shape.hidden : (layer + 1) * shape.hidden] = 0
    changed, _ = token_logps(policy.model, batch | {"image_features": features})
    assert (changed - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen3_vl_4b", "qwen3_vl_2b_8gb"])
def test_its_recipes_and_cards_know_it(name):
    recipe = load_recipe(find_recipe(name))
    size = QWEN3_VL.published_size(recipe.model.name)
    assert find_shape(recipe.model.name) is QWEN3_VL.published[size]
    features = next(row for row in plan(QWEN3_VL.published[size], recipe).rows if row.part == "image features")
    tokens = recipe.data.max_pixels // 1024
    assert features.bytes == recipe.prompts_per_rollout * tokens * 4 * QWEN3_VL.published[size].hidden * 2
    environment = {"gpu": None, "python": "3.11", "packages": {"apo-lora": "0"}}
    assert "license: apache-2.0" in model_card(recipe, recipe.model.name, {}, 1, environment)
