"""TensorBoard, Weights & Biases, Trackio: whether they are installed, and where their files go. No torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from apo_lora.errors import UserError
from apo_lora.machine.versions import installed
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir


def require_trackers(recipe: Recipe) -> None:
    """Raises UserError for a tracker of `output.report_to` that is not installed."""
    missing = [name for name in recipe.output.report_to if installed(name) is None]
    if missing:
        raise UserError(*(f"output.report_to: {name} is not installed; pip install {name}" for name in missing))


@contextmanager
def trackers_in(run_dir: RunDir) -> Iterator[None]:
    """Inside, what trackers write goes beside the run's own record, unless the user's environment says otherwise."""
    places = {"TENSORBOARD_LOGGING_DIR": run_dir.path / "tensorboard", "WANDB_DIR": run_dir.path}
    ours = {name: str(path) for name, path in places.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
