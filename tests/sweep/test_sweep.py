"""`apo-lora sweep`: the file's errors, what is run, continued and refused, and what several seeds say."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import yaml
from checkpoints import checkpoint
from forks import in_a_fork
from PIL import Image
from report_runs import held_out, write_run

from apo_lora.commands.main import main
from apo_lora.errors import RunDirError
from apo_lora.report.comparison import compare
from apo_lora.report.runs import read_run
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl, write_json
from apo_lora.sweep import runs
from apo_lora.sweep.experiment import find_experiment, load_experiment, plan_runs, shipped_experiments
from apo_lora.sweep.findings import picture
from apo_lora.sweep.runs import State, state_of

EXPERIMENT = {
    "base": "grpo_baseline.yaml",
    "common": {"train": {"max_steps": 2, "learning_rate": "2e-3"}},
    "variants": {"GRPO": {}, "APO": {"apo": {"dads": "complement_exp", "stcr": 1.01}}},
    "seeds": [0, 7],
}


@pytest.fixture
def experiment_file(tmp_path):
    """Writes an experiment, with changes, and returns its path."""

    def write(**changes):
        path = tmp_path / "trial.yaml"
        path.write_text(yaml.safe_dump({**EXPERIMENT, **changes}, sort_keys=False))
        return path

    return write


def planned(path, out, *overrides):
    return plan_runs(path, load_experiment(path), out, overrides)


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_experiments())
def test_shipped_experiments_are_sound(name, tmp_path):
    assert find_experiment(f"{name}.yaml") == find_experiment(name)
    assert planned(find_experiment(name), tmp_path)


def test_the_four_variants_differ_in_apo_alone(tmp_path):
    plan = planned(find_experiment("apo_vs_grpo"), tmp_path)
    assert len(plan) == 20
    recipes = {run.variant: run.recipe for run in plan if run.seed == plan[0].seed}
    methods = ["GRPO", "GRPO + DADS", "GRPO + STCR", "GRPO + DADS + STCR"]
    assert [recipe.method for recipe in recipes.values()] == methods
    assert recipes["APO"].apo.dads == recipes["DADS"].apo.dads and recipes["APO"].apo.stcr == recipes["STCR"].apo.stcr
    same = {recipe.model_dump_json(exclude={"apo": True, "output": True}) for recipe in recipes.values()}
    assert len(same) == 1


def test_a_plan_is_the_file_the_command_line_and_the_variant(experiment_file, tmp_path):
    plan = planned(experiment_file(), tmp_path / "out", "train.max_steps=5", "apo.stcr=1.5")
    assert [str(run) for run in plan] == ["GRPO/seed-0", "APO/seed-0", "GRPO/seed-7", "APO/seed-7"]
    grpo, apo = plan[2].recipe, plan[3].recipe
    assert grpo.train.learning_rate == 2e-3 and grpo.train.seed == 7 and grpo.train.max_steps == 5
    assert grpo.apo.stcr == 1.5 and apo.apo.stcr == 1.01  # a variant keeps what makes it one
    assert plan[3].path == tmp_path / "out" / "APO" / "seed-7"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sedes": [1]}, "sedes: unknown key; did you mean seeds?"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "each only once"),
        ({"seeds": [True]}, "seeds.0"),
        ({"variants": {"GRPO": {}}}, "variants"),
        ({"variants": {"GRPO": {}, "../up": {}}}, "../up"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        (
            {"common": {"train": {"max_stpes": 2}}},
            "common: train.max_stpes: unknown key; did you mean train.max_steps?",
        ),
        ({"variants": {"GRPO": {}, "APO": {"apo": {"stcr": 0.5}}}}, "variants.APO: apo.stcr: 0.5 is not valid"),
        ({"variants": {"GRPO": {}, "APO": {"train": {"seed": 3}}}}, "train.seed is set by the sweep"),
        ({"common": {"output": {"dir": "there"}}}, "use --out DIR"),
        ({"common": {"train": {"max_steps": None}}}, "a sweep needs steps"),
    ],
)
def test_an_unsound_file_is_one_line_and_writes_nothing(changes, words, experiment_file, capsys, tmp_path):
    path = experiment_file(**changes)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_experiment_is_one_line(capsys):
    assert main(["sweep", "nowhere"]) == 2
    assert "apo_vs_grpo" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["1,1", "one", "", "1,,2"])
def test_bad_seeds_are_one_line(seeds, experiment_file, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["sweep", str(experiment_file()), "--seeds", seeds])
    assert exit.value.code == 2 and "is not a list of different seeds" in capsys.readouterr().err


def test_nothing_in_the_file_is_executed(tmp_path, capsys):
    path = tmp_path / "trial.yaml"
    path.write_text("base: !!python/object/apply:os.system ['touch executed']\n")
    assert main(["sweep", str(path)]) == 2
    assert "not valid YAML" in capsys.readouterr().err and not (tmp_path / "executed").exists()


# --- the runs, with a child that only pretends -----------------------------------------------------------------------

CHILD = """
import json, pathlib, signal, sys, time
path, recipe, seed, what = sys.argv[1:]
path = pathlib.Path(path)
path.mkdir(parents=True, exist_ok=True)
if what == "fail":
    sys.exit("the disk is full")
