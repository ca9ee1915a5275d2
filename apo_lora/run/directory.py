"""Every file that a run writes and reads back: names, atomic writes, and which checkpoints are whole.

    recipe.yaml        the resolved recipe               metrics.jsonl      one line per optimizer step
    environment.json   versions and device               completions.jsonl  one line per sampled completion
    preflight.json     what was checked before step 1    images/            pictures of the completions' prompts
    eval.json          before and after                  answers.jsonl      one line per completion behind eval.json
    evaluations/NAME/  what `apo-lora eval` measured
    adapter/           the result, in PEFT's format      plots/             PNG
    checkpoints/       checkpoint-STEP folders           README.md          model card
    report.html        what `apo-lora report` makes of all this

A checkpoint counts only with its complete.json, which is written last and lists every file's size and hash. So a kill
at any moment leaves either a whole checkpoint or one that is recognised as unfinished.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apo_lora.errors import RunDirError

COMPLETE = "complete.json"
CHECKPOINT_PREFIX = "checkpoint-"
TEMPORARY = ".*.tmp*"


class RunDir:
    """The record of one run, below `path`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.preflight = self.path / "preflight.json"
        self.metrics = self.path / "metrics.jsonl"
        self.completions = self.path / "completions.jsonl"
        self.evaluation = self.path / "eval.json"
        self.answers = self.path / "answers.jsonl"
        self.evaluations = self.path / "evaluations"
        self.model_card = self.path / "README.md"
        self.adapter = self.path / "adapter"
        self.plots = self.path / "plots"
        self.images = self.path / "images"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"

    def refuse_existing(self) -> None:
        """Raises RunDirError if something is already there: nothing is ever overwritten."""
        if self.path.is_file():
            raise RunDirError(f"output.dir: {self.path} is a file; choose another with output.dir=DIR")
        above = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            what = "not writable" if above.is_dir() else "a file"
            raise RunDirError(
                f"output.dir: {self.path} cannot be made ({above} is {what}); choose another with output.dir=DIR"
            )
        if self.path.is_dir() and any(self.path.iterdir()):
            raise RunDirError(
                f"output.dir: {self.path} already holds a run; continue it with --resume auto, "
                "or start beside it with output.dir=DIR"
            )

    def create(self) -> None:
        self.refuse_existing()
        self.start_again()

    def start_again(self) -> None:
        """Makes the folders, and drops the record of a run that was cut before its first checkpoint."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"output.dir: {self.path} cannot be made ({error.strerror}); choose another") from None
        self.rewind(0)
        for measured in (self.evaluation, self.answers):
            measured.unlink(missing_ok=True)

    def is_absent(self) -> bool:
        return not self.path.is_dir() or not any(self.path.iterdir())

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def valid_checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return [path for path in self._all_checkpoints() if is_whole(path)]

    def _all_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob(f"{CHECKPOINT_PREFIX}*"), key=checkpoint_step)

    def checkpoint_to_resume(self, wanted: str) -> Path | None:
        """`auto` is the last whole one, or None for a run that was cut before its first; otherwise a checkpoint's path.

        Raises RunDirError, for instance where a checkpoint was there and is damaged: the run is not started over.
        """
        if wanted != "auto":
            path = Path(wanted)
            if fault := why_not_whole(path):
                raise RunDirError(f"--resume {wanted}: not a whole checkpoint ({fault}); try --resume auto")
            return path
        if self.path.is_file():
            raise RunDirError(f"output.dir: {self.path} is a file; choose another with output.dir=DIR")
        faults = {path: why_not_whole(path) for path in self._all_checkpoints()}
        if whole := [path for path, fault in faults.items() if fault is None]:
            return whole[-1]
        damaged = [fault for path, fault in faults.items() if (path / COMPLETE).exists()]
        if damaged or self.adapter.exists():
            raise RunDirError(
                f"--resume auto: {self.path} holds no whole checkpoint any more; bring one back, or start a new run "
                "with output.dir=DIR and without --resume",
                *damaged,
            )
        if not self.is_absent() and not self.checkpoints.is_dir():
            raise RunDirError(
                f"--resume auto: {self.path} holds other files and no run; choose another with output.dir=DIR"
            )
        return None

    def remove_all_but_whole_checkpoints(self) -> dict[str, str]:
        """Name and fault of each checkpoint that was removed."""
        faults = {path: fault for path in self._all_checkpoints() if (fault := why_not_whole(path))}
        for path in faults:
            shutil.rmtree(path)
        return {path.name: fault for path, fault in faults.items()}

    def remove_later_checkpoints(self, step: int) -> list[Path]:
        """Those of a course that is about to be run again."""
        later = [path for path in self._all_checkpoints() if checkpoint_step(path) > step]
        for path in later:
            _remove_checkpoint(path)
        return later

    def remove_other_checkpoints(self, names: Container[str]) -> None:
        """All but those."""
        for path in self._all_checkpoints():
            if path.name not in names:
                _remove_checkpoint(path)

    def remove_old_checkpoints(self, keep: int, spare: Path | None = None) -> None:
        """All but the last ones; `spare` is in use, and stays for now."""
        for path in self.valid_checkpoints()[:-keep]:
            if path != spare:
                _remove_checkpoint(path)

    def remove_temporaries(self) -> None:
        """What a kill left of writes that never became files."""
        for path in [*self.path.glob(TEMPORARY), *self.path.glob(f"*/{TEMPORARY}")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def last_metrics(self) -> dict[str, Any]:
        """The last recorded step; empty before the first."""
        rows = read_jsonl(self.metrics) if self.metrics.exists() else ()
        return next(iter(deque(rows, maxlen=1)), {})

    def last_checkpoint(self) -> Path | None:
        """The last one that was sealed. Its files are not read."""
        sealed = [path for path in self._all_checkpoints() if (path / COMPLETE).exists()]
        return sealed[-1] if sealed else None

    def checkpoint_bytes(self) -> int | None:
        """What the last checkpoint takes on the disk; None before the first."""
        last = self.last_checkpoint()
        return sum(file.stat().st_size for file in last.rglob("*") if file.is_file()) if last else None

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, so that a resumed run records every step exactly once."""
        for path in (self.metrics, self.completions):
            if path.exists():
                kept = [line for line in read_jsonl(path) if line["step"] <= step]
                write_jsonl(path, kept)


