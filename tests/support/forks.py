"""Python processes that start at once: forks of one with the heavy imports done. All test workers share one of a kind:

training    what a run imports
unsloth     Unsloth on a CPU (unsloth_on_cpu.py)
t4          Unsloth on a null GPU (tools/null_gpu) that is a T4
"""

import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from uuid import uuid4

import psutil
from filelock import FileLock

PROJECT = Path(__file__).parents[2]
OF_THE_NULL_GPU = ("LD_PRELOAD", "TRITON_LIBCUDA_PATH", "NULLGPU_")
"""How variables begin that its processes have and no test."""


class Forked:
    """Of subprocess.Popen, what tests use. `arguments` are python's: [script, ...], ["-m", module, ...] or
    ["-c", code, ...].
    """

    def __init__(
        self, arguments: list, *, kind: str = "training", address: str | None = None, env: dict | None = None,
        cwd: Path | str = PROJECT,
    ):  # fmt: skip
        self.args, self.returncode = [str(argument) for argument in arguments], None
        request = {"arguments": self.args, "folder": str(cwd), "environment": dict(os.environ if env is None else env)}
        self.streams = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  # as long as this
        self.connection = _ask(address or forks_address(kind), request, [file.fileno() for file in self.streams])
        self.pid = int.from_bytes(self.connection.recv(4), "big")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=1e-3)
        except TimeoutError:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            self.returncode = _status(self.connection)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for file in self.streams:
            file.seek(0)
        return tuple(file.read().decode() for file in self.streams)


def run(arguments: list, *, timeout: float = 600, **options) -> subprocess.CompletedProcess:
    forked = Forked(arguments, **options)
    output, errors = forked.communicate(timeout)
    return subprocess.CompletedProcess(forked.args, forked.returncode, output, errors)


def two_processes(arguments: list) -> list[Forked]:
    """Those of one run, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, **environment("training"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]
    return [Forked(arguments, env=common | own) for own in ranks]


def run_in_fork(address: str, *arguments: str) -> int:
    """Runs python with these arguments in a fork of the process behind `address`, with this process's folder,
    environment and output. Returns its exit status; 255 where it was killed.
    """
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with _ask(address, request, [1, 2]) as connection:
        connection.recv(4)
        return _status(connection) & 255


def in_a_fork(command: list[str]) -> list[str]:
    """The same command of Python's, done by a fork: for code that starts its programs by itself."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from forks import run_in_fork; "
        "sys.exit(run_in_fork(*sys.argv[1:]))"
    )
    return [sys.executable, "-c", program, forks_address("training"), *command[1:]]


def _ask(address: str, request: dict, streams: list[int]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(request).encode()], streams)
    connection.shutdown(socket.SHUT_WR)
    return connection


def _status(connection: socket.socket) -> int:
    """As Popen.returncode gives it; -9 as well where nobody is left to say."""
    return int.from_bytes(connection.recv(4) or (-9).to_bytes(4, "big", signed=True), "big", signed=True)


@cache
def forks_address(kind: str) -> str:
    """Of a process that serves until the tests end. Its folder takes what Unsloth writes when it starts."""
    shared = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # among the workers, whose parent starts and ends them
    tests = os.getppid() if shared else os.getpid()
    folder = Path(tempfile.gettempdir(), f"forks-{shared or uuid4().hex}-{kind}")
    address = str(folder / "socket")
    with FileLock(f"{folder}.lock"):
        if not Path(address).exists():
            folder.mkdir(exist_ok=True)
            _start(kind, address, tests)
    return address


def _start(kind: str, address: str, tests: int) -> None:
    folder = Path(address).parent
    own = {**environment(kind), "UNSLOTH_LLAMA_CPP_PATH": str(folder / "llama.cpp")}  # read when it is imported
    python = [sys.executable]
    if kind == "t4":
        from benchmarks.gpu.simulated import GPUS

        python, own = [*python, "-m", "tools.null_gpu"], {**own, **GPUS["t4"]}
    server = subprocess.Popen(
        [*python, __file__, kind, address, str(tests)], cwd=folder, env={**os.environ, **own},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = []
    for line in server.stdout:
        if line == f"{address}\n":
            return
        lines.append(line)
    raise RuntimeError(f"The process for {kind} did not start:\n" + "".join(lines))


def environment(kind: str) -> dict[str, str]:
    search = [str(PROJECT), str(PROJECT / "tests" / "support")]  # benchmarks/ is not installed
    own = {"PYTHONPATH": os.pathsep.join([*search, *filter(None, [os.environ.get("PYTHONPATH")])])}
    if kind == "unsloth":
        from unsloth_on_cpu import ENVIRONMENT

        return {**ENVIRONMENT, **own}
    if kind == "t4":
        return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "UNSLOTH_DISABLE_STATISTICS": "1", **own}
    return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **own}


def serve(kind: str, address: str, tests: int) -> None:
    """`tests`: the process with which this one ends."""
    if kind == "unsloth":
        from unsloth_on_cpu import start as prepare
    elif kind == "t4":
        prepare = _import_unsloth
    else:
        from tests.faults.tiny_runs import prepare
    prepare()
    gc.freeze()  # as conftest.py does
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those below
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listener.settimeout(1)
        print(address, flush=True)
        while psutil.pid_exists(tests):
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listener.close()
                _watch(connection)
                os._exit(0)
            connection.close()
    shutil.rmtree(Path(address).parent)
    Path(f"{Path(address).parent}.lock").unlink()


def _import_unsloth() -> None:
    from apo_lora.machine.process import prepare_process

    prepare_process()
    import torch
    import unsloth  # noqa: F401

    torch.cuda._is_in_bad_fork = lambda: False  # the null GPU has no context that a fork could not use


def _watch(connection: socket.socket) -> None:
    """Runs the request in a fork and tells its number, then how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os._exit(_run(connection))
    connection.sendall(pid.to_bytes(4, "big"))
    _, status = os.waitpid(pid, 0)
    connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))


def _run(connection: socket.socket) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, a shell has it ignored
    message, descriptors, *_ = socket.recv_fds(connection, 1 << 16, 2)
    while part := connection.recv(1 << 16):
        message += part
    connection.close()
    request = json.loads(message)
    for descriptor, own in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, own)
    os.chdir(request["folder"])
    own = {name: value for name, value in os.environ.items() if name.startswith(OF_THE_NULL_GPU)}
    os.environ.clear()
    os.environ.update(request["environment"] | own)
    for name in ("huggingface_hub.constants", "datasets.config"):  # the second reads the first
        if name in sys.modules:
            importlib.reload(sys.modules[name])  # it has read the environment already
    first, *rest = request["arguments"]
    sys.argv[:] = {"-m": rest, "-c": [first, *rest[1:]]}.get(first, [first, *rest])
    try:
        if first == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            exec(rest[0], sys.modules["__main__"].__dict__)
        else:
            sys.path[0] = str(Path(first).parent)
            runpy.run_path(first, run_name="__main__")
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve(*sys.argv[1:3], int(sys.argv[3]))
