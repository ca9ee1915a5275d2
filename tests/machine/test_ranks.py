"""Several processes: the step of two is the step of one, and one of them alone writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import Forked, two_processes
from tiny_trainer import LOSSES
from two_ranks import GENERATIONS, PROMPTS

from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.machine import ranks
from apo_lora.preflight.checks import next_rung
from apo_lora.recipe.combinations import combination_problems
from apo_lora.recipe.files import find_recipe, load_recipe, shipped_recipes
from apo_lora.recipe.schema import Recipe

SCRIPT = Path(__file__).parents[1] / "support" / "two_ranks.py"


# --- the gradient ----------------------------------------------------------------------------------------------------


def finish(*processes: Forked) -> str:
    outputs = ["".join(process.communicate(600)) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return "".join(outputs)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """By loss: (of one process, [of each of two])."""
    folder = tmp_path_factory.mktemp("gradients")
    for number in ("1", "2"):
        (folder / number).mkdir()
    finish(Forked([SCRIPT, "gradient", folder / "1"]), *two_processes([SCRIPT, "gradient", folder / "2"]))

    def facts(loss, processes, rank):
        return torch.load(folder / str(processes) / f"{loss}-{processes}-{rank}.pt", weights_only=True)

    return {loss: (facts(loss, 1, 0), [facts(loss, 2, rank) for rank in range(2)]) for loss in LOSSES}


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_have_the_gradient_of_one(steps, loss):
    one, two = steps[loss]
    assert all(relative(steps[other][0]["gradient"], one["gradient"]) > 1e-2 for other in steps if other != loss)
    assert PROMPTS * GENERATIONS // 2 % GENERATIONS  # a group is split between them
    for process in two:
        assert relative(process["alone"], one["gradient"]) > 0.1  # neither has it without the other,
        assert relative(2 * process["gradient"], one["gradient"]) > 0.1  # and a factor would show
        assert relative(process["gradient"], one["gradient"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_record_the_figures_of_one(steps, loss):
    one, (main, _) = steps[loss]
    assert main["log"]["clip_fraction"] > 0.05
    assert main["log"]["dads_weight_positives"] < 0.99 and main["log"]["stcr_multiplier"] > 1.01
    for name, value in one["log"].items():
        if not name.startswith(("seconds", "tokens_per", "peak", "total_flos", "step_time")):
            assert main["log"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# --- the command -----------------------------------------------------------------------------------------------------

TINY = (
    "--recipe", "tiny_cpu.yaml", "grpo.num_generations=4", "grpo.prompts_per_step=3", "grpo.completions_per_pass=3",
    "grpo.max_completion_length=64", "data.eval_limit=9", "data.general=null", "train.save_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    measured = ["train.eval_steps=1", "output.keep_best=true"]
    command = ["command", folder, "train", *TINY, *measured, "train.max_steps=3", f"output.dir={folder}/run"]
    return folder, finish(*two_processes([SCRIPT, *command]))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_only_the_main_process_writes(run_of_two):
    folder, _ = run_of_two
    main, other = (json.loads((folder / f"written-{rank}.json").read_text()) for rank in range(2))
    assert {"run", "run/metrics.jsonl", "run/completions.jsonl", "run/adapter-best"} <= set(main)
    assert other == []


@pytest.mark.slow
def test_the_record_is_whole(run_of_two):
    folder, output = run_of_two
    metrics, completions = (rows(folder / "run" / name) for name in ("metrics.jsonl", "completions.jsonl"))
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert [row["step"] for row in completions] == [1] * 12 + [2] * 12 + [3] * 12
    assert all(len({row["prompt"] for row in completions[i : i + 4]}) == 1 for i in range(0, 36, 4))
    assert json.loads((folder / "run" / "eval.json").read_text())["after"]["reasoning"]["items"] == 9
    answers = rows(folder / "run" / "answers.jsonl")
    assert [(row["model"], row["row"]) for row in answers] == [(m, n) for m in ("base", "tuned") for n in range(1, 10)]
    assert all((folder / "run" / image).is_file() for row in answers for image in row["images"])
    assert json.loads((folder / "run" / "environment.json").read_text())["processes"] == 2
    assert output.count("3 per pass of each of 2 processes") == 1  # said once


@pytest.mark.slow
def test_what_is_measured_during_training_is_that_of_all_processes(run_of_two):
    """At the last step it is what the run measures when it has ended: the same items, seed and adapter."""
    folder, output = run_of_two
    metrics = rows(folder / "run" / "metrics.jsonl")
    after = json.loads((folder / "run" / "eval.json").read_text())["after"]["reasoning"]
    assert metrics[-1]["held_out_accuracy"] == after["accuracy"] and after["items"] == 9
    assert len({row["held_out_length"] for row in metrics}) > 1
    assert output.count("held out: accuracy") == 3  # said once


@pytest.mark.slow
def test_what_cannot_be_shared_out_is_one_line_of_each_process(tmp_path):
    """Without the launcher around it, which has many words of its own."""
    command = [
        sys.executable,
        "-m",
        "apo_lora.train",
        *TINY,
        f"output.dir={tmp_path}/run",
        "grpo.completions_per_pass=12",
    ]
    for rank, start in ((0, "tiny_cpu: grpo.completions_per_pass: 12"), (1, "process 1: tiny_cpu: grpo.comp")):
        environment = {**os.environ, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # never reached
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 2 and run.stderr.startswith(start), run.stderr
        assert "2 processes = 6; use one of [1, 2, 3, 6]" in run.stderr and len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# --- parts -----------------------------------------------------------------------------------------------------------


def test_one_process_never_touches_the_distributed_package():
    assert (ranks.num_processes(), ranks.rank(), ranks.is_main()) == (1, 0, True)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    with ranks.joined():
        assert ranks.summed({"a": 1.5, "b": 2.0}) == {"a": 1.5, "b": 2.0}
        assert ranks.gathered(["x", "y"]) == ["x", "y"] and ranks.any_rank(True) and not ranks.any_rank(False)
        ranks.sum_gradients([parameter])
        ranks.wait()
    assert parameter.grad.tolist() == [3.0, 3.0]
    assert not torch.distributed.is_initialized()


def recipe_of(**grpo):
    return Recipe.model_validate({"data": {"train": "boards"}, "grpo": grpo})


@pytest.mark.parametrize(
    ("processes", "grpo", "problem"),
    [
        (2, {"prompts_per_step": 4, "num_generations": 4, "completions_per_pass": 8}, None),
        (2, {"prompts_per_step": 4, "num_generations": 4, "completions_per_pass": 16}, "completions_per_pass: 16 does"),
        (3, {"prompts_per_step": 4, "num_generations": 4, "completions_per_pass": 4}, "use a multiple of 3"),
        (3, {"prompts_per_step": 3, "num_generations": 4, "completions_per_pass": 4}, None),
    ],
)  # fmt: skip
def test_a_step_must_be_shared_out_evenly(processes, grpo, problem):
    problems = list(combination_problems(recipe_of(**grpo), processes))
    assert len(problems) == (problem is not None)
    if problem:
        assert re.search(problem, problems[0])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_rung_of_the_ladder_can_be_shared_out(processes):
    recipe = recipe_of(prompts_per_step=3, num_generations=8, completions_per_pass=8)
    while (lower := next_rung(recipe, QWEN2_5_VL, processes)) is not None:
        assert not list(combination_problems(lower, processes))
        recipe = lower
    assert recipe.grpo.completions_per_pass == 1 and recipe.grpo.num_generations == 2


def test_the_recipe_for_several_gpus_is_the_one_for_one():
    """The same step, whoever computes it."""
    assert "multi_gpu" in shipped_recipes()
    one, several = (load_recipe(find_recipe(name)) for name in ("single_gpu", "multi_gpu"))
    assert several == one
    for processes in (2, 4, 8, 16):
        assert not list(combination_problems(several, processes))