(path / "recipe.yaml").write_text(recipe)
(path / "environment.json").write_text("{}")
rows = [{"step": step, "accuracy": 0.5, "length_wrong": 60.0, "entropy": 0.2 / step, "kl": 0.0} for step in (1, 2)]
if what == "wait":
    def stop(number, frame):
        (path / "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGINT, stop)
    (path / "waiting").touch()
    for _ in range(6000):  # a signal just before a long sleep would be answered after it
        time.sleep(0.01)
(path / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
task = {"accuracy": 0.6 + int(seed) / 100, "length_wrong": 50.0}
(path / "eval.json").write_text(json.dumps({w: {"reasoning": task, "general": task} for w in ("before", "after")}))
(path / "README.md").touch()
"""


@pytest.fixture
def children(monkeypatch):
    """Replaces `apo-lora train`. Returns what each run shall do (else it finishes), and a list of those started."""
    shall, started = {}, []

    def command(run, *, resume):
        started.append((str(run), resume))
        recipe = run.recipe.to_yaml()
        return [sys.executable, "-c", CHILD, str(run.path), recipe, str(run.seed), shall.get(str(run), "finish")]

    monkeypatch.setattr(runs, "train_command", command)
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.02)
    return shall, started


def test_a_sweep_says_what_it_found(experiment_file, children, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sweep", str(experiment_file()), "--out", str(out), "--jobs", "2"]) == 0
    findings = json.loads((out / "sweep.json").read_text())
    accuracy = findings["figures"]["accuracy"]
    assert accuracy["variants"]["APO"]["by_seed"] == {"0": 0.6, "7": pytest.approx(0.67)}
    assert accuracy["variants"]["APO"]["mean"] == pytest.approx(0.635)
    assert accuracy["differences"].keys() == {"APO"} and accuracy["differences"]["APO"]["mean"] == 0
    assert all(run["finished"] and run["seconds"] > 0 and run["cpu_seconds"] > 0 for run in findings["runs"])
    shown = capsys.readouterr().out
    assert "0.635 (" in shown and f"apo-lora report {out}/*/seed-*" in shown
    assert "| Reasoning accuracy | 0.635 (" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "sweep.json").read_text()  # it can be handed on


def test_finished_runs_are_left_alone(experiment_file, children, tmp_path):
    arguments = ["sweep", str(experiment_file()), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    _, started = children
    assert len(started) == 4
    assert main(arguments) == 0
    assert len(started) == 4
    assert main([*arguments, "--seeds", "0,7,8"]) == 0  # more seeds add their runs
    assert [name for name, _ in started[4:]] == ["GRPO/seed-8", "APO/seed-8"]


def test_a_failed_run_is_said_and_the_others_go_on(experiment_file, children, tmp_path, capsys):
    shall, started = children
    shall["APO/seed-0"] = "fail"
    out = tmp_path / "out"
    arguments = ["sweep", str(experiment_file()), "--out", str(out), "--jobs", "1"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "1 of 4 runs failed" in error and "APO/seed-0: exit code 1: the disk is full" in error
    assert [name for name, _ in started] == ["GRPO/seed-0", "APO/seed-0", "GRPO/seed-7", "APO/seed-7"]
    findings = json.loads((out / "sweep.json").read_text())
    assert [run["finished"] for run in findings["runs"]] == [True, False, True, True]
    # Compared is the one seed that both have.
    assert findings["figures"]["accuracy"]["differences"]["APO"]["n"] == 1
    assert "Missing: APO/seed-0." in (out / "README.md").read_text()

    del shall["APO/seed-0"]
    assert main(arguments) == 0
    assert [name for name, _ in started[4:]] == ["APO/seed-0"]


def half_done(run, *, with_checkpoint):
    run_dir = RunDir(run.path)
    run_dir.create()
    run_dir.recipe.write_text(run.recipe.to_yaml())
    run_dir.metrics.write_text('{"step": 1}\n')
    if with_checkpoint:
        checkpoint(run_dir, 1)
    return run_dir


def test_a_half_done_run_is_continued_and_one_without_a_checkpoint_starts_anew(experiment_file, children, tmp_path):
    path, out = experiment_file(), tmp_path / "out"
    grpo, apo, *_ = planned(path, out)
    half_done(grpo, with_checkpoint=True)
    half_done(apo, with_checkpoint=False)
    assert state_of(grpo) is state_of(apo) is State.HALF_DONE
    assert main(["sweep", str(path), "--out", str(out), "--jobs", "1"]) == 0
    _, started = children
    assert started[:2] == [("GRPO/seed-0", True), ("APO/seed-0", False)]


def test_a_run_of_another_recipe_is_refused_before_anything_runs(experiment_file, children, tmp_path, capsys):
    path, out = experiment_file(), tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out)]) == 0
    capsys.readouterr()
    other = experiment_file(
        variants={"GRPO": {}, "APO": {"apo": {"dads": "complement_exp", "stcr": 1.05}}}, seeds=[7, 8]
    )
    assert main(["sweep", str(other), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "APO/seed-7" in line and "apo.stcr was 1.01 and is 1.05 now" in line and "--out DIR" in line
    assert not (out / "GRPO" / "seed-8").exists() and len(children[1]) == 4


def test_a_folder_that_is_no_run_is_refused(experiment_file, tmp_path, capsys):
    (tmp_path / "out" / "GRPO" / "seed-0").mkdir(parents=True)
    (tmp_path / "out" / "GRPO" / "seed-0" / "thesis.txt").write_text("all of it")
    assert main(["sweep", str(experiment_file()), "--out", str(tmp_path / "out")]) == 2
    assert "is not a run of this sweep" in capsys.readouterr().err


SWEEP_OF_ONE = """
import subprocess
import sys
from pathlib import Path
from apo_lora.sweep import runs
from apo_lora.sweep.experiment import load_experiment, plan_runs
path, out = map(Path, sys.argv[1:])
runs.train_command = lambda run, resume: ["sh", "-c", "echo $$ > waiting; exec sleep 100"]
runs.run_all(plan_runs(path, load_experiment(path), out)[:1], out, 1, lambda outcome: None)
"""


def test_a_run_is_locked_until_its_process_ends_even_where_its_sweep_was_killed(experiment_file, children, tmp_path):
    path, written = experiment_file(), tmp_path / "waiting"
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP_OF_ONE, str(path), str(tmp_path)], cwd=tmp_path)
    while not (written.exists() and written.read_text()):
        assert sweep.poll() is None
        time.sleep(0.05)
    child = int(written.read_text())

    def again():
        runs.run_all(planned(path, tmp_path)[:1], tmp_path, 1, lambda outcome: None)

    with pytest.raises(RunDirError, match="still running it"):
        again()
    sweep.kill()
    sweep.wait()
    with pytest.raises(RunDirError, match="still running it"):  # the child goes on by itself
        again()
    assert not children[1]
    os.kill(child, signal.SIGKILL)
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    again()
    assert len(children[1]) == 1


def test_cpu_seconds_are_those_of_the_child(experiment_file, tmp_path, monkeypatch):
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    monkeypatch.setattr(runs, "train_command", lambda run, resume: [sys.executable, "-c", busy])
    outcomes = []
    runs.run_all(planned(experiment_file(), tmp_path)[:1], tmp_path, 1, outcomes.append)
    assert 0.4 < outcomes[0].cpu_seconds < 5


def test_ctrl_c_lets_the_children_save(experiment_file, children, tmp_path, capsys):
    shall, started = children
    shall |= {"GRPO/seed-0": "wait", "APO/seed-0": "wait"}
    out = tmp_path / "out"

    def interrupt():
        deadline = time.monotonic() + 60
        while len(list(out.glob("*/*/waiting"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert main(["sweep", str(experiment_file()), "--out", str(out), "--jobs", "2"]) == 130
    assert len(list(out.glob("*/*/saved"))) == 2 and len(started) == 2
    assert "run the same command again to continue" in capsys.readouterr().err
    assert [row["finished"] for row in read_jsonl(out / "logs" / "children.jsonl")] == [False, False]


def test_a_dry_run_lists_the_runs_with_an_estimate(experiment_file, children, tmp_path, capsys):
    path, out = experiment_file(seconds_per_run=90), tmp_path / "out"
    half_done(planned(path, out)[1], with_checkpoint=True)
    assert main(["sweep", str(path), "--out", str(out), "--jobs", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2 variants x 2 seeds = 4 runs" in shown and "about 3 minutes" in shown
    assert "GRPO/seed-0  to run" in shown and "APO/seed-0   to continue" in shown
    assert not (out / "logs").exists() and not children[1]


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_sweep_is_made_of_ordinary_runs_and_continues(experiment_file, tmp_path, monkeypatch, capsys):
    train_command = runs.train_command
    monkeypatch.setattr(runs, "train_command", lambda *run, **options: in_a_fork(train_command(*run, **options)))
    small = {
        "grpo": {
            "prompts_per_step": 2, "num_generations": 4, "completions_per_pass": 8, "max_completion_length": 32
        },
        "train": {"max_steps": 2, "save_steps": 1, "preflight": False},
        "data": {"eval_limit": 8, "limit": 64},
    }  # fmt: skip
    path, out = experiment_file(common=small, seeds=[3]), tmp_path / "out"
    arguments = ["sweep", str(path), "--out", str(out), "--jobs", "2"]
    assert main(arguments) == 0, capsys.readouterr().err
    run = RunDir(out / "APO" / "seed-3")
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2]
    assert (run.adapter / "adapter_model.safetensors").is_file()
    log = (out / "logs" / "APO-3.log").read_text()
    assert "GRPO + DADS + STCR: 2 steps" in log
    first = json.loads((out / "sweep.json").read_text())

    # As a kill during the last evaluation leaves it.
    run.model_card.unlink()
    run.evaluation.write_text(json.dumps({"before": json.loads(run.evaluation.read_text())["before"]}))
    assert main(arguments) == 0, capsys.readouterr().err
    assert "--resume auto" in (out / "logs" / "APO-3.log").read_text().removeprefix(log)
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2]
    assert json.loads((out / "sweep.json").read_text())["figures"] == first["figures"]


def test_a_figure_that_no_run_measured_has_no_panel(tmp_path):
    def width(name, tasks):
        folder = write_run(tmp_path / name)
        figures = dict.fromkeys(tasks, held_out(0.5))
        write_json(RunDir(folder).evaluation, {"before": figures, "after": figures})
        groups = {"APO": [read_run(folder)]}
        return Image.open(io.BytesIO(picture(groups, compare(groups, 5)))).width

    assert width("both", ["reasoning", "general"]) == 1500
    assert width("reasoning", ["reasoning"]) == 1200
