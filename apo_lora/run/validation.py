"""What was measured on held-out items while a run trained: the best step, and whether the run still gains."""

from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl

ACCURACY = "held_out_accuracy"


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
