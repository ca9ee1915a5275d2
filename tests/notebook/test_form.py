"""A field of the form is what it must be, or one line names it and says what to write."""

import json
import sys
from types import SimpleNamespace

import pytest

from apo_lora.notebook import session, worker
from apo_lora.notebook.verbs import StepFailed


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A machine without a GPU, in an empty folder; the worker is called, and no process is started for it."""

    def run(command, **options):
        return SimpleNamespace(returncode=worker.main(*command[-2:]), stderr="")

    monkeypatch.setattr(session.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "machine", lambda: {"lines": [], "recipe": "tiny_cpu", "vram": None})
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", -1, "STEPS: -1"),
        ("steps", 2.5, "STEPS: 2.5"),
        ("steps", True, "STEPS: True"),
        ("steps", "10", "STEPS: '10'"),
        ("num_generations", 1, "NUM_GENERATIONS: 1"),
        ("apo", "yes", "APO: 'yes'"),
        ("dataset", 5, "DATASET: 5"),
        ("dataset", "nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("held_out", "no such thing", "no such thing: no such file"),
        ("recipe", "tiny-cpu", "recipe tiny-cpu: no such file"),
        ("checkpoints", "the moon", "CHECKPOINTS: 'the moon'"),
        ("checkpoints", "Hub", "HUB_REPO: ''"),
        ("checkpoints", "Google Drive", "only available in Colab"),
        ("hub_repo", "https://huggingface.co/me/run", "HUB_REPO"),
    ],
)
def test_a_field_that_cannot_be_used(tiny, field, value, words):
    with pytest.raises(StepFailed) as failure:
        session.Session(**{field: value})
    (line,) = failure.value._render_traceback_()
    assert words in line and "\n" not in line
    assert not (tiny / "runs" / "tiny_cpu-apo-g8" / "recipe.yaml").exists()


@pytest.fixture
def run(tiny):
    return session.Session(steps=None, dataset="", held_out=None, num_generations=6)  # emptied fields


@pytest.mark.parametrize(
    ("cell", "arguments", "words"),
    [
        ("evaluate", {"items": -3}, "ITEMS: -3"),
        ("resume", {"more_steps": "many"}, "MORE_STEPS: 'many'"),
        ("report", {"download": "no"}, "DOWNLOAD: 'no'"),
        ("export", {"to": "onnx"}, "EXPORT_TO: 'onnx'"),
        ("push", {"repo": "me"}, "PUSH_TO: 'me'"),
        ("push", {"repo": "me/run", "what": "all"}, "WHAT: 'all'"),
        ("push", {"repo": "me/run", "private": None}, "PRIVATE: None"),
        ("sample_after", {}, "run the cell above first"),
    ],
)
def test_a_later_cell_s_field_that_cannot_be_used(run, cell, arguments, words):
    with pytest.raises(StepFailed, match=words) as failure:
        getattr(run, cell)(**arguments)
    assert "\n" not in str(failure.value)


def test_emptied_fields_leave_the_recipe_s_own_values(run, capsys):
    assert run.max_steps == 30 and run.held_out == "boards"
    assert "grpo.num_generations=6" in run.overrides and "tiny_cpu-apo-g6" in str(run.run.path)
    run.export("nothing")
    run.push("  ")
    assert capsys.readouterr().out.count("Nothing was") == 2


def test_a_t4_is_told_the_modelled_time_and_its_plan(tiny, monkeypatch, capsys):
    found = {"lines": ["GPU       Tesla T4"], "recipe": "colab_t4", "vram": 14.74}
    monkeypatch.setattr(session, "machine", lambda: found)
    asked = []
    monkeypatch.setattr(session, "run_verb", lambda *arguments, **options: asked.append(arguments))
    session.show_machine()
    run = session.Session()
    assert asked == [("plan", "--recipe", "colab_t4", "--vram", "14.7")]
    assert run.held_out == "hiyouga/geometry3k" and "train.evaluate=false" in run.overrides
    assert "60 steps of 75 to 95 s (modelled, not measured)" in capsys.readouterr().out


def test_held_out_data_is_asked_for_in_the_measurement_and_changes_no_training(tiny, monkeypatch):
    """Else another HELD_OUT after the training would be another recipe, and the run could not be continued."""
    run = session.Session(held_out="boards:level1")
    assert not [text for text in run.overrides if text.startswith("data.eval")]
    asked = []
    monkeypatch.setattr(session, "run_verb", lambda *arguments, **options: asked.append(arguments))
    run.evaluate(items=4)
    assert asked[0][asked[0].index("--set") + 1] == 'data.eval="boards:level1"'
    assert run.evaluation == "held_out-boards_level1-step0-first4"


def test_the_base_s_samples_are_kept_for_a_longer_run_and_made_again_for_other_data(tiny):
    def samples(**form):
        run = session.Session(**form)
        return run.run.path.with_name(f"{run.run.path.name}-base")

    answers = samples() / "evaluations" / "samples" / "answers.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text("{}\n")
    samples(steps=500)
    assert answers.is_file()
    samples(held_out="boards:level3")
    assert not answers.exists()


def test_a_drive_gets_its_folder_which_the_mirror_needs(tiny, monkeypatch):
    monkeypatch.setattr(session, "_drive", lambda: tiny)
    run = session.Session(checkpoints="Google Drive")
    assert (tiny / "apo-lora").is_dir()
    assert f'output.mirror=["{tiny}/apo-lora/tiny_cpu-apo-g8"]' in run.overrides


@pytest.fixture
def colab(monkeypatch):
    """google.colab, whose functions note what they were asked for, or raise `colab.error`."""
    module = SimpleNamespace(asked=[], error=None)

    def ask(*arguments):
        module.asked.append(arguments)
        if module.error:
            raise module.error

    module.drive, module.files = SimpleNamespace(mount=ask), SimpleNamespace(download=ask)
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace(colab=module))
    monkeypatch.setitem(sys.modules, "google.colab", module)
    return module


def test_a_drive_that_is_refused_is_one_line(tiny, colab):
    assert str(session._drive()) == "/content/drive/MyDrive" and colab.asked == [("/content/drive",)]
    colab.error = ValueError("mount failed")
    with pytest.raises(StepFailed, match=r"^CHECKPOINTS: Google Drive could not be mounted \(mount failed\); [^\n]+$"):
        session.Session(checkpoints="Google Drive")


def test_the_report_is_offered_as_a_download_in_colab_and_as_a_link_elsewhere(run, colab, monkeypatch):
    shown = []
    monkeypatch.setattr(session, "run_verb", lambda *arguments: None)
    monkeypatch.setattr(session, "display", lambda html: shown.append(html.data))
    run.report(download=False)
    assert colab.asked == shown == []
    run.report(download=True)
    assert colab.asked == [(str(run.run.report),)] and shown == []
    monkeypatch.setitem(sys.modules, "google.colab", None)
    run.report(download=True)
    assert f'href="{run.run.report}"' in shown[0]


def test_what_fails_in_the_other_process_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(StepFailed) as failure:
        session.made("answers", run=str(tmp_path), evaluation="none", shown=1)
    assert "\n" not in str(failure.value) and "answers.jsonl" in str(failure.value)
    assert json.loads(session.made("machine"))["recipe"]
