"""What is said on the screen: readable lines, and alarms that come once and name a way out."""

import contextlib
import io
import os
import signal
from types import SimpleNamespace

import pytest

from apo_lora.machine import ranks
from apo_lora.run.callbacks import ECHO_SECONDS, OrderlyStop, Screen, TimedSave, step_line
from apo_lora.run.learning_signal import SIGNAL_ALARM_STEPS, no_signal_warning

FIGURES = {
    "reward": 1.234, "accuracy": 0.75, "length_correct": 41.6, "length_wrong": None, "kl": 0.00123, "entropy": 0.2,
    "seconds": 3.0, "seconds_generate": 1.0, "seconds_reward": 0.1, "seconds_score": 0.4, "seconds_train": 1.5,
    "zero_variance_groups": 0.0, "all_right_groups": 0.0, "all_wrong_groups": 0.0, "truncated": 0.0,
}  # fmt: skip


def test_one_step_is_one_line_with_a_dash_for_what_is_not_there():
    line = step_line(7, FIGURES)
    assert "\n" not in line
    assert line.startswith(
        "step    7  reward 1.234  accuracy 0.750  length right 41.6 wrong -  KL 0.0012  entropy 0.200"
    )
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


# --- stopping and saving ---------------------------------------------------------------------------------------------


def control():
    return SimpleNamespace(should_save=False, should_training_stop=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_rollout(number):
    before, now = signal.getsignal(number), [0.0]
    stop = OrderlyStop(steps_per_rollout=2, clock=lambda: now[0])
    with stop:
        os.kill(os.getpid(), number)
        now[0] = ECHO_SECONDS - 0.01
        os.kill(os.getpid(), number)  # a launcher passing it on
        first, second = control(), control()
        stop.on_step_end(None, SimpleNamespace(global_step=3), first)
        stop.on_step_end(None, SimpleNamespace(global_step=4), second)
        now[0] = ECHO_SECONDS
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert not first.should_training_stop and second.should_training_stop and second.should_save
    assert signal.getsignal(number) == before
    stopped = stop.stopped(4, 10)
    assert stopped.exit_code == 128 + number and f"by {number.name} after step 4 of 10" in str(stopped)


def test_a_signal_inside_a_write_to_the_screen_is_no_error(capfd):
    """Python's buffered streams refuse to be entered twice."""
    stop = OrderlyStop(steps_per_rollout=1)

    class Interrupting(io.RawIOBase):
        def writable(self):
            return True

        def write(self, content):
            os.kill(os.getpid(), signal.SIGTERM)
            return len(content)

    stream = io.TextIOWrapper(io.BufferedWriter(Interrupting()))
    with stop, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        print("a line", flush=True)
    assert stop.requested and "Stopping after this step" in capfd.readouterr().err


def saves(minutes, steps_per_rollout, seconds_per_step, steps, saved_by_others=()):
    """The steps after which TimedSave asks for a checkpoint."""
    now, asked = [1000.0], []
    timed = TimedSave(minutes, steps_per_rollout, clock=lambda: now[0])
    timed.on_train_begin(None, None, None)
    for step in range(1, steps + 1):
        now[0] += seconds_per_step
        decision = control()
        timed.on_step_end(None, SimpleNamespace(global_step=step), decision)
        if decision.should_save:
            asked.append(step)
        if decision.should_save or step in saved_by_others:
            timed.on_save(None, None, None)
    return asked


def test_minutes_save_at_rollout_borders():
    assert saves(1, 1, seconds_per_step=20, steps=9) == [3, 6, 9]
    assert saves(1, 2, seconds_per_step=20, steps=9) == [4, 8]  # step 3 lies inside a rollout
    assert saves(1, 1, seconds_per_step=20, steps=9, saved_by_others=(2,)) == [5, 8]  # save_steps saves too
    assert saves(0.01, 3, seconds_per_step=20, steps=9) == [3, 6, 9]


def test_the_main_process_decides_when_to_save(monkeypatch):
    asked = []
    monkeypatch.setattr(ranks, "any_rank", lambda flag: asked.append(flag) or flag)
    assert saves(1, 1, 100, 1) == [1]
    monkeypatch.setenv("RANK", "1")
    assert saves(1, 1, 100, 1) == []
    assert asked == [True, False]  # both took part


def test_a_sampler_that_drifts_apart_is_an_alarm_at_once_and_once():
    assert shown_after({"sampler_difference": 0.02}, 5) == []
    (alarm,) = shown_after({"sampler_difference": 0.3}, 5)
    assert "0.3 nats per token" in alarm and "rollout.quantization" in alarm
