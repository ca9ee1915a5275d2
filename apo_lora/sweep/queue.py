"""Runs as child processes, several at once: a crash of one does not affect the others, and Ctrl-C leaves all resumable.

A child is the ordinary `apo-lora train`, with its own log. It holds a lock on that log for as long as it lives, so that
neither a second sweep nor one restarted after a kill can write into the same run.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from apo_lora.errors import RunDirError
from apo_lora.run.directory import RunDir
from apo_lora.sweep.experiment import PlannedRun
from apo_lora.sweep.runs import is_finished, log_file, ready_to_resume

POLL_SECONDS = 0.5


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
    path = log_file(out, run)
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
