"""Callback events of APOTrainer, in addition to transformers' own."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class APOCallback(TrainerCallback):
    """A TrainerCallback that also receives rollouts, adds figures to the log, and wraps checkpoint saving."""

    def on_rollout(self, step: int, scored: Any) -> None:
        """Once per rollout, on the main process. `step` is the first to train on `scored` (see rollout/credit.py)."""

    def figures(self) -> Mapping[str, float]:
        """Once per log line, on every process: additional figures, by name."""
        return {}

    def around_save(self, folder: Path) -> AbstractContextManager:
        """A context in which the checkpoint `folder` is written, on every process."""
        return nullcontext()


class Figures(APOCallback):
    """Adds what `read()` gives to every log line."""

    def __init__(self, read: Callable[[], Mapping[str, float]]):
        self.figures = read
