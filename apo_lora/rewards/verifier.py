"""Scoring with worker processes that can be killed: no completion can hang, crash or bloat the training process.

Cheap comparison happens in the parent (`scores.quick_verdict`). What only mathematics can decide is shared out among
workers, one question at a time to each, as a JSON line to `python -m apo_lora.rewards.verifier`, which answers with a
line. A question that takes too long costs the completion its reward, and the worker is killed; the next question
starts a new one. So H hostile completions hold up a call of `score` for at most
2 x seconds_per_item x ceil(H / workers), where the factor of 2 pays for the starts of new workers; after ten time-outs
the others of the call get a tenth of the time.

A plain subprocess and not `multiprocessing`: that would import the user's __main__ again (a notebook and a script
from stdin have none to import), and would fork or share nothing good with a parent that has CUDA initialised.
The worker imports neither torch nor the rest of the kit. It is not a sandbox for hostile code, since none is ever run;
but should a library evaluate text after all, the worker can start no program, open no connection, write no file, and
has no token of the user's in its environment.
"""

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from apo_lora.errors import RewardError
from apo_lora.rewards.answers.match import MathQuestion
from apo_lora.rewards.answers.mathematics import math_equal
from apo_lora.rewards.answers.same import STRICT, Rules
from apo_lora.rewards.scores import accepted, quick_verdict

START_SECONDS = 60.0  # importing sympy takes half a second, on a machine busy with other things many more
_MEMO_SIZE = 20_000
_MAX_WORKERS = 16  # each holds 60 MB
_PATIENCE = 10  # time-outs in one call of `score` before the questions after them get a tenth of the time
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)  # in names of environment variables
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "subprocess.", "pty.", "ctypes.",
    "socket.", "shutil.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
)  # fmt: skip


def cores_of_this_process() -> int:
    """The CPU cores that this process may use, shared fairly with the other processes of a launch on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


class Verifier:
    """Scores completions like `accuracy_reward` under `rules`, with time and memory of the mathematics bounded.

    `timeouts` and `crashes` count the questions that were given up; `seconds_per_item` bounds each question,
    `memory_mb` a worker's address space (Linux), `workers` their number (None: one per core, 16 at most); one starts
    when a question needs it. Use as a context manager, or call `close()`.
    """

    def __init__(
        self,
        seconds_per_item: float = 5.0,
        memory_mb: int = 2048,
        workers: int | None = None,
        rules: Rules = STRICT,
    ):
        self.seconds_per_item = seconds_per_item
        self.memory_mb = memory_mb
        self.rules = rules
        self.timeouts = 0
        self.crashes = 0
        self._command = [sys.executable, "-P", "-m", "apo_lora.rewards.verifier", str(memory_mb)]
        self._workers: list[_Worker | None] = [None] * (workers or min(_MAX_WORKERS, cores_of_this_process()))
        self._memo: dict[MathQuestion, float] = {}
        self._timeouts_before = 0
        self._lock = threading.Lock()
        self._counting = threading.Lock()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The next `score` would start new ones."""
        for place in range(len(self._workers)):
            self._give_up_worker(place)

    def score(
        self,
        completions: Sequence[str],
        answers: Sequence[str | Sequence[str]],
        choices: Sequence[Sequence[str] | None] | None = None,
    ) -> list[float]:
        """One 0.0 or 1.0 per completion; of an answer that is a list, each text is right.

        Whatever a completion does, the others are scored.
        """
        rows = zip(completions, answers, choices or [None] * len(completions), strict=True)
        with self._lock:
            self._timeouts_before = self.timeouts
            verdicts = [
                [quick_verdict(completion, one, options, self.rules) for one in accepted(answer)]
                for completion, answer, options in rows
            ]
            self._ask_all({verdict for row in verdicts for verdict in row if isinstance(verdict, MathQuestion)})
            return [max(self._memo[v] if isinstance(v, MathQuestion) else float(v) for v in row) for row in verdicts]

    def _ask_all(self, questions: set[MathQuestion]) -> None:
        """Put the replies into the memo: a group's completions repeat each other, and would time out again."""
        if len(self._memo) + len(questions) > _MEMO_SIZE:
            self._memo.clear()
        todo = deque(sorted(questions - self._memo.keys(), key=str))
        if not todo:
            return
        lanes = range(min(len(self._workers), len(todo)))
        with ThreadPoolExecutor(len(lanes)) as pool:
            try:
                list(pool.map(lambda place: self._work_off(todo, place), lanes))
            finally:
                todo.clear()  # an interrupt must not wait for the rest

    def _work_off(self, todo: "deque[MathQuestion]", place: int) -> None:
        while True:
            try:
                question = todo.popleft()
            except IndexError:
                return
            self._memo[question] = self._ask(question, place)

    def _ask(self, question: MathQuestion, place: int = 0) -> float:
        line = json.dumps([question.answer, question.gold])
        for _ in range(2):  # a worker that died while idle is not this question's fault: ask once more
            worker = self._workers[place] = self._workers[place] or _Worker(self._command, self.memory_mb)
            if worker.send(line):
                break
            self._give_up_worker(place, crashes=1)
        else:
            return 0.0
        hurried = self.timeouts - self._timeouts_before >= _PATIENCE
        try:
            reply = worker.read(self.seconds_per_item / (10 if hurried else 1))
        except queue.Empty:
            self._give_up_worker(place, timeouts=1)
            return 0.0
        if reply is None:
            self._give_up_worker(place, crashes=1)
        return 1.0 if reply == "1" else 0.0

    def _give_up_worker(self, place: int, *, timeouts: int = 0, crashes: int = 0) -> None:
        with self._counting:
            self.timeouts += timeouts
            self.crashes += crashes
        if worker := self._workers[place]:
            worker.kill()
        self._workers[place] = None


