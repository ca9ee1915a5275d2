"""What happens around the optimizer steps: record, screen, guard against NaN, and stop on a signal."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from apo_lora.errors import Interrupted, TrainingStopped
from apo_lora.machine import ranks
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.figures import ALARM_DIFFERENCE, ALARM_SHARE, FIGURES, format_figure, is_recorded
from apo_lora.run.files import append_jsonl
from apo_lora.run.hooks import APOCallback
from apo_lora.run.learning_signal import SIGNAL_ALARM_STEPS, is_without_signal, no_signal_warning
from apo_lora.run.validation import ACCURACY, measured, why_stopped

KEPT_LOGS = 50
"""Steps whose figures stay in memory; metrics.jsonl has all."""


class MetricsWriter(TrainerCallback):
    """One line of metrics.jsonl per optimizer step."""

    def __init__(self, run_dir: RunDir):
        self.run_dir = run_dir

    def on_log(self, args, state, control, logs=None, **kwargs: Any):
        if "reward" in logs:
            figures = {name: value for name, value in logs.items() if is_recorded(name)}
            append_jsonl(self.run_dir.metrics, [{"step": state.global_step, **figures}])
            del state.log_history[:-KEPT_LOGS]  # it would grow in memory and in every checkpoint


class NonFiniteGuard(TrainerCallback):
    """Skips an optimizer step whose loss or gradient is not finite, counts it, and stops after several in a row.

    A float16 gradient that only its loss scale made infinite is not a fault: GradScaler skips the step and lowers the
    scale, so it is counted as skipped and not towards the stop.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        max_in_a_row: int,
        *,
        skipped_before: int = 0,
        scaler: Callable[[], Any] = lambda: None,
    ):
        """`skipped_before`: by the run that is continued. `scaler()` gives the torch.amp.GradScaler, or None."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_in_a_row = max_in_a_row
        self.skipped = skipped_before
        self.scaler = scaler
        self.in_a_row = 0
        self.loss_is_finite = True

    def see_loss(self, loss: torch.Tensor) -> None:
        """The loss of one micro-batch of the step under way."""
        self.loss_is_finite = self.loss_is_finite and bool(torch.isfinite(loss))

    def on_pre_optimizer_step(self, args, state, control, **kwargs: Any):
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        bad_loss, bad_gradient = ranks.summed(
            {"loss": not self.loss_is_finite, "gradient": not all(torch.isfinite(norm) for norm in norms)}
        ).values()
        self.loss_is_finite = True
        if not (bad_loss or bad_gradient):
            self.in_a_row = 0
            return
        for parameter in self.parameters:
            parameter.grad = None  # an optimizer leaves a parameter without gradient and its state unchanged
        self.skipped += 1
        scale = scaler.get_scale() if (scaler := self.scaler()) else 0
        if bad_loss or scale <= 1:
            self.in_a_row += 1
            reason = f"its {'loss' if bad_loss else 'gradient'} is NaN or infinite"
        else:
            reason = f"float16 gradient overflow at loss scale {scale:.0f}, which is halved; normal in the first steps"
        if ranks.is_main():
            tqdm.write(f"step {state.global_step + 1:>4}  skipped: {reason}; {self.skipped} so far")

    @property
    def gave_up(self) -> bool:
        return self.in_a_row >= self.max_in_a_row

    def on_step_end(self, args, state, control, **kwargs: Any):
        if self.gave_up:
            control.should_save = control.should_training_stop = True

    def stopped(self, step: int) -> TrainingStopped:
        return TrainingStopped(
            f"step {step}: the gradient was not finite in {self.in_a_row} steps in a row; each was skipped, and the "
            "last good adapter is saved. Lower train.learning_rate or raise grpo.beta, and start a new run"
        )


class TimedSave(TrainerCallback):
    """A checkpoint at the end of a rollout after this many minutes without one, by the main process's clock."""

    def __init__(self, minutes: float, steps_per_rollout: int, clock: Callable[[], float] = time.monotonic):
        self.seconds = 60 * minutes
        self.steps_per_rollout = steps_per_rollout
        self.clock = clock

    def on_train_begin(self, args, state, control, **kwargs: Any):
        self.saved = self.clock()

    def on_step_end(self, args, state, control, **kwargs: Any):
        is_due = ranks.is_main() and self.clock() - self.saved >= self.seconds
        if state.global_step % self.steps_per_rollout == 0 and ranks.any_rank(is_due):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs: Any):
        self.saved = self.clock()


ECHO_SECONDS = 1.0
"""A launcher may forward a signal that its processes already received: so soon after the first, it is the same."""


