"""The house rules: a folder imports only those above it, nothing runs in a circle, files stay small, the linter is
content."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import PROJECT

PACKAGE = PROJECT / "apo_lora"
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def places():
    """Top-level files and folders of the package in the order of docs/architecture.md, which says what each holds."""
    text = (PROJECT / "docs" / "architecture.md").read_text()
    table = text.partition("| place | holds |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `([\w.]+)/?` \|", table, re.MULTILINE)


def place_of(module):
    return module.partition("/")[0]


def imported_modules(path):
    """Modules of the package that a file imports, at its top or in a function."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("apo_lora"):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    targets = {name.removeprefix("apo_lora.").replace(".", "/") + ".py" for name in names}
    return targets & set(MODULES)


def test_every_place_stands_in_the_ordered_list_once():
    assert len(places()) == len(set(places()))
    assert set(places()) == {place_of(module) for module in MODULES}


def test_a_file_imports_only_its_own_folder_and_those_above_it():
    place = {name: number for number, name in enumerate(places())}
    below = {
        module: names
        for module in MODULES
        if (names := {n for n in imported_modules(PACKAGE / module) if place[place_of(n)] > place[place_of(module)]})
    }
    assert below == {}


def test_no_imports_run_in_a_circle():
    imports = {module: imported_modules(PACKAGE / module) for module in MODULES}
    while ends := [module for module, used in imports.items() if not used & imports.keys()]:
        for module in ends:
            del imports[module]
    assert imports == {}, "what is left imports itself, by way of the others"


@pytest.mark.parametrize(
    "module",
    [
        "apo.py",
        "rewards/scores.py",
        "errors.py",
        "recipe/schema.py",
        "commands/main.py",
        "rewards/verifier.py",
        "family/lookup.py",
        "machine/doctor.py",
    ],
)
def test_what_must_not_need_the_heavy_libraries_does_not(module):
    forbidden = {"torch", "transformers", "trl"}
    if module == "apo.py":
        forbidden = {"transformers", "trl", "apo_lora.recipe.schema"}
    name = "apo_lora." + module.removesuffix(".py").replace("/", ".")
    code = f"import sys, {name}; print([m for m in {forbidden!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


FAMILY_WORDS = re.compile(r"qwen|language_model|\bvisual\b|<\|(vision|image|video)", re.IGNORECASE)
FAMILY_ATTRIBUTES = {"language_model", "visual", "lm_head", "get_rope_index", "image_token_id", "pooler_output"}
NAMED_ALL_THE_SAME = {
    "run/model_card.py": "licences go by the names of published models",
    "evaluation/table.py": "a row of the paper's table",
    "machine/doctor.py": "says what the recipes for a GPU train",
    "notebook/worker.py": "says what the recipes for a GPU train",
}


@pytest.mark.parametrize("module", [m for m in MODULES if place_of(m) != "family" and m not in NAMED_ALL_THE_SAME])
def test_only_its_record_names_what_is_special_about_a_family(module):
    """Neither names and tokens in a string, nor paths in a model; docstrings and comments may."""
    nodes = list(ast.walk(ast.parse((PACKAGE / module).read_text())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    words = [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    assert [word for word in words if FAMILY_WORDS.search(word)] == []
    assert [n.attr for n in nodes if isinstance(n, ast.Attribute) and n.attr in FAMILY_ATTRIBUTES] == []
    assert [text for n in nodes if isinstance(n, ast.BinOp) and "28 * 28" in (text := ast.unparse(n))] == []


def test_no_assert_answers_a_user():
    """It has no remedy, and python -O takes it out."""
    found = {
        name: sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse((PACKAGE / name).read_text())))
        for name in MODULES
    }
    allowed = {"rollout/group_images.py": 1}  # of upstream's own call: no user can cause it
    assert {name: count for name, count in found.items() if count} == allowed


@pytest.mark.parametrize("module", MODULES)
def test_nothing_needs_unix_to_be_imported(module):
    top = ast.parse((PACKAGE / module).read_text()).body
    imported = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert not imported & {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}


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
