"""What the README tells people to type is there."""

import re

import pytest
from conftest import PROJECT

from apo_lora.commands.main import VERBS, build_parser
from apo_lora.recipe.files import find_recipe, load_recipe, shipped_recipes

README = (PROJECT / "README.md").read_text()
TRAIN = r"(?:python|accelerate launch) -m apo_lora\.train"
COMMANDS = re.findall(rf"^(?:apo-lora|{TRAIN}|make) .*?(?=\s{{2,}}#|$)", README, flags=re.MULTILINE)
BENCHMARKS = re.findall(r"`python -m (benchmarks\.\w+) ([^`]*)`", README)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make")])
def test_every_command_parses(command):
    import shlex

    words = shlex.split(re.sub(TRAIN, "apo-lora train", command))[1:]
    options = build_parser().parse_args(words)
    if getattr(options, "recipe", None):
        load_recipe(find_recipe(options.recipe), options.overrides)


@pytest.mark.parametrize(("module", "arguments"), BENCHMARKS)
def test_every_benchmark_parses(module, arguments):
    import importlib

    importlib.import_module(f"{module}.__main__").parse(arguments.split())


def test_the_make_targets_exist():
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make")}
    assert targets == {"train", "test"}
    makefile = (PROJECT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_every_recipe_is_in_the_table():
    assert not [name for name in shipped_recipes() if f"`{name}.yaml`" not in README]


def test_every_verb_named_in_a_sentence_is_there():
    named = set(re.findall(r"`apo-lora ([a-z-]+)", README))
    assert named and named <= set(VERBS)


def test_the_formulas_link_to_their_functions():
    code = (PROJECT / "apo_lora" / "apo.py").read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(apo_lora/apo\.py#L(\d+)\)", README)
    assert len(links) == 4
    assert not [name for name, line in links if not code[int(line) - 1].startswith(f"def {name}(")]


def test_the_sections_come_in_the_order_people_read_them():
    titles = re.findall(r"^## (.+)$", README, flags=re.MULTILINE)
    assert titles == [
        "Two commands", "In the browser", "Measured", "Recipes", "Your data", "What a run leaves", "How it works",
        "Ask it, measure it, export it", "When something goes wrong", "Limits", "Citation",
    ]  # fmt: skip


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("http") and not (PROJECT / link).exists()]
    assert links and not missing


def test_the_pinned_set_pins_what_the_project_needs():
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", name)[0].lower().replace("_", "-") for name in project["dependencies"]}
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert needed <= pinned
    assert {"unsloth", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "xformers"} <= needed
