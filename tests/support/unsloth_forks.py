"""One process per test worker starts Unsloth, which takes 12 s of a CPU; each script that needs it runs in a fork."""

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path


def run_in_fork(address: str, script: Path, *arguments: str) -> int:
    """Runs the script in a fork of the process behind `address`, with this process's folder, environment and output.

    Returns its exit status; 255 where it was killed.
    """
    request = {"arguments": [str(script), *arguments], "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
        connection.shutdown(socket.SHUT_WR)
        return (connection.recv(1) or b"\xff")[0]


@cache
def forks_address(**environment: str) -> str:
    """Of a process that serves until this one ends. Its folder takes what Unsloth writes when it starts."""
    folder = tempfile.TemporaryDirectory()
    address = f"{folder.name}/socket"
    server = subprocess.Popen(
        [sys.executable, __file__, address], cwd=folder.name, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    atexit.register(folder.cleanup)
    atexit.register(server.kill)
    lines = []
    for line in server.stdout:
        if line == f"{address}\n":
            return address
        lines.append(line)
    raise RuntimeError("Unsloth did not start on the CPU:\n" + "".join(lines))


def serve(address: str) -> None:
    from unsloth_on_cpu import start

    start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print(address, flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                status = run(connection)
                connection.sendall(bytes([status & 255]))
                os._exit(status)
            connection.close()


def run(connection: socket.socket) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, descriptors, *_ = socket.recv_fds(connection, 1 << 16, 2)
    while part := connection.recv(1 << 16):
        message += part
    request = json.loads(message)
    for descriptor, own in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, own)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve(sys.argv[1])
