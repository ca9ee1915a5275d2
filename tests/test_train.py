"""The real command on the tiny model: what it leaves behind, resumed runs, real data, and that it learns."""

import json
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file

from apo_lora.commands.main import main
from apo_lora.recipe.files import load_recipe
from apo_lora.run import drawing, plots
from apo_lora.run.directory import RunDir
from apo_lora.run.figures import HELD_OUT, PER_STEP
from apo_lora.run.files import read_jsonl

SMALL = [
    "grpo.prompts_per_step=2", "grpo.num_generations=4", "grpo.completions_per_pass=8",
    "grpo.max_completion_length=48", "train.save_steps=2", "data.eval_limit=8", "data.limit=64",
]  # fmt: skip


def train(path, *overrides, recipe="tiny_cpu.yaml", resume=None):
    arguments = ["train", "--recipe", recipe, *SMALL, *overrides, f"output.dir={path}"]
    return main([*arguments, "--resume", resume] if resume else arguments)


def adapter_weights(run: RunDir):
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_same_adapter(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("train") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", drawing.png)  # blank in other tests
        assert train(run.path, "train.max_steps=4") == 0
    return run


def test_a_run_is_a_record(finished_run):
    run = finished_run
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2, 3, 4]
    completions = list(read_jsonl(run.completions))
    assert len(completions) == 4 * 8
    for row in completions:
        assert {"step", "prompt", "images", "completion", "gold", "rewards", "reward", "advantage", "kl_weight",
                "stcr_multiplier", "length", "correct", "truncated"} <= row.keys()  # fmt: skip
        assert all((run.path / image).is_file() for image in row["images"])
    assert "num_generations: 4" in run.recipe.read_text()
    environment = json.loads(run.environment.read_text())
    assert environment["packages"]["trl"] and environment["python"]
    evaluation = json.loads(run.evaluation.read_text())
    assert {"before", "after"} == evaluation.keys() and evaluation["before"]["reasoning"]["items"] == 8
    answers = list(read_jsonl(run.answers))
    assert sorted((row["set"], row["model"], row["row"], row["sample"]) for row in answers) == [
        (title, model, row, 0)
        for title in ("general", "reasoning")
        for model in ("base", "tuned")
        for row in range(1, 9)
    ]
    for row in answers:
        assert {"problem", "gold", "choices", "category", "text", "answer", "length", "truncated", "well_formatted",
                "entropy"} <= row.keys()  # fmt: skip
        assert row["images"] and all((run.path / image).is_file() for image in row["images"])
    for when, model in (("before", "base"), ("after", "tuned")):
        right = [row["correct"] for row in answers if (row["set"], row["model"]) == ("reasoning", model)]
        assert evaluation[when]["reasoning"]["accuracy"] == sum(right) / 8
    card = run.model_card.read_text()
    assert card.startswith("---\nlibrary_name: peft") and "| reasoning | accuracy (95 % interval) |" in card
    assert [path.name for path in run.valid_checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]


def test_its_credit_follows_from_its_record(finished_run, tmp_path, capsys):
    assert main(["report", str(finished_run.path), "--out", str(tmp_path / "report.html")]) == 0
    found = "recomputed from completions.jsonl: 32 completions, largest difference 0: equal to the record"
    assert found in capsys.readouterr().out and found in (tmp_path / "report.html").read_text()


def test_what_is_recorded_is_what_the_registry_declares(finished_run):
    functions = load_recipe(finished_run.recipe).rewards.functions
    declared = {"step", *(figure.name for figure in PER_STEP), *(f"reward_{name}" for name in functions)}
    assert all(row.keys() == declared for row in read_jsonl(finished_run.metrics))
    evaluation = json.loads(finished_run.evaluation.read_text())
    assert all(set(HELD_OUT) <= task.keys() for tasks in evaluation.values() for task in tasks.values())


def test_plots_are_pictures_with_something_on_them(finished_run):
    from PIL import Image

    plots = sorted(path.name for path in finished_run.plots.iterdir())
    assert plots == ["entropy.png", "kl_dads.png", "length.png", "reward_accuracy.png", "zero_variance_groups.png"]
    for name in plots:
        with Image.open(finished_run.plots / name) as image:
            assert image.size[0] > 500 and len(set(image.convert("RGB").get_flattened_data())) > 50


def test_plain_peft_loads_the_adapter(finished_run, load_tiny):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from apo_lora.tiny import BASE_DIR

    base = AutoModelForImageTextToText.from_pretrained(BASE_DIR, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, finished_run.adapter)
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    saved = adapter_weights(finished_run)
    assert len(loaded) == len(saved)
    assert any(p.abs().sum() > 0 for name, p in loaded.items() if "lora_B" in name)
    for name, parameter in loaded.items():
        assert torch.equal(parameter, saved[name.replace(".default", "")])


