"""Checkpoints that count: begun only where the disk has room, sealed when whole, mirrored, and kept to the last few."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apo_lora.machine import ranks
from apo_lora.run.checkpoints import seal_checkpoint
from apo_lora.run.directory import RunDir
from apo_lora.run.disk import room_for_checkpoint
from apo_lora.run.hooks import APOCallback
from apo_lora.run.mirror import Mirrors


class SealedCheckpoints(APOCallback):
    def __init__(self, run_dir: RunDir, trained_parameters: Sequence[Any], mirrors: Mirrors, keep: int):
        """`trained_parameters` say how large a checkpoint is; `keep`: how many stay."""
        self.run_dir = run_dir
        self.trained_parameters = trained_parameters
        self.mirrors = mirrors
        self.keep = keep

    @contextmanager
    def around_save(self, folder: Path) -> Iterator[None]:
        with room_for_checkpoint(self.run_dir, folder, self.trained_parameters):
            yield
            if ranks.is_main():
                seal_checkpoint(folder)
        if ranks.is_main():
            self.mirrors.copy()
            self.run_dir.remove_old_checkpoints(self.keep, spare=self.mirrors.in_use)
