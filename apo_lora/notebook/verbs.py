"""The verbs of the command line in a notebook: each in a separate process, with live output in the cell.

The kernel's side: IPython and the standard library alone, whatever packages the notebook's machine has. A separate
process frees its GPU memory when it ends. If it is killed for lack of memory, the kernel keeps running.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from apo_lora.notebook.cell_output import CellOutput

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a progress bar moves in the cell, and `meanwhile` is called."""

Secrets = Mapping[str, str]
Meanwhile = Callable[[], str | None]
"""May return a line to be shown."""

FOREIGN = ("UV_", "PYTHON", "VIRTUAL_ENV", "CONDA_", "MPLBACKEND")
"""Beginnings of variables by which a machine speaks of its own Python. Colab sets UV_SYSTEM_PYTHON and MPLBACKEND."""
_PR_SET_PDEATHSIG = 1


class StepFailed(Exception):
    """A failed cell; the cells after it do not run. Shown as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in place of a traceback
        return [str(self)]


def python() -> str:
    """The interpreter that has apo-lora: colab/install.py says which; without it, the kernel's own."""
    return os.environ.get("APO_PYTHON", sys.executable)


def without_foreign() -> dict[str, str]:
    """The environment variables for another Python than the kernel's."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}


def environment() -> dict[str, str]:
    """For a process of `python()`."""
    return {
        **(os.environ if python() == sys.executable else without_foreign()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore::SyntaxWarning",  # of packages that are compiled when they are first imported
        "COLUMNS": "100",
    }


def run_verb(
    *arguments: str,
    module: str = "apo_lora.commands.main",
    meanwhile: Meanwhile | None = None,
    secrets: Secrets | None = None,
    lock: Path | None = None,
) -> None:
    """`apo-lora *arguments`, or `python -m module *arguments`, with live output in the cell.

    `meanwhile` is called about once a second. `secrets` go into the environment of that process and nowhere else.
    `lock`: a file that only one process at a time may hold. Interrupting the cell is Ctrl-C for the verb, which then
    ends in its own way. Raises StepFailed, under the name of the first argument.
    """
    # Into a file and not a pipe: a step outlives its kernel for as long as it takes to save its work.
    with _held(lock) as held, tempfile.NamedTemporaryFile() as said:
        process = subprocess.Popen(
            [python(), "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**environment(), **(secrets or {})},
            pass_fds=held,
            **lifetime(),
        )
        cell = CellOutput(sys.stdout)
        try:
            with open(said.name, "rb") as output:
                _follow(process, output, cell, meanwhile)
        finally:
            cell.close()
            process.kill()
            process.wait()
    if process.returncode:
        raise StepFailed(_failure(arguments[0], process.returncode))


def lifetime() -> dict:
    """Arguments of Popen: not interrupted with the kernel, which passes an interrupt on, and ended when it dies."""
    if sys.platform != "linux":
        return {"start_new_session": True}
    libc = ctypes.CDLL(None)  # before the fork
    return {"start_new_session": True, "preexec_fn": lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)}


@contextmanager
def _held(lock: Path | None) -> Iterator[tuple[int, ...]]:
    """The lock's file descriptor, for the process that is to hold it: also after the kernel has died."""
    if lock is None or sys.platform == "win32":
        yield ()
        return
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("The step that a restarted kernel left is saving its work; waiting for it to end.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield (file.fileno(),)


def _follow(process: subprocess.Popen, output: BinaryIO, cell: CellOutput, meanwhile: Meanwhile | None) -> None:
    """Follows the output until the process ends. An interrupt is passed on; the process decides how to end."""
    ended = False
    while not ended:
        try:
            ended = _ends_soon(process)
            cell.write(output.read())
            cell.show()
            if meanwhile and (line := meanwhile()):
                cell.say(line)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
        except Exception as error:  # what cannot be shown ends no training
            cell.say(f"(no more curves: {type(error).__name__}: {error})")
            meanwhile = None


def _ends_soon(process: subprocess.Popen) -> bool:
    try:
        process.wait(SECONDS_BETWEEN_LOOKS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _failure(name: str, code: int) -> str:
    if code in (130, -signal.SIGINT):
        return f"{name}: stopped. Run the cell again to continue."
    if code == -signal.SIGKILL:
        return f"{name}: killed by the system, usually for lack of memory. Saved checkpoints are kept."
    return f"{name}: failed (exit code {code}); see the line above."
