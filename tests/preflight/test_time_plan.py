"""What the recipes' defaults take from the modelled time of a step. tests/test_simulated_gpu.py holds its counts."""

import pytest

from apo_lora.family.lookup import find_shape
from apo_lora.notebook.session import MODELLED
from apo_lora.preflight.time_plan import GPUS, step_work
from apo_lora.recipe.files import find_recipe, load_recipe


def seconds(name: str, gpu: str, *overrides: str) -> dict[str, float]:
    """Of one optimizer step, by phase."""
    recipe = load_recipe(find_recipe(name), overrides)
    (card,) = (card for card in GPUS if card.name == gpu)
    return {phase: work.seconds(card) for phase, work in step_work(find_shape(recipe.model.name), recipe).items()}


def test_a_t4_session_shows_progress_within_20_minutes():
    """Also where steps take the longest we expect: the learning rate has warmed up, and a checkpoint is saved."""
    recipe = load_recipe(find_recipe("colab_t4"))
    low, high = MODELLED["colab_t4"]
    assert low == pytest.approx(sum(seconds("colab_t4", "T4").values()), rel=0.02)
    assert max(recipe.train.warmup_steps, recipe.train.save_steps) * high < 20 * 60
    assert recipe.train.max_steps * high < 3 * 60 * 60  # and the whole run fits a free session


@pytest.mark.parametrize("gpu", ["RTX 3090", "RTX 4090"])
def test_half_as_many_completions_would_take_as_long_to_sample(gpu):
    """Launches limit decoding, and they are as many: so a 24 GB card samples the released 64 at once."""
    whole, half = (seconds("single_gpu", gpu, f"grpo.prompts_per_step={number}") for number in (8, 4))
    assert half["decode"] == pytest.approx(whole["decode"])
    assert half["training"] == pytest.approx(whole["training"] / 2, rel=0.1)


def test_a_t4_would_wait_longer_for_twice_as_many():
    """Above 16 rows bitsandbytes dequantises: more launches for each token."""
    assert seconds("colab_t4", "T4", "grpo.prompts_per_step=4")["decode"] > 1.2 * seconds("colab_t4", "T4")["decode"]
