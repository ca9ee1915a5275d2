"""The recipe's rewards as TRL calls them, with completions as either engine hands them over."""

import pytest

from apo_lora.errors import RewardError
from apo_lora.recipe.schema import RewardsSection
from apo_lora.rewards.functions import reward_functions
from apo_lora.rewards.verifier import Verifier

RIGHT, WRONG = "<think>2 + 2</think><answer>4.0</answer>", "<think>2 + 2</think><answer>5</answer>"


@pytest.fixture
def verifier():
    with Verifier(seconds_per_item=3) as verifier:
        yield verifier


@pytest.mark.parametrize("dress", [str, lambda text: [{"role": "assistant", "content": text}]])
def test_built_in_rewards(verifier, dress):
    accuracy, form = reward_functions(RewardsSection(), verifier)
    assert (accuracy.__name__, form.__name__) == ("accuracy", "format")
    completions = [dress(RIGHT), dress(WRONG), dress("4")]
    columns = {"prompts": [None] * 3, "answer": ["4"] * 3, "choices": [None] * 3, "completion_ids": [[1]] * 3}
    assert accuracy(completions=completions, **columns) == [1, 0, 1]
    assert form(completions=completions, **columns) == [0.5, 0.5, 0]


def test_own_rewards_see_message_lists(verifier, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def length(prompts, completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    section = RewardsSection(functions=("accuracy", f"{tmp_path}/mine.py:length"))
    own = reward_functions(section, verifier)[1]
    assert own(prompts=[None], completions=["four"]) == [4.0]


def test_an_own_reward_that_is_not_there_is_one_line(verifier, tmp_path):
    with pytest.raises(RewardError) as error:
        reward_functions(RewardsSection(functions=("accuracy", "no_such_module:reward")), verifier)
    assert len(error.value.problems) == 1
