"""The twin's machine: Colab's Python with Colab's packages, made once per machine, and uv beside them.

All of it is in a folder of its own below the user's cache, also uv's cache, from which a second installation takes
hard links.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = HERE / "packages.txt"
PYTHON = "3.13"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apo-lora-tests"


def find_python() -> Path | None:
    """Colab's Python, where this machine has it: on the PATH, or under pyenv."""
    found = [shutil.which(f"python{PYTHON}"), *sorted((Path.home() / ".pyenv/versions").glob(f"{PYTHON}.*/bin/python"))]
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"  # a shim of pyenv may name no Python at all
    for python in filter(None, found):
        said = subprocess.run([python, "-c", ask], capture_output=True, text=True)
        if said.stdout.strip() == PYTHON:
            return Path(python)
    return None


def find_uv() -> Path:
    """The machine's, or one from the registry in the cache."""
    if found := shutil.which("uv"):
        return Path(found)
    uv = CACHE / "uv" / "bin" / "uv"
    if not uv.is_file():
        _run(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(CACHE / "uv"), "uv")
    return uv


def uv_settings(folder: Path) -> dict[str, str]:
    """Environment variables with which uv finds the registry that pip is set up for, in a configuration file.

    The notebook drops variables of uv's, as Colab sets some that would mislead it. Python is not downloaded.
    """
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
    )
    lines = [f'cache-dir = "{CACHE / "uv-cache"}"', 'python-downloads = "never"']
    lines += [f'index-url = "{asked.stdout.strip()}"'] if asked.returncode == 0 else []
    (folder / "uv").mkdir(parents=True)
    (folder / "uv" / "uv.toml").write_text("\n".join(lines) + "\n")
    return {"XDG_CONFIG_HOME": str(folder)}


def kernel_python(python: Path, uv: Path, settings: dict[str, str]) -> Path:
    """Of an environment with Colab's packages and the stand-in for google.colab; made once."""
    names = hashlib.sha256(PACKAGES.read_bytes() + str(python).encode()).hexdigest()[:12]
    home = CACHE / f"colab-{PYTHON}-{names}"
    made, environment = home / "bin" / "python", {**os.environ, **settings}
    if not (home / "ready").is_file():
        _run(str(uv), "venv", "--clear", "--python", str(python), str(home), env=environment)
        _run(str(uv), "pip", "install", "--python", str(made), "--requirement", str(PACKAGES), env=environment)
        (home / "ready").touch()
    stand_in = home / "lib" / f"python{PYTHON}" / "site-packages" / "google" / "colab"
    shutil.copytree(HERE / "stand_in" / "google" / "colab", stand_in, dirs_exist_ok=True)
    return made


def _run(*command: str, **options) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