class _Worker:
    """One running worker process: `send` a line, `read` a line within a time, `kill`."""

    def __init__(self, command: list[str], memory_mb: int):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the worker
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_worker_environment(),
            start_new_session=True,  # Ctrl-C is for the training process, which then closes this one in order
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True).start()
        self._finalizer = weakref.finalize(self, _end_process, self._process)
        self._await_ready(memory_mb)

    def _await_ready(self, memory_mb: int) -> None:
        try:
            ready = self.read(START_SECONDS)
        except queue.Empty:
            ready = None
        if ready != "ready":
            self.kill()
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise RewardError(
                f"the verifier's worker process did not start (memory_mb={memory_mb}): {last[0][:200]}; "
                "raise memory_mb, or run `python -m apo_lora.rewards.verifier` to see why"
            )

    def send(self, line: str) -> bool:
        """False if the worker is dead."""
        if self._process.poll() is not None:
            return False
        try:
            self._process.stdin.write(line.encode("ascii") + b"\n")
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def read(self, seconds: float) -> str | None:
        """The next line; None if the worker has died; queue.Empty if it takes too long."""
        return self._lines.get(timeout=seconds)

    def kill(self) -> None:
        self._finalizer()


def _worker_environment() -> dict[str, str]:
    """The parent's environment without its secrets, with this package importable and no GPU in sight."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (package_root, os.environ.get("PYTHONPATH")) if p)
    kept = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    return {**kept, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def _pump(stream, lines: "queue.Queue[str | None]") -> None:
    """Carry lines from the pipe to a queue, which can be waited on for a limited time on every platform."""
    for line in stream:
        lines.put(line.decode("ascii", errors="replace").strip())
    lines.put(None)


def _end_process(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()


def _limit_memory(memory_mb: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: time is still bounded
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, memory_mb * 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _refuse_side_effects() -> None:
    """From here on this process computes and answers, and does nothing else."""

    def refuse(event: str, arguments: tuple) -> None:
        if event.startswith(_REFUSED) or event == "open" and (arguments[2] or 0) & _WRITING:
            raise PermissionError(f"{event}: not allowed in the verifier's worker")

    sys.addaudithook(refuse)


def main(arguments: Sequence[str]) -> None:
    """The worker: JSON lines [answer, gold] on stdin, "1" or "0" on stdout, until stdin ends."""
    _limit_memory(int(arguments[0]) if arguments else 2048)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing that a library prints may pass for a reply
    # Pays for the imports before the clock of the first question runs, and proves that they fit into the memory.
    if not math_equal("1+x", "x+1"):
        sys.exit("cannot compare 1+x with x+1")
    _refuse_side_effects()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        print("1" if math_equal(answer, gold) else "0", file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
