"""An experiment's runs: which are finished, unfinished, absent or another's, and those to do as child processes.

A crash of one child does not affect the others, and Ctrl-C leaves all resumable. A child is the ordinary
`apo-lora train`, with its own log. It holds a lock on that log for as long as it lives, so that neither a second sweep
nor one restarted after a kill can write into the same run.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from apo_lora.errors import RecipeError, RunDirError
from apo_lora.recipe.files import load_recipe
from apo_lora.recipe.schema import differences
from apo_lora.run.directory import RunDir
from apo_lora.run.files import locked
from apo_lora.sweep.experiment import PlannedRun

POLL_SECONDS = 0.5


class State(Enum):
    ABSENT = "to run"
    HALF_DONE = "to continue"
    FINISHED = "done"


def state_of(run: PlannedRun) -> State:
    """Raises RunDirError if the folder holds something that is not this run."""
    run_dir = RunDir(run.path)
    if not run.path.exists() or (run.path.is_dir() and not any(run.path.iterdir())):
        return State.ABSENT
    if not run_dir.recipe.is_file():
        raise RunDirError(f"{run.path}: is not a run of this sweep; move it away, or use another folder with --out DIR")
    try:
        there = load_recipe(run_dir.recipe)
    except RecipeError as error:
        raise RunDirError(f"{run.path}: its recipe cannot be read ({error.problems[0]}); move it away") from None
    changed = {key: values for key, values in differences(there, run.recipe).items() if key != "output.dir"}
    if changed:
        was = "; ".join(f"{key} was {before!r} and is {after!r} now" for key, (before, after) in changed.items())
        raise RunDirError(
            f"{run.path}: was trained with another recipe ({was}); use another --out DIR, or remove that folder"
        )
    return State.FINISHED if is_finished(run_dir) else State.HALF_DONE


def is_finished(run_dir: RunDir) -> bool:
    """The model card is written last, and also by a run that stopped itself, which has no evaluation after training."""
    return run_dir.model_card.is_file() and "after" in json.loads(run_dir.evaluation.read_text(encoding="utf-8"))


def states(runs: Iterable[PlannedRun]) -> dict[PlannedRun, State]:
    """Of all runs. Raises RunDirError with one line per folder that is in the way."""
    found, problems = {}, []
    for run in runs:
        try:
            found[run] = state_of(run)
        except RunDirError as error:
            problems += error.problems
    if problems:
        raise RunDirError(*problems)
    return found


def steps_done(run: PlannedRun) -> int:
    """Optimizer steps on record; 0 where there is no record yet."""
    try:
        with RunDir(run.path).metrics.open("rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


def ready_to_resume(run: PlannedRun) -> bool:
    """Whether a half-done run can be continued. One that has no whole checkpoint is cleared away, to start again."""
    run_dir = RunDir(run.path)
    if run_dir.valid_checkpoints():
        return True
    with locked(run.path):
        shutil.rmtree(run.path)
    return False


# --- as child processes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How one child ended."""

    run: PlannedRun
    finished: bool
    seconds: float
    """Wall clock, loading and evaluation included."""
    cpu_seconds: float
    """Of its process and those it started: what a busy machine does not stretch. 0 on Windows, which keeps no count."""
    reason: str = ""
    """The last line of its log, where it failed."""


@dataclass(frozen=True)
class _Child:
    run: PlannedRun
    process: subprocess.Popen
    log: IO[bytes]
    started: float


def run_all(
    runs: Sequence[PlannedRun],
    out: Path,
    jobs: int,
    on_end: Callable[[Outcome], None],
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Runs each, `jobs` at once, in the order given; `on_end` is called for each.

    KeyboardInterrupt (Ctrl-C, SIGTERM) is passed on to the children, which save a checkpoint, and raised again.
    """
    waiting, children = list(runs), []
    with _sigterm_as_ctrl_c():
        try:
            while waiting or children:
                while waiting and len(children) < jobs:
                    children.append(_start(waiting.pop(0), out, jobs))
                time.sleep(POLL_SECONDS)
                on_poll()
                for child in list(children):
                    if outcome := _outcome_if_ended(child):
                        children.remove(child)
                        on_end(outcome)
        except BaseException:
            for outcome in _stop(children):
                on_end(outcome)
            raise


def train_command(run: PlannedRun, *, resume: bool) -> list[str]:
    """What a user would type for this run."""
    words = ["train", "--recipe", str(run.recipe_file), *run.overrides, *(["--resume", "auto"] if resume else [])]
    return [sys.executable, "-m", "apo_lora.commands.main", *words]


def _start(run: PlannedRun, out: Path, jobs: int) -> _Child:
    path = out / "logs" / f"{run.variant}-{run.seed}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("ab")
    # The child inherits the open log, and with it the lock: that lasts until both have ended, however they end.
    if not lock_descriptor(log.fileno(), blocking=False):
        log.close()
        raise RunDirError(
            f"{run.path}: a process of another sweep is still running it; wait for that process, or stop it"
        )
    command = train_command(run, resume=run.path.exists() and ready_to_resume(run))
    log.write(f"$ {shlex.join(command)}\n".encode())
    log.flush()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # A separate session: Ctrl-C in a terminal reaches only the sweep, which passes it on once. A child that
        # gets it twice stops at once, without its checkpoint.
        start_new_session=True,
        env={"OMP_NUM_THREADS": str(threads), **os.environ},
    )
    return _Child(run, process, log, time.monotonic())


def _outcome_if_ended(child: _Child) -> Outcome | None:
    before = _cpu_seconds_of_ended_children()
    if child.process.poll() is None:
        return None
    child.log.close()
    seconds, cpu_seconds = time.monotonic() - child.started, _cpu_seconds_of_ended_children() - before
    finished = child.process.returncode == 0 and is_finished(RunDir(child.run.path))
    return Outcome(child.run, finished, seconds, cpu_seconds, "" if finished else _reason(child))


def _cpu_seconds_of_ended_children() -> float:
    used = os.times()
    return used.children_user + used.children_system


def _reason(child: _Child) -> str:
    code = child.process.returncode
    if code == 0:
        return "stopped before its last step"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    # Progress bars return to the line's start; what counts stands last.
    lines = Path(child.log.name).read_text(errors="replace").replace("\r", "\n").strip().splitlines()
    return f"exit code {code}: {lines[-1].strip()}"


def _stop(children: Sequence[_Child]) -> Iterator[Outcome]:
    """Asks each to end after its step, and waits; a second Ctrl-C ends them at once."""
    for child in children:
        child.process.send_signal(signal.SIGINT)
    for child in children:
        while (outcome := _outcome_if_ended(child)) is None:
            try:
                time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                for each in children:
                    each.process.kill()
        yield outcome


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
