"""The house rules: imports go down the table in docs/architecture.md only, files stay small, the linter is content."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import PROJECT

PACKAGE = PROJECT / "apo_lora"
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def layers():
    """Module path -> layer, out of the table."""
    table = {}
    for line in (PROJECT / "docs" / "architecture.md").read_text().splitlines():
        if match := re.match(r"\| (\d) \| (.+?) \|", line):
            for name in re.findall(r"`([\w/]+\.py)`", match[2]):
                table[name] = int(match[1])
    return table


def imported_modules(path):
    """Paths (in the package) of the modules that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("apo_lora"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            target = name.removeprefix("apo_lora.").replace(".", "/") + ".py"
            if target in MODULES:
                found.add(target)
    return found


def test_every_module_has_its_place_in_the_table():
    assert set(layers()) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_or_sideways_within_a_layer(module):
    table = layers()
    upward = [name for name in imported_modules(PACKAGE / module) if table[name] > table[module]]
    # `python -m apo_lora.train` is a short way to say `apo-lora train`
    assert not [name for name in upward if (module, name) != ("train.py", "cli.py")]


@pytest.mark.parametrize(
    "module", ["apo.py", "rewards/scores.py", "errors.py", "recipe.py", "cli.py", "rewards/verifier.py"]
)
def test_what_must_not_need_the_heavy_libraries_does_not(module):
    forbidden = {"torch", "transformers", "trl"} if module != "apo.py" else {"transformers", "trl", "apo_lora.recipe"}
    name = "apo_lora." + module.removesuffix(".py").replace("/", ".")
    code = f"import sys, {name}; print([m for m in {forbidden!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_files_stay_small():
    lengths = {name: len((PACKAGE / name).read_text().splitlines()) for name in MODULES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    assert not [name for name in MODULES if "util" in name]


def test_the_linter_is_content():
    for arguments in (["check"], ["format", "--check"]):
        finished = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "."], cwd=PROJECT, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
