"""The wheel carries the recipes, the embedded base and the report's page, and works away from the checkout."""

import subprocess
import sys
import tomllib

import pytest
from conftest import PROJECT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DEPENDENCIES = [
    Requirement(line) for line in tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
]
# Methods of these are overridden, or functions of theirs replaced.
CODE = {".py", ".pyc"}
REACHED_INTO = {"trl", "transformers", "unsloth", "unsloth_zoo", "peft", "torch", "bitsandbytes"}


def pinned():
    pins = (line.split("==") for line in (PROJECT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): Version(version) for name, version in pins}


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda dependency: dependency.name)
def test_the_tested_version_lies_within_what_is_asked_for(dependency):
    assert pinned()[canonicalize_name(dependency.name)] in dependency.specifier


@pytest.mark.parametrize("name", sorted(REACHED_INTO))
def test_what_is_reached_into_is_bounded_by_the_next_minor_version(name):
    (dependency,) = (dependency for dependency in DEPENDENCIES if dependency.name == name)
    version = pinned()[canonicalize_name(name)]
    assert f"{version.major}.{version.minor + 1}" not in dependency.specifier
    assert f"{version.major + 1}.0" not in dependency.specifier


@pytest.mark.slow
def test_the_wheel_finds_its_recipes_and_its_base(tmp_path):
    source = tmp_path / "source"  # a build leaves litter beside pyproject.toml
    subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(source)], check=True)
    assert not any((tmp_path / "site" / folder).exists() for folder in ("tools", "benchmarks", "tests"))
    package = PROJECT / "apo_lora"
    data = [path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix not in CODE]
    assert len(data) > 10 and not [path for path in data if not (tmp_path / "site" / "apo_lora" / path).is_file()]
    code = (
        "import apo_lora.recipe.files as r, apo_lora.tiny as t, json\n"
        f"assert t.__file__.startswith({str(tmp_path)!r}), t.__file__\n"
        "r.load_recipe(r.find_recipe('tiny_cpu.yaml'))\n"
        "import apo_lora.sweep.experiment as x, pathlib\n"
        "found = x.find_experiment('apo_vs_grpo')\n"
        "assert len(x.plan_runs(found, x.load_experiment(found), pathlib.Path('out'))) == 20\n"
        "assert (t.BASE_DIR / 'model.safetensors').is_file()\n"
        "import apo_lora.machine.host as d\n"
        "assert d.tested_versions()['torch']\n"
        "print(sorted(r.shipped_recipes()))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "single_gpu" in finished.stdout