class Validation(APOCallback):
    """Every `train.eval_steps`. Keeps the best adapter, and ends a run that no longer gains, as its recipe says."""

    def __init__(
        self, run_dir: RunDir, recipe: Recipe, measure: Callable[[int], dict[str, float]], keep: Callable[[], None]
    ):
        """`measure(step)`, called on every process, gives figures.VALIDATION but the seconds; `keep()`, on the main
        one, keeps the adapter of the moment."""
        self.run_dir, self.recipe, self.measure, self.keep = run_dir, recipe, measure, keep
        self.found: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.accuracies = measured(self.run_dir)

    def on_step_end(self, args, state, control, **kwargs):
        step, train = state.global_step, self.recipe.train
        self.found = {}
        if step % train.eval_steps:
            return
        started = time.perf_counter()
        self.found = self.measure(step)
        self.found["seconds_held_out"] = time.perf_counter() - started
        is_best = self.found[ACCURACY] > max(self.accuracies.values(), default=-1.0)
        self.accuracies[step] = self.found[ACCURACY]
        if ranks.is_main():
            tqdm.write(
                f"step {step:>4}  held out: accuracy {self.found[ACCURACY]:.3f} (95 % interval "
                f"{self.found[ACCURACY + '_low']:.2f}-{self.found[ACCURACY + '_high']:.2f})"
                f"{', the best so far' * is_best}"
            )
            if is_best and self.recipe.output.keep_best:
                self.keep()
        if reason := why_stopped(self.accuracies, train.patience):
            if ranks.is_main():
                tqdm.write(f"Stopping after step {step}: {reason}.")
            control.should_save = control.should_training_stop = True

    def figures(self) -> dict[str, float]:
        return self.found


class OrderlyStop(TrainerCallback):
    """Ctrl-C or SIGTERM finishes the step (and the rollout it belongs to), saves a checkpoint and ends the run.

    A second signal stops at once, with the last checkpoint kept. A signal to one process stops them all.
    """

    def __init__(self, steps_per_rollout: int, clock: Callable[[], float] = time.monotonic):
        self.steps_per_rollout = steps_per_rollout
        self.clock = clock
        self.requested = False
        self.number = signal.SIGTERM  # also where another process was asked
        self.asked: float | None = None

    def __enter__(self) -> "OrderlyStop":
        self.previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.requested, self.number, self.asked = True, signal.Signals(number), self.clock()
            if ranks.is_main():  # past Python's streams: one of them may be in the middle of a write
                os.write(
                    2, b"\nStopping after this step and saving a checkpoint; interrupt again to stop immediately.\n"
                )
        elif self.clock() - self.asked >= ECHO_SECONDS:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs: Any):
        if state.global_step % self.steps_per_rollout == 0 and ranks.any_rank(self.requested):
            self.requested = True
            control.should_save = control.should_training_stop = True

    def stopped(self, step: int, steps: int) -> Interrupted:
        return Interrupted(
            self.number,
            f"Stopped by {self.number.name} after step {step} of {steps}; a checkpoint is saved, continue with "
            "--resume auto",
        )


class Screen(TrainerCallback):
    """A progress bar with an ETA, one line per logged step, and warnings when there is little to learn from."""

    def __init__(self, logging_steps: int):
        self.logging_steps = logging_steps
        self.steps_without_signal = 0
        self.steps_truncated = 0
        self.drifted = False

    def on_train_begin(self, args, state, control, **kwargs: Any):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", smoothing=0.1)

    def on_step_end(self, args, state, control, **kwargs: Any):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs: Any):
        if "reward" not in logs:
            return
        if state.global_step % self.logging_steps == 0 or state.global_step in (1, state.max_steps):
            self.bar.write(step_line(state.global_step, logs))
        self.steps_without_signal = self.steps_without_signal + 1 if is_without_signal(logs) else 0
        self.steps_truncated = self.steps_truncated + 1 if logs["truncated"] > ALARM_SHARE else 0
        if self.steps_without_signal == SIGNAL_ALARM_STEPS:
            self.bar.write(no_signal_warning(logs))
        if self.steps_truncated == SIGNAL_ALARM_STEPS:
            self.bar.write(
                f"warning: for {SIGNAL_ALARM_STEPS} steps more than half of the completions were cut at "
                "grpo.max_completion_length, and cut answers cannot be right. Raise it, or ask for shorter answers."
            )

        drifted = (logs.get("sampler_difference") or 0.0) > ALARM_DIFFERENCE
        if drifted and not self.drifted:
            self.bar.write(
                f"warning: the sampler's log-probs differ by {logs['sampler_difference']:.2g} nats per token from the "
                "trainer's: it may hold another base or adapter, quantise it otherwise, or be too far behind "
                "(rollout.ahead). Check rollout.quantization, or use rollout.engine=transformers."
            )
        self.drifted = drifted

    def on_train_end(self, args, state, control, **kwargs: Any):
        self.bar.close()


STEP_LINE = (
    "step {step:>4}  reward {reward}  accuracy {accuracy}  length right {length_correct} wrong {length_wrong}  "
    "KL {kl}  entropy {entropy}  {seconds} s (generate {seconds_generate}, reward {seconds_reward}, "
    "score {seconds_score}, train {seconds_train})"
)


def step_line(step: int, logs: dict[str, float | None]) -> str:
    """One step in one line."""
    return STEP_LINE.format(step=step, **{name: format_figure(name, logs.get(name)) for name in FIGURES})
