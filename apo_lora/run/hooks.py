"""What APOTrainer asks its callbacks beside transformers' own events."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class APOCallback(TrainerCallback):
    """A TrainerCallback that also hears of rollouts, adds figures to the log, and stands around checkpoints."""

    def on_rollout(self, step: int, scored: Any) -> None:
        """Once per rollout, on the main process: `scored` (see rollout/credit.py) feeds optimizer step `step` first."""

    def figures(self) -> Mapping[str, float]:
        """Once per log line, on every process: figures of its own, by name."""
        return {}

    def around_save(self, folder: Path) -> AbstractContextManager:
        """In which the checkpoint `folder` is written, on every process."""
        return nullcontext()


class Figures(APOCallback):
    """Adds what `read()` gives to every log line."""

    def __init__(self, read: Callable[[], Mapping[str, float]]):
        self.figures = read
