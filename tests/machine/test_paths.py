"""A leading ~ is the home folder wherever a path may stand: in recipes, overrides and arguments."""

import shlex

import pytest

from apo_lora.commands.main import VERBS, parser_of
from apo_lora.machine.paths import as_word, at_home
from apo_lora.recipe.files import find_recipe, load_recipe, override


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("mathvista:~/x", "mathvista:/home/me/x"),
        ("~/x.py:f", "/home/me/x.py:f"),
        ("a/~/x", "a/~/x"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x"),
        ("hub:ME/x", "hub:ME/x"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ],
)
def test_only_a_leading_one_counts(text, meant):
    assert at_home(text) == meant


PLACES = ("model.name", "data.train", "data.eval", "data.general", "data.image_folder", "output.dir")
LISTS = ("data.benchmarks", "rewards.functions", "output.mirror")


def test_every_place_in_a_recipe():
    given = [f"{key}=~/x" for key in PLACES] + [f"{key}=[~/x,accuracy]" for key in LISTS]
    tree = load_recipe(find_recipe("tiny_cpu"), given).model_dump()
    for key in (*PLACES, *LISTS):
        section, name = key.split(".")
        value = tree[section][name]
        assert (value if key in PLACES else value[0]) == "/home/me/x", key


WORDS = {
    "train": "--recipe ~/r --resume ~/c",
    "sweep": "~/e --out ~/o",
    "recipes": "~/r",
    "check-data": "--recipe ~/r",
    "check-rewards": "--recipe ~/r",
    "preflight": "--recipe ~/r",
    "plan": "--recipe ~/r",
    "chat": "~/r question --image ~/i --recipe ~/r --base-gguf ~/b --llama-cpp ~/l",
    "eval": "~/r --recipe ~/r --data ~/d --data mathvista:~/d",
    "report": "~/r ~/s --out ~/o",
    "export": "~/r --to gguf --out ~/o --llama-cpp ~/l",
    "doctor": "",
    "setup-vllm": "",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_place_in_a_command(verb):
    words = WORDS[verb].split()
    parsed = str(vars(parser_of(verb).parse_intermixed_args(words)))
    assert "~" not in parsed and parsed.count("/home/me/") == sum("~" in word for word in words)


def test_a_shown_command_can_be_pasted():
    assert shlex.split(f"apo-lora report {as_word('my runs/a b')} x") == ["apo-lora", "report", "my runs/a b", "x"]


@pytest.mark.parametrize("value", ["my run", "a: b", "[x]", "x #1", "0123", "null", "it's", "x" * 90 + " y" * 40, "~"])
def test_an_override_that_is_shown_is_read_as_it_was_meant(value):
    recipe = load_recipe(find_recipe("tiny_cpu"), shlex.split(as_word(override("output.dir", value))))
    assert recipe.output.dir == at_home(value)
