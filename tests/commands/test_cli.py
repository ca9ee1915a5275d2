"""The command line: quick help, exit codes, what shows and writes nothing. Bad use is in test_bad_input.py."""

import subprocess
import sys
import time

import pytest

from apo_lora import __version__
from apo_lora.commands.main import VERBS, main, parser_of


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from apo_lora.commands.main import VERBS, main\n"
        "for verb in ([], *([name] for name in VERBS)):\n"
        "    try: main([*verb, '--help'])\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
        "    assert not {'torch', 'transformers', 'pydantic', 'yaml', 'PIL', 'tqdm'} & sys.modules.keys(), verb"
    )
    started = time.perf_counter()
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert time.perf_counter() - started < 5  # measured: 0.2 s; the bound is for a busy machine
    assert finished.stdout.count("usage: ") == 1 + len(VERBS)


@pytest.mark.parametrize("module", ["apo_lora", "apo_lora.cli"])
def test_the_package_runs_as_a_module(module):
    finished = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60)
    assert finished.stdout == f"apo-lora {__version__}\n", finished.stderr


def test_recipes_are_listed_and_shown(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "tiny_cpu" in listed and "single_gpu" in listed
    assert main(["recipes", "single_gpu.yaml"]) == 0
    assert "Qwen2.5-VL-3B" in capsys.readouterr().out
    assert main(["recipes", "--keys"]) == 0
    assert "num_generations" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["single_gpu.yaml", "colab_t4.yaml", "gpu_8gb.yaml"])
def test_a_gpu_recipe_without_a_gpu_says_what_to_do(recipe, capsys, tmp_path, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this host has a GPU")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", recipe]) == 2
    assert "tiny_cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_dry_run_shows_the_plan_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", "tiny_cpu.yaml", "--dry-run", "train.max_steps=7"]) == 0
    shown = capsys.readouterr().out
    assert "max_steps: 7" in shown and "7 steps of 8 prompts x 8 completions" in shown
    assert not list(tmp_path.iterdir())


def test_check_rewards_of_the_built_in_task(capsys):
    assert main(["check-rewards", "--recipe", "tiny_cpu.yaml", "data.limit=50"]) == 0


def test_check_data_of_the_built_in_task(capsys):
    assert main(["check-data", "--recipe", "tiny_cpu.yaml", "data.limit=50"]) == 0
    assert "50" in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    "train --recipe tiny_cpu --dry-run a.b=1",
    "train a.b=1 --recipe tiny_cpu --dry-run",
    "train --dry-run a.b=1 --recipe tiny_cpu",
])  # fmt: skip
def test_options_and_overrides_come_in_any_order(words):
    options = parser_of("train").parse_intermixed_args(words.split()[1:])
    assert (options.overrides, options.recipe, options.dry_run) == (["a.b=1"], "tiny_cpu", True)


def test_overrides_may_stand_on_both_sides_of_an_option():
    options = parser_of("sweep").parse_intermixed_args(["name", "a.b=1", "--jobs", "2", "c.d=3", "--dry-run"])
    assert (options.experiment, options.overrides, options.jobs) == ("name", ["a.b=1", "c.d=3"], 2)
