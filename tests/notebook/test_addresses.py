"""Published addresses come from pyproject.toml, and a fork changes them with one edit."""

import re
import subprocess
import sys

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "colab"))
from execute import repository as clone

from tools.addresses import NOTEBOOK, files_that_name, main, repository

NAME = repository(PROJECT).partition("/")[2]
ADDRESS = re.compile(rf"github(?:\.com)?/([\w-]+/{re.escape(NAME)})\b")


def addresses(project):
    listed = subprocess.check_output(["git", "ls-files", "-z", "*.md", "*.ipynb", "*.toml"], cwd=project, text=True)
    texts = {name: (project / name).read_text(encoding="utf-8") for name in filter(None, listed.split("\0"))}
    return {name: set(found) for name, text in texts.items() if (found := ADDRESS.findall(text))}


def test_every_address_is_that_of_pyproject():
    found = addresses(PROJECT)
    assert {"README.md", "pyproject.toml", NOTEBOOK} <= set(found)
    assert set().union(*found.values()) == {repository(PROJECT)}


@pytest.fixture
def fork(tmp_path):
    clone(tmp_path / "fork")
    return tmp_path / "fork"


def test_a_fork_edits_one_line(fork):
    pyproject = fork / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace(repository(fork), f"someone/{NAME}"))
    main(fork)
    found = addresses(fork)
    assert set(found) == set(addresses(PROJECT)) and set().union(*found.values()) == {f"someone/{NAME}"}
    assert files_that_name(repository(PROJECT), fork) == []
