"""Training that starts from an adapter: where it comes from, what the reference is, and what is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stirred_adapters import stir, stirred_run
from unsloth_on_cpu import run_script

from apo_lora.commands.main import main
from apo_lora.errors import ModelError, RecipeError, UserError
from apo_lora.policy.loading import reference_mode, set_reference
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.tuned import load_start
from apo_lora.preflight.checks import check_reference, check_start
from apo_lora.preflight.memory_plan import lora_parameters, plan
from apo_lora.family.lookup import find_shape
from apo_lora.recipe.schema import Recipe
from apo_lora.run.adapter import CONFIG, WEIGHTS
from apo_lora.run.start import with_start
from apo_lora.tiny import BASE_DIR

SUPPORT = Path(__file__).parents[1] / "support"
DIRTY = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1}


def recipe_of(start, reference="base", lora=None, **model):
    lora = {**(lora or {}), "start": str(start)}
    return Recipe.model_validate(
        {"model": model, "lora": lora, "data": {"train": "boards"}, "grpo": {"reference": reference}}
    )


def started(start, reference="base", **options):
    return load_start(with_start(recipe_of(start, reference, **options)))


def scores(policy, batch):
    with torch.no_grad():
        return token_logps(policy.model, batch)[0]


def reference_scores(policy, batch):
    with reference_mode(policy.model):
        return token_logps(policy.model, batch)[0]


def trained_by_peft(folder, base=BASE_DIR, **options):
    """PEFT's own model with a stirred adapter, saved."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **DIRTY | options))
    stir(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return trained_by_peft(tmp_path_factory.mktemp("adapters") / "peft")


@pytest.fixture
def copied(adapter, tmp_path):
    return Path(shutil.copytree(adapter, tmp_path / "copied"))


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    save_file(change(weights), folder / WEIGHTS)


# --- the reference ---------------------------------------------------------------------------------------------------


def test_the_reference_is_the_base_or_the_start(adapter, make_batch, load_tiny):
    """Of KL at step 0: above 0 to the base, exactly 0 to the start; and neither moves with the policy."""
    policy = started(adapter)
    batch = make_batch(policy)
    base, start = scores(load_tiny(), batch), scores(policy, batch)
    assert (base - start).abs().max() > 0.1
    assert torch.equal(reference_scores(policy, batch), base)

    state = torch.get_rng_state()
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    set_reference(policy.model, "start")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(reference_scores(policy, batch), start) and torch.equal(scores(policy, batch), start)
    stir(policy.model.base_model.model.get_submodule("model.language_model.layers.0"), seed=1)  # as if it had trained
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(2)
    assert not torch.allclose(scores(policy, batch), start, atol=1e-2)
    stays = reference_scores(policy, batch)
    assert trained == [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    set_reference(policy.model, "base")
    assert torch.equal(reference_scores(policy, batch), base) and not torch.equal(stays, base)
