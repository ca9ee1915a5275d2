"""A user's own reward function: what it may return, and how what it does wrong is said."""

import asyncio
import functools
import inspect
import math
from decimal import Decimal

import numpy
import pytest
import torch

from apo_lora.errors import RewardError
from apo_lora.rewards.calls import LARGEST, CheckedRewards, awaited, name_of
from apo_lora.rewards.functions import probe

THREE = {"prompts": ["p"] * 3, "completions": ["a", "b", "c"]}


def returning(value):
    def mine(completions, **columns):
        return value() if inspect.isfunction(value) else value

    return mine


@pytest.mark.parametrize(
    "value",
    [
        [0, True, 0.5],
        (0, 1, 0.5),
        numpy.array([0, 1, 0.5], dtype=numpy.float16),
        torch.tensor([0, 1, 0.5], requires_grad=True),
        [torch.tensor(0.0), numpy.float32(1), Decimal("0.5")],
        lambda: (number / 2 for number in (0, 2, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_holds_a_number_per_completion_is_taken(value):
    assert CheckedRewards().of(returning(value))(**THREE) == [0.0, 1.0, 0.5]


def test_what_does_not_apply_stays():
    assert CheckedRewards().of(returning([None, 1, None]))(**THREE) == [None, 1.0, None]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "returned nothing"),
        (1.0, "returned float 1.0; it must return a list"),
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([], "returned 0 rewards for 3 completions"),
        ("abc", r"returned text \('abc'\)"),
        ({"score": [1, 2, 3]}, r"returned a mapping \('score'\)"),
        ({1, 2, 3}, "returned set"),
        (["1", "0", "1"], r"returned text \('1'\) for completion 1"),
        ([1.0, {"score": 1}, 1.0], r"a mapping \('score'\), of which it must choose one number for completion 2"),
        ([1.0, 1.0, [0.5]], "a list of 1 for completion 3"),
        ([1.0, 1j, 0.0], "complex 1j for completion 2"),
        (torch.zeros(3, 2), "a list of 2 for completion 1"),
        (torch.tensor(1.0), "returned float 1.0"),
    ],
    ids=str,
)
def test_what_is_no_list_of_numbers_is_one_line(value, says):
    with pytest.raises(RewardError, match=f"^reward 'mine' {says}" if says.startswith("returned") else says) as error:
        CheckedRewards().of(returning(value))(**THREE)
    assert len(str(error.value).splitlines()) == 1


def test_numbers_that_float32_cannot_square_count_as_zero_and_are_counted(capsys):
    checked = CheckedRewards()
    values = [LARGEST, LARGEST * 1.01, 1e39, 10**400, -math.inf, math.nan]
    six = {"completions": [""] * 6}
    assert checked.of(returning(values))(**six) == [LARGEST, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert checked.replaced == 5 and capsys.readouterr().out.count("warning: mine") == 1
    assert torch.tensor([LARGEST] * 64).square().sum().isfinite()
    assert not torch.tensor([1e39]).isfinite().all()  # what such a reward would be to TRL


def raises(error):
    def mine(completions, **columns):
        raise error

    return mine


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("x"), "raised KeyError: 'x' "),
        (ZeroDivisionError("a\nb"), "raised ZeroDivisionError: a b "),
        (SystemExit(0), "raised SystemExit: 0 "),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_it_raises_is_one_line_with_its_place(error, says, is_async):
    line = inspect.getsourcelines(raises)[1] + 2

    async def later(completions, **columns):
        return raises(error)(completions)

    checked = CheckedRewards().of(later if is_async else raises(error))
    with pytest.raises(RewardError, match=says) as caught:
        asyncio.run(checked(**THREE)) if is_async else checked(**THREE)
    assert len(str(caught.value).splitlines()) == 1
    assert is_async or f"(test_calls.py line {line})" in str(caught.value)


def test_ctrl_c_is_no_fault_of_a_reward():
    with pytest.raises(KeyboardInterrupt):
        CheckedRewards().of(raises(KeyboardInterrupt()))(**THREE)


# --- async functions -------------------------------------------------------------------------------------------------


async def slow(completions, **columns):
    await asyncio.sleep(0)
    return [0.25] * len(completions)


class Judge:
    async def __call__(self, completions, **columns):
        return await slow(completions)


@pytest.mark.parametrize("function", [slow, functools.partial(slow), Judge()], ids=["plain", "partial", "object"])
def test_an_async_function_stays_one_for_trl(function):
    checked = CheckedRewards().of(function)
    assert inspect.iscoroutinefunction(checked) and checked.__name__ == name_of(function)
    assert asyncio.run(checked(**THREE)) == [0.25] * 3


def test_a_function_that_returns_a_coroutine_is_waited_for():
    assert CheckedRewards().of(lambda completions, **columns: slow(completions))(**THREE) == [0.25] * 3


def test_all_coroutines_run_in_one_loop_which_outlives_an_exit():
    async def loop():
        return asyncio.get_running_loop()

    async def leave():
        raise SystemExit(0)

    first = awaited(loop())
    with pytest.raises(SystemExit):
        awaited(leave())
    assert awaited(loop()) is first


# --- the probe -------------------------------------------------------------------------------------------------------

ITEM = {"prompt": [{"role": "user", "content": "How many?"}], "answer": "3", "choices": None, "box": [1, 2]}


def test_the_probe_is_a_group_with_every_column():
    seen = []

    def mine(prompts, completions, completion_ids, box, trainer_state, log_extra, log_metric, **columns):
        seen.append((len(prompts), len(completions), len(completion_ids), box, trainer_state.global_step, columns))
        log_metric("a", 1.0)
        return [0.0] * len(completions)

    def accuracy(**columns):
        raise AssertionError("a built-in one needs no probe")

    probe([accuracy, mine], ITEM, 4)
    ((*counts, box, step, columns),) = seen
    assert counts == [4, 4, 4] and box == [[1, 2]] * 4 and step == 0 and columns["answer"] == ["3"] * 4


def test_the_probe_says_which_columns_there_are():
    def mine(completions, solution, **columns):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="'mine' cannot be called: .*'solution'; the columns are .*, box,"):
        probe([mine], ITEM, 2)
