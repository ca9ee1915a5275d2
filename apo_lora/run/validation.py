"""Held-out items measured while a run trains: recorded with its step, and what follows from the best so far."""

from collections.abc import Callable

from tqdm.auto import tqdm

from apo_lora.machine import ranks
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl
from apo_lora.run.hooks import APOCallback

ACCURACY = "held_out_accuracy"


class Validation(APOCallback):
    """Every `train.eval_steps`. Keeps the best adapter, and ends a run that no longer gains, as its recipe says."""

    def __init__(
        self, run_dir: RunDir, recipe: Recipe, measure: Callable[[int], dict[str, float]], keep: Callable[[], None]
    ):
        """`measure(step)`, called on every process, gives figures.VALIDATION; `keep()`, on the main one, keeps the
        adapter of the moment."""
        self.run_dir, self.recipe, self.measure, self.keep = run_dir, recipe, measure, keep
        self.found: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.accuracies = measured(self.run_dir)

    def on_step_end(self, args, state, control, **kwargs):
        step, train = state.global_step, self.recipe.train
        self.found = {}
        if step % train.eval_steps:
            return
        self.found = self.measure(step)
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


def measured(run_dir: RunDir) -> dict[int, float]:
    """Step to held-out accuracy, of the steps on record."""
    rows = read_jsonl(run_dir.metrics) if run_dir.metrics.exists() else ()
    return {row["step"]: row[ACCURACY] for row in rows if row.get(ACCURACY) is not None}


def best_step(accuracies: dict[int, float]) -> int:
    """The first with the highest accuracy."""
    return max(accuracies, key=accuracies.__getitem__)


def why_stopped(accuracies: dict[int, float], patience: int | None) -> str:
    """Why a run that was measured so does not train on; empty where it does."""
    if patience is None or not accuracies:
        return ""
    best = best_step(accuracies)
    if sum(step > best for step in accuracies) < patience:
        return ""
    return f"held-out accuracy was best at step {best}, and train.patience is {patience} measurements"