def test_an_existing_run_is_refused(finished_run, capsys):
    before = adapter_weights(finished_run)
    assert train(finished_run.path, "train.max_steps=4") == 2
    error = capsys.readouterr().err
    assert "--resume auto" in error and "output.dir=" in error
    assert_same_adapter(before, adapter_weights(finished_run))


def test_a_resumed_run_ends_as_the_uninterrupted_one(finished_run, tmp_path):
    run = RunDir(tmp_path / "run")
    assert train(run.path, "train.max_steps=2") == 0
    assert not torch.equal(
        *(adapter_weights(r)[next(iter(adapter_weights(run)))] for r in (run, finished_run))
    )  # two steps are not four
    assert train(run.path, "train.max_steps=4", resume="auto") == 0
    assert_same_adapter(adapter_weights(run), adapter_weights(finished_run))
    strip = ("seconds", "tokens_per_second", "peak_memory")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(strip)} for row in read_jsonl(r.metrics)]
        for r in (run, finished_run)
    ]
    assert rows[0] == rows[1]
    assert run.answers.read_text() == finished_run.answers.read_text()  # its first "after" gave way to the second


def test_a_resume_on_the_border_of_two_epochs(tmp_path):
    """Four examples, two a step: the second epoch's order must not be the first's again."""
    runs = [RunDir(tmp_path / name) for name in ("whole", "halves")]
    options = ["data.limit=4", "train.evaluate=false", "train.preflight=false"]
    assert train(runs[0].path, *options, "train.max_steps=4") == 0
    assert train(runs[1].path, *options, "train.max_steps=2") == 0
    assert train(runs[1].path, *options, "train.max_steps=4", resume="auto") == 0
    assert_same_adapter(adapter_weights(runs[0]), adapter_weights(runs[1]))
    rows = [[row["row"] for row in read_jsonl(run.completions)][::4] for run in runs]
    assert rows[0] == rows[1] and sorted(rows[0][:4]) == sorted(rows[0][4:]) == [1, 2, 3, 4]
    assert rows[0][:4] != rows[0][4:]


def test_a_resume_by_another_recipe_is_refused_with_the_keys(finished_run, capsys):
    assert train(finished_run.path, "train.max_steps=6", "grpo.beta=0.5", "apo.stcr=null", resume="auto") == 2
    error = capsys.readouterr().err
    assert "grpo.beta: 0.04 in the run, 0.5 now" in error and "apo.stcr" in error


def test_own_rewards_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, answer, **columns):\n"
        "    return [1.0 / (1 + len(c[0]['content'])) for c in completions]\n"
    )
    run = RunDir(tmp_path / "run")
    functions = f"rewards.functions=[accuracy,'{tmp_path}/mine.py:short']"
    assert train(run.path, "train.max_steps=1", functions, "train.evaluate=false") == 0
    rows = list(read_jsonl(run.completions))
    assert all(row["rewards"][1] == pytest.approx(1 / (1 + len(row["completion"])), rel=1e-5) for row in rows)


def test_trackers_get_the_figures(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run = RunDir(tmp_path / "run")
    assert train(run.path, "train.max_steps=1", "output.report_to=[tensorboard]", "train.evaluate=false") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert {"train/reward", "train/dads_weight_positives"} <= set(events.Tags()["scalars"])


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, capsys):
    assert train(tmp_path / "run", "output.report_to=[trackio]") == 2
    assert "pip install trackio" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- real data, and learning -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_puzzles_train_end_to_end(shared_data, tmp_path):
    run = RunDir(tmp_path / "run")
    code = train(
        run.path,
        f"data.train={shared_data / 'puzzlevqa'}", f"data.eval={shared_data / 'puzzlevqa'}", "data.general=null",
        "data.max_pixels=50176", "train.max_steps=3", "rewards.functions=[accuracy,format]",
        "data.instruction='Answer inside <answer> </answer>.'",
    )  # fmt: skip
    assert code == 0
    rows = list(read_jsonl(run.metrics))
    assert len(rows) == 3 and all(row["kl"] is not None for row in rows)
    for row in read_jsonl(run.completions):
        assert Path(row["images"][0]).is_file() and row["gold"]


@pytest.mark.slow
def test_the_shipped_recipe_learns(tmp_path):
    """In half of its steps, what holds over seeds: accuracy up by at least 0.2, wrong answers shorter."""
    run = RunDir(tmp_path / "run")
    shorter = ["train.max_steps=15", "data.eval_limit=96"]
    finished = forks.run(["-m", "apo_lora", "train", "--recipe", "tiny_cpu.yaml", *shorter, f"output.dir={run.path}"])
    assert finished.returncode == 0, finished.stderr[-2000:]
    evaluation = json.loads(run.evaluation.read_text())
    before, after = evaluation["before"]["reasoning"], evaluation["after"]["reasoning"]
    assert after["accuracy"] >= before["accuracy"] + 0.2
    assert after["length_wrong"] < before["length_wrong"]
    assert "Next:" in finished.stdout and "reasoning (held out)" in finished.stdout
