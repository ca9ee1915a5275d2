"""The install cell's script with a uv of our own making: what it asks for, and one line for each way to fail."""

import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import PROJECT

from apo_lora.notebook.verbs import StepFailed

sys.path.insert(0, str(PROJECT / "colab"))
import install

FAKE_UV = """#!{python}
import os, pathlib, sys
with open({asked!r}, "a") as file:
    print(*sys.argv[1:], *(name for name in os.environ if name.startswith(("UV_", "PYTHON"))), file=file)
if "3.12" in sys.argv and {without!r}:
    sys.exit("error: No interpreter found for Python 3.12")
if sys.argv[1] == "venv":
    pathlib.Path(sys.argv[-1], "bin").mkdir(parents=True)
elif {says!r}:
    sys.exit({says!r})
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A disk with room, and a uv on the PATH: machine(says="how it fails"). Returns the file of uv's calls."""
    for name, value in {
        "ENVIRONMENT": tmp_path / "env", "OWN_PYTHON": tmp_path / "env/bin/python", "READY": tmp_path / "env/ready",
    }.items():  # fmt: skip
        monkeypatch.setattr(install, name, value)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: SimpleNamespace(free=50e9, used=0))
    monkeypatch.setenv("UV_SYSTEM_PYTHON", "true")
    monkeypatch.setenv("PYTHONPATH", "/env/python")
    asked = tmp_path / "asked"

    def make(says="", without=False):
        uv = tmp_path / "bin" / "uv"
        uv.parent.mkdir(exist_ok=True)
        uv.write_text(FAKE_UV.format(python=sys.executable, asked=str(asked), says=says, without=without))
        uv.chmod(0o755)
        monkeypatch.setenv("PATH", f"{uv.parent}{os.pathsep}{os.environ['PATH']}")
        return asked

    return make


def test_it_installs_pinned_wheels_beside_the_kernel_once(machine, capsys):
    asked = machine()
    install.install()
    venv, packages, own = asked.read_text().splitlines()
    assert venv.startswith("venv --clear --seed --python 3.12 ")
    assert "--only-binary :all: --constraint" in packages and packages.split().count("--python") == 1
    assert own.endswith(f"--no-deps --editable {PROJECT}")  # and no variable of Colab's about its own Python
    assert f"{install.DOWNLOAD_GB} GB to download" in capsys.readouterr().out
    install.install()
    assert len(asked.read_text().splitlines()) == 3 and "nothing to install" in capsys.readouterr().out


def test_the_kernel_s_own_python_serves_where_the_tested_one_cannot_be_had(machine):
    asked = machine(without=True)
    install.install()
    assert asked.read_text().splitlines()[1].startswith(f"venv --clear --seed --python {sys.executable} ")


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (
            "Resolved 9 packages\n  × Failed to download `torch==2.10.0`\n  ├─▶ error sending request\n  ╰─▶ dns error",
            "install: Failed to download `torch==2.10.0`: dns error; check the network",
        ),
        ("error: Failed to write\n  Caused by: No space left on device (os error 28)", "make room"),
        ("error: Request failed\n  Caused by: operation timed out", "check the network"),
        ("error: Because only numpy<3 is there, it has no solution", "see whether the address and the machine"),
    ],
)
def test_a_failure_is_one_line_with_a_remedy_and_the_next_run_goes_on(machine, says, words):
    machine(says=says)
    with pytest.raises(StepFailed) as failure:
        install.install()
    assert words in str(failure.value) and "\n" not in str(failure.value)
    assert str(failure.value).endswith("Run this cell again.")
    machine()
    install.install()
    assert install.READY.is_file()


def test_a_full_disk_is_refused_beforehand(machine, monkeypatch):
    asked = machine()
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: SimpleNamespace(free=5e9))
    with pytest.raises(StepFailed, match=r"5\.0 GB of disk are free, and 9\.2 are needed; make room"):
        install.install()
    assert not asked.exists()


def test_changed_pins_are_installed_again(machine, monkeypatch):
    asked = machine()
    install.install()
    monkeypatch.setattr(install, "fingerprint", lambda: "other pins")
    install.install()
    assert len(asked.read_text().splitlines()) == 6


def test_without_uv_pip_fetches_it_into_a_folder_of_its_own(machine, monkeypatch):
    monkeypatch.setattr(install.shutil, "which", lambda _: None)
    called = []
    monkeypatch.setattr(install, "run", lambda *command, **options: called.append(command))
    (uv,) = install.uv()
    assert called[0][:4] == (sys.executable, "-m", "pip", "install") and "--target" in called[0]
    assert uv.startswith(called[0][called[0].index("--target") + 1])


def test_an_interpreter_that_has_apo_lora_is_used_as_it_is(machine, monkeypatch, capsys):
    monkeypatch.setenv("APO_PYTHON", sys.executable)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = dict(sys.modules)
    try:
        runpy.run_path(str(PROJECT / "colab" / "install.py"), run_name="__main__")
    finally:
        sys.modules.update(modules)  # of another checkout they would have been: the script takes them out
    assert "nothing is installed" in capsys.readouterr().out


def test_the_kernel_s_side_needs_the_standard_library_and_ipython_alone():
    code = (
        "import sys, IPython.display; before = set(sys.modules)\n"
        "import apo_lora.notebook.session\n"
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "{'apo_lora'}\n"
