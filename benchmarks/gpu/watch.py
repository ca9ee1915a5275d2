"""A look at the trainer that `apo_lora.train.train` builds, without a way around that entry point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from apo_lora.trainer import APOTrainer


@contextmanager
def watched_training(look: Callable[[APOTrainer], None]) -> Iterator[None]:
    """Inside, `look(trainer)` is called on every APOTrainer as soon as it is built."""
    original = APOTrainer.__init__

    def build(trainer: APOTrainer, **arguments: Any) -> None:
        original(trainer, **arguments)
        look(trainer)

    with patch.object(APOTrainer, "__init__", build):
        yield


def is_rewritten(trainer: Any) -> bool:
    """Is its class one that Unsloth wrote? By the class's name: Unsloth also hides its own under TRL's."""
    return any(cls.__name__.startswith(("Unsloth", "_Unsloth")) for cls in type(trainer).__mro__)


def bases(trainer: Any) -> list[str]:
    return [f"{cls.__module__}.{cls.__name__}" for cls in type(trainer).__mro__[:3]]
