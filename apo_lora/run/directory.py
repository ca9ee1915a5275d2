"""The names of all files that a run writes and reads back.

recipe.yaml        the recipe as asked for           metrics.jsonl      one line per optimizer step
recipe_trained.yaml  as this machine trained it (run/recipes.py)
inputs.json        fingerprints of data and rewards (run/inputs.py)
environment.json   versions and device               completions.jsonl  one line per sampled completion
preflight.json     what was checked before step 1    images/            images of the completions' prompts
eval.json          before and after                  answers.jsonl      one line per completion behind eval.json
evaluations/NAME/  what `apo-lora eval` measured
adapter/           the result, in PEFT's format      plots/             PNG
adapter-best/      the best of those measured        (run/validation.py)
checkpoints/       checkpoint-STEP folders           README.md          model card
report.html        what `apo-lora report` makes of all this
"""

import os
import shutil
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from apo_lora.errors import RunDirError
from apo_lora.machine import ranks
from apo_lora.run.checkpoints import checkpoints_in, is_sealed, is_whole, remove_checkpoint
from apo_lora.run.files import locked, read_jsonl, write_jsonl

TEMPORARY = ".*.tmp*"


class RunDir:
    """The record of one run, below `path`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.recipe_trained = self.path / "recipe_trained.yaml"
        self.inputs = self.path / "inputs.json"
        self.environment = self.path / "environment.json"
        self.preflight = self.path / "preflight.json"
        self.metrics = self.path / "metrics.jsonl"
        self.completions = self.path / "completions.jsonl"
        self.evaluation = self.path / "eval.json"
        self.answers = self.path / "answers.jsonl"
        self.evaluations = self.path / "evaluations"
        self.model_card = self.path / "README.md"
        self.adapter = self.path / "adapter"
        self.adapter_best = self.path / "adapter-best"
        self.plots = self.path / "plots"
        self.images = self.path / "images"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"

    def is_absent(self) -> bool:
        return not self.path.is_dir() or not any(self.path.iterdir())

    def refuse_existing(self) -> None:
        """Raises RunDirError if something is already there: nothing is ever overwritten."""
        if self.path.is_file():
            raise RunDirError(f"output.dir: {self.path} is a file; choose another folder with output.dir=DIR")
        above = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            what = "not writable" if above.is_dir() else "a file"
            raise RunDirError(
                f"output.dir: {self.path} cannot be created ({above} is {what}); choose another with output.dir=DIR"
            )
        if not self.is_absent():
            raise RunDirError(
                f"output.dir: {self.path} is not empty; continue its run with --resume auto, or choose another "
                "folder with output.dir=DIR"
            )

    def create(self) -> None:
        self.refuse_existing()
        self.start_again()

    def make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(
                f"output.dir: {self.path} cannot be created ({error.strerror}); choose another folder"
            ) from None

    def start_again(self) -> None:
        """Makes the folders, and drops the record of a run that was cut before its first checkpoint."""
        self.make()
        self.checkpoints.mkdir(exist_ok=True)
        self.rewind(0)
        for measured in (self.evaluation, self.answers):
            measured.unlink(missing_ok=True)

    # --- the record --------------------------------------------------------------------------------------------------

    def require_readable_record(self) -> None:
        """Raises RunDirError for an unreadable line, before hours are spent on a run that could not be recorded."""
        for path in (self.metrics, self.completions, self.answers):
            if path.exists():
                deque(read_jsonl(path), maxlen=0)

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, so that a resumed run records every step exactly once."""
        for path in (self.metrics, self.completions):
            if path.exists():
                write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= step])

    def last_metrics(self) -> dict[str, Any]:
        """The last recorded step; empty before the first."""
        rows = read_jsonl(self.metrics) if self.metrics.exists() else ()
        return next(iter(deque(rows, maxlen=1)), {})

    def remove_temporaries(self) -> None:
        """What a kill left of writes that never became files."""
        for path in [*self.path.glob(TEMPORARY), *self.path.glob(f"*/{TEMPORARY}")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def valid_checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return [path for path in checkpoints_in(self.checkpoints) if is_whole(path)]

    def last_checkpoint(self) -> Path | None:
        """The last one that was sealed. Its files are not read."""
        return next((path for path in reversed(checkpoints_in(self.checkpoints)) if is_sealed(path)), None)

    def remove_old_checkpoints(self, keep: int, spare: Path | None = None) -> None:
        """All but the last ones; `spare` is in use, and stays for now."""
        for path in self.valid_checkpoints()[:-keep]:
            if path != spare:
                remove_checkpoint(path)


class RunLock(ExitStack):
    """Keeps other processes from writing into a run, from `take` to the end of the `with`. Only the main one asks."""

    def __init__(self, run_dir: RunDir):
        super().__init__()
        self.run_dir = run_dir
        self.is_held = not ranks.is_main()

    def take(self) -> None:
        """Nothing happens where there is no folder yet. Raises RunDirError where another process has it."""
        if not self.is_held and self.run_dir.path.is_dir():
            self.enter_context(locked(self.run_dir.path))
            self.is_held = True

    def make_and_take(self) -> None:
        self.run_dir.make()
        self.take()
