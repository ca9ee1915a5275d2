"""What is said on the screen: readable lines, and alarms that come once and name a way out."""

import os
import signal
from types import SimpleNamespace

import pytest

from apo_lora.callbacks import OrderlyStop, Screen, step_line
from apo_lora.learning_signal import SIGNAL_ALARM_STEPS, no_signal_warning

FIGURES = {
    "reward": 1.234, "accuracy": 0.75, "length_correct": 41.6, "length_wrong": None, "kl": 0.00123, "entropy": 0.2,
    "seconds": 3.0, "seconds_generate": 1.0, "seconds_reward": 0.1, "seconds_score": 0.4, "seconds_train": 1.5,
    "zero_variance_groups": 0.0, "all_right_groups": 0.0, "all_wrong_groups": 0.0, "truncated": 0.0,
}  # fmt: skip


def test_one_step_is_one_line_with_a_dash_for_what_is_not_there():
    line = step_line(7, FIGURES)
    assert "\n" not in line
    assert line.startswith("step    7  reward 1.23  accuracy 0.75  length right 42 wrong -  KL 0.0012  entropy 0.200")
    assert "generate 1.0, reward 0.1, score 0.4, train 1.5" in line


def shown_after(changes, steps):
    """What Screen writes over some steps with these figures."""
    screen, written = Screen(logging_steps=1000), []
    screen.bar = SimpleNamespace(write=written.append)
    for step in range(2, steps + 2):
        screen.on_log(None, SimpleNamespace(global_step=step, max_steps=10_000), None, logs={**FIGURES, **changes})
    return written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_variance_groups": 0.6, "all_wrong_groups": 0.6}, "all wrong"),
        ({"zero_variance_groups": 0.6, "all_right_groups": 0.6}, "too easy"),
        ({"truncated": 0.6}, "grpo.max_completion_length"),
    ],
)
def test_an_alarm_comes_once_after_ten_steps(changes, words):
    assert shown_after(changes, SIGNAL_ALARM_STEPS - 1) == []
    (alarm,) = shown_after(changes, 3 * SIGNAL_ALARM_STEPS)
    assert alarm.startswith("warning: ") and words in alarm


def test_no_alarm_where_half_the_groups_teach():
    assert shown_after({"zero_variance_groups": 0.5, "truncated": 0.5}, 30) == []


def test_the_alarm_points_at_the_reward_check_when_all_is_wrong():
    assert "check-rewards" in no_signal_warning({"all_right_groups": 0.0, "all_wrong_groups": 0.9})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_rollout(number, capsys):
    before = signal.getsignal(number)
    stop = OrderlyStop(steps_per_rollout=2)
    with stop:
        os.kill(os.getpid(), number)
        first, second = (SimpleNamespace(should_save=False, should_training_stop=False) for _ in range(2))
        stop.on_step_end(None, SimpleNamespace(global_step=3), first)
        stop.on_step_end(None, SimpleNamespace(global_step=4), second)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert not first.should_training_stop and second.should_training_stop and second.should_save
    assert signal.getsignal(number) == before