def _remove_checkpoint(path: Path) -> None:
    # Without its complete.json first, a kill halfway leaves a folder that is known to be unfinished.
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)


def checkpoint_step(path: Path) -> int:
    number = path.name.removeprefix(CHECKPOINT_PREFIX)
    return int(number) if number.isdigit() else -1


def seal_checkpoint(path: Path) -> None:
    """Declares the checkpoint whole: the last thing written, after everything else has reached the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as content:
                os.fsync(content.fileno())
    files = {str(p.relative_to(path)): _fingerprint(p) for p in sorted(path.rglob("*")) if p.is_file()}
    write_json(path / COMPLETE, files)


def is_whole(path: Path) -> bool:
    return why_not_whole(path) is None


def why_not_whole(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / COMPLETE).read_text())
    except FileNotFoundError:
        return f"it has no {COMPLETE}: its writing was cut"
    except (OSError, ValueError):
        return f"{path / COMPLETE} cannot be read"
    if not isinstance(files, dict):
        return f"{path / COMPLETE} cannot be read"
    for name, fingerprint in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != fingerprint:
            return f"{name} was changed or cut short"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# --- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` at the end: the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # a suffix may say the format
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(_json_line(row) for row in rows))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_json_line(row) for row in rows))
        file.flush()
        os.fsync(file.fileno())  # a checkpoint that survives a power cut must not be ahead of its record


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that may have been cut by a kill: an unfinished last line is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


def _json_line(row: dict[str, Any]) -> str:
    # A lone surrogate (half a character, which sampling can produce) must not make the file unreadable.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"
