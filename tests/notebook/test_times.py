"""What is said about time: modelled before a run, measured after its first steps."""

import pytest

from apo_lora.family.lookup import find_shape
from apo_lora.notebook.session import MODELLED, duration, expected_time, remaining_time
from apo_lora.preflight.time_plan import GPUS, step_work
from apo_lora.recipe.files import find_recipe, load_recipe, shipped_recipes


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (99, "99 s"), (300, "5 min"), (4800, "80 min"), (6000, "1 h 40 min")]
)
def test_a_duration_in_words(seconds, text):
    assert duration(seconds) == text


def test_the_expected_time_is_said_to_be_modelled_where_there_is_a_model():
    (line,) = expected_time("colab_t4", 60)
    assert "60 steps of 75 to 95 s (modelled, not measured)" in line and "75 min to 95 min" in line
    assert expected_time("tiny_cpu", 60) == expected_time("colab_t4", None) == []


def test_the_modelled_seconds_are_those_of_the_plan():
    assert set(MODELLED) <= set(shipped_recipes())
    for name, (low, high) in MODELLED.items():
        recipe = load_recipe(find_recipe(name))
        work = step_work(find_shape(recipe.model.name), recipe)
        (t4,) = (sum(done.seconds(gpu) for done in work.values()) for gpu in GPUS if gpu.name == "T4")
        assert low <= t4 <= low + 1 and high == pytest.approx(1.25 * t4, rel=0.02)


def test_a_t4_s_run_fits_a_session_with_everything_around_it():
    """Two hours of training at the slower end, of the three and more that free sessions have lasted."""
    recipe = load_recipe(find_recipe("colab_t4"))
    slow = MODELLED["colab_t4"][1]
    assert recipe.train.max_steps * slow <= 2 * 3600
    assert recipe.train.save_minutes <= 15  # what a cut may cost
    assert recipe.data.eval_limit <= 64


def test_the_measured_time_leaves_out_the_first_step_and_is_said_once_there_are_enough():
    assert remaining_time([30, 2, 2], 10, 3) is None
    assert remaining_time([30, 2, 9, 2], 10, 4) == "Measured: 2 s per step, so 12 s for the other 6 steps."
    assert remaining_time([30, 2, 2, 2], 4, 4) is None
