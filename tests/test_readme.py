"""What the README tells people to type is there."""

import re

import pytest
from conftest import PROJECT

from apo_lora.commands.main import VERBS, parser_of
from apo_lora.recipe.files import find_recipe, load_recipe, shipped_recipes

README = (PROJECT / "README.md").read_text()
RESULTS = (PROJECT / "docs" / "results.md").read_text()
TRAIN = r"(?:python|accelerate launch) -m apo_lora\.train"
COMMANDS = re.findall(rf"^(?:apo-lora|{TRAIN}|make) .*?(?=\s{{2,}}#|$)", README, flags=re.MULTILINE)
BENCHMARKS = re.findall(r"`python -m (benchmarks\.\w+) ([^`]*)`", RESULTS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make")])
def test_every_command_parses(command):
    import shlex

    words = shlex.split(re.sub(TRAIN, "apo-lora train", command))[1:]
    options = parser_of(words[0]).parse_intermixed_args(words[1:])
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


def test_the_formulas_name_functions_of_the_algorithm():
    from apo_lora import apo

    named = re.findall(r"\| `(\w+)` \|$", README, flags=re.MULTILINE)
    assert len(named) == 4 and all(hasattr(apo, name) for name in named)


def test_a_stranger_reads_it_in_two_minutes():
    assert len(README.splitlines()) <= 110


@pytest.mark.parametrize(
    "page", [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", sorted((PROJECT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_every_file_of_the_project_that_a_page_names_exists(page):
    named = re.findall(r"`((?:apo_lora|benchmarks|recipes|tests|tools)/[\w./-]+)`", page.read_text())
    assert not [path for path in named if not (PROJECT / path).exists()]


def test_the_page_about_new_families_names_what_is_in_the_code():
    from apo_lora.family.record import Family
    from apo_lora.family.shape import ModelShape

    page = (PROJECT / "docs" / "new_family.md").read_text()
    methods = {name for name in re.findall(r"`(\w+)`", page) if hasattr(Family, name)}
    assert methods == {"prompt_positions", "features_by_image", "embedding_inputs"}
    for prefix in re.findall(r"`(\w+_)\*`", page):
        assert [name for name in dir(ModelShape) if name.startswith(prefix)]
    fixtures = (PROJECT / "tests" / "conftest.py").read_text() + (PROJECT / "tests/support/gguf_model.py").read_text()
    assert "def load_each" in fixtures and "SMALL_CONFIGS =" in fixtures


def test_the_pinned_set_pins_what_the_project_needs():
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", name)[0].lower().replace("_", "-") for name in project["dependencies"]}
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert needed <= pinned
    assert {"unsloth", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "xformers"} <= needed
