"""The credit of completions.jsonl computed again, against what training's own code gave and wrote."""

import re
from types import SimpleNamespace

import pytest
import torch

from apo_lora.commands.main import main
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.report.page import render
from apo_lora.report.recomputed import recomputed, recomputed_credit
from apo_lora.report.runs import Run, read_runs, recorded_groups
from apo_lora.rollout.credit import Rollout, credit_rule
from apo_lora.rollout.record import CompletionsWriter
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl, write_atomically, write_jsonl

N, G, STEPS = 6, 8, 3
TINY = [
    f"grpo.prompts_per_step={N}",
    "grpo.completions_per_pass=8",
    f"grpo.num_generations={G}",
    "rewards.functions=[accuracy,format]",
]


def record(folder, *overrides) -> Run:
    """A run whose credit and completions.jsonl are by training's code, of rewards and lengths by chance."""
    run_dir, recipe = RunDir(folder), load_recipe(find_recipe("tiny_cpu"), [*TINY, *overrides])
    run_dir.create()
    write_atomically(run_dir.recipe, recipe.to_yaml())
    named = {**recipe.grpo.model_dump(), **recipe.rewards.model_dump(), **recipe.apo.model_dump()}
    weights_F = torch.tensor(recipe.rewards.weights or (1.0, 1.0))
    rule = credit_rule(SimpleNamespace(**named), recipe.rewards.functions, weights_F)
    examples = [SimpleNamespace(row=row, problem="How many?", images=[], gold="3") for row in range(1, N + 1)]
    writer, generator = CompletionsWriter(run_dir, examples), torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        rewards_NGF = (torch.rand(N, G, 2, generator=generator) < torch.tensor([0.3, 0.5])) * torch.tensor([1.0, 0.5])
        rewards_NGF[0] = 0.0  # a group without variance
        rollout = Rollout(
            indices=[prompt for prompt in range(N) for _ in range(G)],
            texts=["<answer>3</answer>"] * N * G,
            adapter_steps=[step - 1] * N * G,
            rewards_BF=rewards_NGF.view(-1, 2),
            lengths_B=torch.randint(1, 200, (N * G,), generator=generator).float(),
            truncated_B=torch.zeros(N * G),
            seconds_for_rewards=0.0,
        )
        writer.on_rollout(step, rule(rollout))
    (run,) = read_runs([folder])
    return run


def edit(run, line, **changes):
    rows = list(read_jsonl(run.folder.completions))
    rows[line - 1] |= changes
    write_jsonl(run.folder.completions, rows)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["apo.dads=null"],
        ["apo.dads=exp_decay"],
        ["apo.stcr=null"],
        ["apo.stcr=1.0001"],
        ["apo.stcr_amplify_positive=false"],
        ["apo.dads=null", "apo.stcr=null"],
        ["grpo.scale_rewards=batch"],
        ["grpo.scale_rewards=none"],
        ["rewards.weights=[0.3,0.7]"],
        ["rewards.correct_by=format", "rewards.correct_from=0.5"],
    ],
)
def test_what_training_gave_is_what_is_recomputed(overrides, tmp_path):
    run = record(tmp_path / "run", *overrides)
    found = recomputed_credit(run)
    assert (found.compared, found.differing, found.largest, found.left_out) == (STEPS * N * G, 0, 0.0, 0)
    assert found.text == "144 completions, largest difference 0: equal to the record"
    other = recomputed(recorded_groups(run), load_recipe(find_recipe("tiny_cpu"), TINY))
    assert (other.differing > 0) == bool(overrides)  # another recipe would be seen


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("reward", 0.001),
        ("correct", True),
        ("advantage", 0.001),
        ("kl_weight", -0.001),
        ("stcr_multiplier", 0.001),
        ("advantage", float("nan")),
    ],
)
def test_a_value_that_does_not_follow_is_named(name, change, tmp_path):
    run = record(tmp_path / "run")
    rows = list(read_jsonl(run.folder.completions))
    line = next(n for n, row in enumerate(rows, start=1) if row["step"] == 2 and row["row"] == 3 and not row["correct"])
    edit(run, line, **{name: rows[line - 1][name] + change})
    found = recomputed_credit(run)
    assert (found.compared, found.differing) == (STEPS * N * G, 1)
    assert found.text.startswith(
        f"1 of 144 completions differ from the record, first line {line} (step 2, row 3, 'How many?'): {name} "
    )
    assert f"line {line} " in render([run])


def test_rounding_is_no_difference(tmp_path):
    run = record(tmp_path / "run")
    edit(run, 9, advantage=next(rows[0] for rows in recorded_groups(run) if rows[0]["row"] == 2)["advantage"] + 2e-7)
    found = recomputed_credit(run)
    assert found.differing == 0 and found.text == "144 completions, largest difference 2e-07: equal to the record"


@pytest.mark.parametrize(("scale", "compared"), [("group", 2 * N * G + 4 * G), ("batch", 2 * N * G)])
def test_what_is_cut_short_is_left_out_and_counted(scale, compared, tmp_path):
    """A deviation over the rollout needs all of it; one over the group needs the group."""
    run = record(tmp_path / "run", f"grpo.scale_rewards={scale}")
    lines = run.folder.completions.read_text().splitlines(keepends=True)
    run.folder.completions.write_text("".join(lines[: -G - 3]) + lines[-G - 3][:50])  # 5 rows of the fifth group
    found = recomputed_credit(run)
    assert (found.compared, found.differing, found.left_out) == (compared, 0, 2 * N * G + 4 * G + 5 - compared)
    assert f"; {found.left_out} more are left out, whose group or rollout is not whole" in found.text


def test_a_line_that_was_removed_moves_no_other_group(tmp_path):
    run = record(tmp_path / "run")
    rows = list(read_jsonl(run.folder.completions))
    write_jsonl(run.folder.completions, rows[:20] + rows[21:])
    found = recomputed_credit(run)
    assert (found.compared, found.differing, found.left_out) == (STEPS * N * G - G, 0, G - 1)


def test_why_nothing_is_compared_is_said(tmp_path):
    run = record(tmp_path / "run")
    rows = list(read_jsonl(run.folder.completions))
    write_jsonl(run.folder.completions, [{key: row[key] for key in row if key != "rewards"} for row in rows])
    assert recomputed_credit(run).text == "not possible, the rewards by function (accuracy, format) were not recorded"
    run.folder.completions.write_text("")
    assert recomputed_credit(run).text == "not possible, no whole group of completions is recorded"
    run.folder.completions.unlink()
    assert recomputed_credit(run).text == "not possible, no whole group of completions is recorded"
    run = record(tmp_path / "other", "output.log_completions=false")
    run.folder.completions.unlink()
    assert "output.log_completions is false" in recomputed_credit(run).text


def test_page_and_terminal_say_it_of_each_run(tmp_path, capsys):
    record(tmp_path / "one")
    edit(record(tmp_path / "two", "train.seed=1"), 9, kl_weight=0.5)
    assert main(["report", str(tmp_path / "one")]) == 0
    line = "recomputed from completions.jsonl: 144 completions, largest difference 0: equal to the record"
    assert f"Credit       {line}\n" in capsys.readouterr().out
    assert f"Credit {line}." in (tmp_path / "one" / "report.html").read_text()
    both = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(both)]) == 0
    assert "two: recomputed from completions.jsonl: 1 of 144 completions differ" in capsys.readouterr().out
    said = re.findall(r"<li>(one|two): credit recomputed from completions.jsonl: (.*?)</li>", both.read_text())
    assert [(name, "equal to the record" in text) for name, text in said] == [("one", True), ("two", False)]
