"""Puts apo-lora beside a notebook, into an environment of its own: no package that the kernel has is touched.

The notebook's first cell clones the repository and runs this file by its path, with the standard library alone. uv
makes the environment; where the machine has no uv, pip fetches it into a folder. The environment's Python is the tested
one, which uv downloads where it is missing, or else the kernel's own (which in Colab cannot make an environment by
itself: it lacks ensurepip). After a cut, the next run takes up what has arrived in uv's cache.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:] = [str(SOURCE), *(place for place in sys.path if place != str(SOURCE))]
    for _name in [_name for _name in sys.modules if _name.partition(".")[0] == "apo_lora"]:
        del sys.modules[_name]  # of another checkout, if the address was changed

from apo_lora.notebook.verbs import StepFailed, without_foreign  # noqa: E402  # needs the path

PYTHON = "3.12"
DOWNLOAD_GB, DISK_GB = 4.4, 8.2
"""Measured: the wheels, and the environment. tests/colab_twin compares the second with the disk."""
MINUTES = "1 to 5"
"""Measured on 2 cores: 44 to 97 s on a fast line, 159 s on a slower one."""

ENVIRONMENT = Path("apo-lora-env").absolute()
OWN_PYTHON = ENVIRONMENT / "bin" / "python"
READY = ENVIRONMENT / "ready"
"""Holds the fingerprint of what was installed; written last."""

REMEDIES = {
    r"No space left|Disk quota": "make room, or Runtime > Disconnect and delete runtime for an empty machine",
    r"fetch|connect|dns|timed? ?out|download|network|reset": "check the network; what has arrived is kept",
}


def run(*command: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """`meanwhile` is called twice a second. Raises StepFailed with the reason that the command gave, in one line."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, env=without_foreign(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                meanwhile()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            output.seek(0)
            raise StepFailed(f"install: {reason(output.read())}. Run this cell again.")


def reason(output: str) -> str:
    """Of what uv or pip printed before it failed: the error and its first cause in one line, and what to do."""
    error = re.split(r"(?m)^\s*(?:error:|ERROR:|[x×])", output)[-1].partition("hint:")[0]
    causes = [" ".join(part.split()).strip(" .│") for part in re.split(r"[├╰]─▶|(?:\b[Cc]aused? ?(?:by)?:)", error)]
    said = ": ".join(dict.fromkeys([causes[0], causes[-1]]))[:400] or "it ended without a word"
    remedy = next((text for pattern, text in REMEDIES.items() if re.search(pattern, error, re.IGNORECASE)), None)
    return f"{said}; {remedy or 'see whether the address and the machine are right'}"


def uv() -> list[str]:
    """The command: the machine's, else out of the registry."""
    if found := shutil.which("uv"):
        return [found]
    folder = ENVIRONMENT.with_name("apo-lora-uv")
    if not (folder / "bin" / "uv").is_file():
        run(sys.executable, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--target", str(folder), "uv")
    return [str(folder / "bin" / "uv")]


def make_environment(tool: list[str]) -> None:
    """With pip, which `export` calls."""
    for python in (PYTHON, sys.executable):
        try:
            return run(*tool, "venv", "--clear", "--seed", "--python", python, str(ENVIRONMENT))
        except StepFailed as error:
            failed = error
    raise failed


def fingerprint() -> str:
    pins = (SOURCE / name for name in ("constraints.txt", "pyproject.toml"))
    return hashlib.sha256(b"".join([str(SOURCE).encode(), *(path.read_bytes() for path in pins)])).hexdigest()


def require_room() -> None:
    free = shutil.disk_usage(ENVIRONMENT.parent).free / 1e9
    if free < DISK_GB + 1:
        remedy = next(iter(REMEDIES.values()))
        raise StepFailed(f"install: {free:.1f} GB of disk are free, and {DISK_GB + 1:.1f} are needed; {remedy}.")


def install() -> None:
    """Raises StepFailed."""
    if READY.is_file() and READY.read_text() == fingerprint():
        print(f"{ENVIRONMENT.name} is ready: nothing to install.")
        return
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    require_room()
    print(
        f"Installing into {ENVIRONMENT.name}, beside the notebook's own packages: {DOWNLOAD_GB} GB to download, "
        f"{DISK_GB} GB of disk, {MINUTES} minutes.",
        flush=True,
    )
    started, used = time.monotonic(), shutil.disk_usage(ENVIRONMENT.parent).used

    def show() -> None:
        gigabytes = (shutil.disk_usage(ENVIRONMENT.parent).used - used) / 1e9  # others may write to that disk as well
        gigabytes = min(max(gigabytes, 0), DISK_GB)
        print(f"\r{gigabytes:4.1f} of {DISK_GB} GB, {time.monotonic() - started:3.0f} s", end="", flush=True)

    tool = uv()
    make_environment(tool)
    into = [*tool, "pip", "install", "--python", str(OWN_PYTHON)]
    pins, needed = str(SOURCE / "constraints.txt"), str(SOURCE / "pyproject.toml")
    try:
        run(*into, "--only-binary", ":all:", "--constraint", pins, "--requirement", needed, meanwhile=show)
        # Editable: the kernel imports its side of apo-lora from the same files.
        run(*into, "--no-deps", "--editable", str(SOURCE), meanwhile=show)
    finally:
        print(flush=True)
    READY.write_text(fingerprint())
    print(f"Installed in {time.monotonic() - started:.0f} s; no package of the notebook's own has changed.")


if __name__ == "__main__":
    if os.environ.get("APO_PYTHON", str(OWN_PYTHON)) == str(OWN_PYTHON):
        try:
            install()
        except KeyboardInterrupt:
            raise StepFailed("install: stopped. Run this cell again; what has arrived is kept.") from None
        os.environ["APO_PYTHON"] = str(OWN_PYTHON)  # for apo_lora.notebook, the kernel's side
        if str(OWN_PYTHON.parent) not in os.environ["PATH"].split(os.pathsep):
            os.environ["PATH"] += os.pathsep + str(OWN_PYTHON.parent)  # last: for `!apo-lora ...` in a cell
    else:
        print("APO_PYTHON is set: the apo-lora of that interpreter is used, and nothing is installed.")
