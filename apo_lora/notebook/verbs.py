"""The verbs of the command line in a notebook: each in a separate process, with live output in the cell.

A separate process frees its GPU memory when it ends. If it is killed for lack of memory, the kernel keeps running.
"""

import codecs
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TextIO

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a progress bar moves in the cell, and `meanwhile` is called."""

Secrets = Mapping[str, str]


class StepFailed(Exception):
    """A failed cell; the cells after it do not run. Shown as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in place of a traceback
        return [str(self)]


def run_verb(*arguments: str, meanwhile: Callable[[], None] | None = None, secrets: Secrets | None = None) -> None:
    """`apo-lora *arguments`, with live output in the cell.

    `meanwhile` is called about once a second. `secrets` go into the environment of that process and nowhere else.
    Interrupting the cell is Ctrl-C for the verb, which then ends in its own way. Raises StepFailed.
    """
    run_module("apo_lora.commands.main", *arguments, name=arguments[0], meanwhile=meanwhile, secrets=secrets)


def run_module(
    module: str,
    *arguments: str,
    name: str,
    meanwhile: Callable[[], None] | None = None,
    secrets: Secrets | None = None,
) -> None:
    """The same with `python -m module`; `name` is what a failure is reported under."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100", **(secrets or {})},
        start_new_session=True,  # else an interrupt would reach it twice: from Jupyter, and from here
    )
    chunks: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_pump, args=(process.stdout, chunks), daemon=True).start()
    cell = CellOutput(sys.stdout)
    try:
        _follow(process, chunks, cell, meanwhile)
    finally:
        cell.close()
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise StepFailed(_failure(name, process.returncode))


def _follow(process: subprocess.Popen, chunks: queue.Queue, cell: "CellOutput", meanwhile: Callable | None) -> None:
    """Follows the output until the process ends. An interrupt is passed on; the process decides how to end."""
    looked = 0.0
    while True:
        try:
            try:
                chunk = chunks.get(timeout=SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                chunk = b""
            if chunk is None:
                process.wait()
                return
            cell.write(chunk)
            if meanwhile and time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                meanwhile()
                looked = time.monotonic()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def _pump(stream, chunks: "queue.Queue[bytes | None]") -> None:
    while chunk := stream.read1(65536):
        chunks.put(chunk)
    chunks.put(None)


def _failure(name: str, code: int) -> str:
    if code in (130, -signal.SIGINT):
        return f"{name}: stopped. Run the cell again to continue."
    if code == -signal.SIGKILL:
        return f"{name}: killed by the system, usually for lack of memory. Saved checkpoints are kept."
    return f"{name}: failed (exit code {code}); see the line above."


class CellOutput:
    """Text with progress bars in it, as a cell can show it: lines at once, a bar's newest state once a second."""

    def __init__(self, out: TextIO):
        self.out = out
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._line = ""
        self._bar = ""
        """What the last carriage return left standing."""
        self._shown = ""
        self._shown_at = 0.0

    def write(self, chunk: bytes) -> None:
        for character in self._decode(chunk):
            if character == "\n":
                self._end_line()
            elif character == "\r":
                self._bar, self._line = self._line.rstrip() or self._bar, ""
                self._show_bar()
            else:
                self._line += character
        self.out.flush()

    def close(self) -> None:
        """Ends a last line that has no end."""
        if self._line or self._shown:
            self._end_line()
        self.out.flush()

    def _end_line(self) -> None:
        line = self._line.rstrip() or self._bar
        self.out.write(("\r" if self._shown else "") + line.ljust(len(self._shown)) + "\n")
        self._line = self._bar = self._shown = ""

    def _show_bar(self) -> None:
        if self._bar and time.monotonic() - self._shown_at > SECONDS_BETWEEN_LOOKS:
            self.out.write("\r" + self._bar.ljust(len(self._shown)))
            self._shown, self._shown_at = self._bar, time.monotonic()
