"""The recipe's rewards as TRL calls them, with completions as either engine hands them over."""

import sys

import pytest
from PIL import Image

from apo_lora.errors import RewardError
from apo_lora.recipe.schema import RewardsSection
from apo_lora.rewards.functions import are_correct, reward_functions
from apo_lora.rewards.plugins import source_files
from apo_lora.rewards.verifier import Verifier

RIGHT, WRONG = "<think>2 + 2</think><answer>4.0</answer>", "<think>2 + 2</think><answer>5</answer>"


@pytest.fixture(scope="module")
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


JUDGED = [  # completion, gold, choices
    ("<answer>41</answer>", "40", None),
    ("<answer>40</answer>", "40", None),
    ("<answer>[0, 0, 10, 6]</answer>", "[0, 0, 10, 10]", None),
    ("<answer>[0, 0, 10, 4]</answer>", "[0, 0, 10, 10]", None),
    ("<answer>B</answer>", "B", ["cat", "dog"]),
]


@pytest.mark.parametrize(
    ("correct_by", "expected"),
    [
        ("accuracy", [0, 1, 0, 0, 1]),
        ("relaxed", [1, 1, 0, 0, 1]),
        ("iou", [0, 1, 1, 0, 1]),  # answers without a box by accuracy
        ("mine:own", [0, 1, 0, 0, 1]),  # needs more than a held-out item's answer
    ],
)
def test_held_out_items_are_judged_by_what_training_calls_correct(verifier, correct_by, expected):
    section = RewardsSection(functions=(correct_by,), correct_by=correct_by, correct_from=0.5)
    columns = map(list, zip(*JUDGED, strict=True))
    assert are_correct(*columns, section, verifier.score) == [bool(right) for right in expected]


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


def test_what_an_own_reward_changes_in_its_columns_is_its_own(verifier, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def greedy(completions, boxes, images, **columns):\n"
        "    completions[0][0]['content'] = 'mine'\n"
        "    boxes[0]['x'].append(9)\n"
        "    images[0][0].putpixel((0, 0), 9)\n"
        "    assert images[1][0] is images[0][0]\n"
        "    return [float(len(boxes[0]['x']))] * 2\n"
    )
    own = reward_functions(RewardsSection(functions=("accuracy", f"{tmp_path}/mine.py:greedy")), verifier)[1]
    completions, boxes = [[{"role": "assistant", "content": "four"}] for _ in range(2)], [{"x": [1]}, {"x": [1]}]
    image = Image.new("L", (2, 2))
    for _ in range(2):
        assert own(prompts=[None] * 2, completions=completions, boxes=boxes, images=[[image], [image]]) == [2.0, 2.0]
    assert completions[0][0]["content"] == "four" and boxes[0] == {"x": [1]} and image.getpixel((0, 0)) == 0


def test_an_async_own_reward_is_waited_for(verifier, tmp_path):
    (tmp_path / "mine.py").write_text("async def f(completions, **columns):\n    return [0.5] * len(completions)\n")
    own = reward_functions(RewardsSection(functions=("accuracy", f"{tmp_path}/mine.py:f")), verifier)[1]
    assert own(prompts=[None], completions=["four"]) == [0.5]


@pytest.fixture
def own_imports(monkeypatch):
    """Modules and the path as they are; afterwards as before."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_reward_file_may_import_its_neighbours_now_and_later(verifier, tmp_path, own_imports):
    (tmp_path / "near_by.py").write_text("BONUS = 0.25\n")
    (tmp_path / "later_on.py").write_text("BONUS = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from near_by import BONUS\n"
        "def f(completions, **columns):\n"
        "    import later_on\n"
        "    return [BONUS + later_on.BONUS] * len(completions)\n"
    )
    before = sys.path[0]
    name = f"{tmp_path}/mine.py:f"
    own = reward_functions(RewardsSection(functions=("accuracy", name)), verifier)[1]
    assert sys.path[0] == before  # libraries that are imported later come first
    assert [path.name for path in source_files(name)] == ["mine.py", "near_by.py"]
    assert not (tmp_path / "__pycache__").exists()
    assert own(prompts=[None], completions=["four"]) == [0.75]


def test_a_module_is_looked_for_in_the_working_directory(verifier, tmp_path, own_imports, monkeypatch):
    """As `python -m` does; the installed command has only its own folder on the path."""
    monkeypatch.chdir(tmp_path)
    sys.path[:] = [entry for entry in sys.path if entry]
    (tmp_path / "rewards_of_mine.py").write_text("def f(completions, **columns):\n    return [1] * len(completions)\n")
    own = reward_functions(RewardsSection(functions=("accuracy", "rewards_of_mine:f")), verifier)[1]
    assert own(prompts=[None], completions=["four"]) == [1]
    assert [path.name for path in source_files("rewards_of_mine:f")] == ["rewards_of_mine.py"]
    assert source_files("accuracy") == []
