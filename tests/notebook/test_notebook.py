"""The Colab notebook: what its cells may do, and Run all without a GPU."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import PROJECT

from apo_lora.machine.host import Gpu
from apo_lora.notebook import session, verbs
from apo_lora.notebook.verbs import StepFailed, run_verb
from apo_lora.notebook.worker import banner, suited_recipe
from apo_lora.recipe.files import shipped_recipes
from apo_lora.run.directory import RunDir

sys.path.insert(0, str(PROJECT / "colab"))
sys.path.insert(0, str(PROJECT / "tests" / "colab_twin"))
from execute import NOTEBOOK, executed
from twin_machine import find_python

NOTEBOOK_NODE = nbformat.read(NOTEBOOK, as_version=4)
CODE = [cell.source for cell in NOTEBOOK_NODE.cells if cell.cell_type == "code"]
GiB = 2**30


def gpu(gib, dtype="bfloat16"):
    return Gpu("A card", 1, (8, 0), ("sm_80",), dtype, int(gib * GiB) - GiB, int(gib * GiB), "12.8")


# --- what stands in it -----------------------------------------------------------------------------------------------


def test_it_is_short_and_asks_for_a_t4():
    assert len(NOTEBOOK_NODE.cells) <= 14
    assert NOTEBOOK_NODE.metadata["accelerator"] == "GPU"
    assert NOTEBOOK_NODE.metadata["colab"]["gpuType"] == "T4"
    assert all(source.startswith("#@title") for source in CODE)


def test_the_badge_is_in_notebook_and_readme_and_opens_this_file():
    badge = re.compile(r"\[!\[Open in Colab\]\([^)]+\)\]\((https://colab\.research\.google\.com/github/\S+?)\)")
    first = NOTEBOOK_NODE.cells[0].source
    (target,) = badge.findall(first)
    assert target.endswith("/blob/main/colab/apo_lora_qwen2_5_vl.ipynb")
    assert badge.findall((PROJECT / "README.md").read_text()) == [target]
    # the repository that the badge opens is the one that is installed
    assert target.split("/github/")[1].startswith(re.search(r'github\.com/([\w-]+/[\w-]+)"', CODE[0])[1])


def test_the_install_cell_hands_over_to_the_checkout_s_script():
    assert CODE[0].endswith('runpy.run_path("apo-lora-source/colab/install.py", run_name="__main__");')
    assert "!" not in "".join(line[:1] for line in CODE[0].splitlines())  # a shell's failure fails no cell


@pytest.mark.parametrize("source", CODE[1:])
def test_a_cell_is_a_form_and_a_call(source):
    """No logic in the notebook: constants, imports of this package, and one statement that calls it."""
    *form, call = ast.parse(source).body
    for statement in form:
        if isinstance(statement, ast.Assign):
            assert isinstance(statement.value, ast.Constant)
        else:
            assert isinstance(statement, ast.ImportFrom) and statement.module.startswith("apo_lora.notebook")
    assert isinstance(call, ast.Expr | ast.Assign) and isinstance(call.value, ast.Call)


def test_the_recipes_on_offer_are_shipped():
    offered = re.search(r"RECIPE = .*#@param (\[.*\])", "\n".join(CODE))[1]
    assert set(json.loads(offered)) - {"auto"} <= set(shipped_recipes())


def test_the_committed_outputs_are_of_a_whole_run_and_name_no_place_of_the_machine():
    outputs = json.dumps([cell.get("outputs", []) for cell in NOTEBOOK_NODE.cells])
    assert all(cell.outputs for cell in NOTEBOOK_NODE.cells if cell.cell_type == "code" and cell.source not in CODE[0])
    assert "The LoRA has trained" in outputs and "image/png" in outputs
    assert not re.findall(r"hf_[A-Za-z]{10,}|(?<![\w.])/(?:home|root|tmp|work)/", outputs)


# --- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "recipe"),
    [
        (None, "tiny_cpu"),
        (gpu(8), "gpu_8gb"),
        (gpu(14.7, "float16"), "colab_t4"),
        (gpu(16), "colab_t4"),
        (gpu(32, "float16"), "colab_t4"),
        (gpu(23.6), "single_gpu"),
    ],
)
def test_the_recipe_suits_the_card(card, recipe):
    assert suited_recipe(card) == recipe
    assert f"{recipe}.yaml" in "\n".join(banner(card, recipe))


# --- output and interrupts -------------------------------------------------------------------------------------------


def test_a_failing_verb_is_one_line_without_traceback(capsys):
    with pytest.raises(StepFailed, match="exit code 2") as failure:
        run_verb("train", "--recipe", "nowhere.yaml")
    assert failure.value._render_traceback_() == [str(failure.value)]
    assert "nowhere.yaml: no such file" in capsys.readouterr().out


def test_secrets_reach_the_process_alone(monkeypatch, tmp_path):
    (tmp_path / "tell.py").write_text("import os; print(len(os.environ['HF_TOKEN']))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    run_verb("tell", module="tell", secrets={"HF_TOKEN": "hf_secret"})
    assert "HF_TOKEN" not in os.environ


def test_an_interrupted_cell_is_ctrl_c_for_the_verb(monkeypatch, tmp_path, capsys):
    (tmp_path / "waits.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"try:\n    pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('saved'); sys.exit(130)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def interrupt():
        if (tmp_path / "ready").exists():
            (tmp_path / "ready").unlink()
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(StepFailed, match="Run the cell again"):
        run_verb("train", module="waits", meanwhile=interrupt)
    assert "saved" in capsys.readouterr().out


# --- what is shown ---------------------------------------------------------------------------------------------------


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """Curves of a run, whose pictures are collected, without the process that draws them."""
    shown = []
    handle = SimpleNamespace(update=shown.append)
    monkeypatch.setattr(session, "display", lambda picture, display_id: handle)
    monkeypatch.setattr(session, "Image", lambda data: data)
    monkeypatch.setattr(session, "made", lambda what, png, **arguments: Path(png).write_bytes(b"last"))
    idle = SimpleNamespace(kill=lambda: None, wait=lambda: None)
    monkeypatch.setattr(session.subprocess, "Popen", lambda *command, **options: idle)
    curves = session.Curves(RunDir(tmp_path), steps=20)
    curves.pictures = shown
    return curves


def record(run, steps):
    rows = ({"step": step, "seconds": 9.0 if step == 1 else 2.0} for step in range(1, steps + 1))
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_record_that_is_emptied_and_grows_again_shows_what_is_drawn(curves):
    """A run that was cut before its first checkpoint has steps, and train empties that record when it starts anew."""
    record(curves.run, 2)
    with curves:
        record(curves.run, 0)
        curves.look()
        assert curves.pictures == []
        curves._png.write_bytes(b"first")
        curves.look()
        curves.look()
        assert curves.pictures == [b"first"]
        record(curves.run, 1)
    assert curves.pictures == [b"first", b"last"]


def test_the_time_of_the_rest_is_said_once_after_the_first_steps(curves):
    with curves:
        said = []
        for steps in range(8):
            record(curves.run, steps)
            said.append(curves.look())
    assert said[:4] == [None] * 4 and said[5:] == [None] * 3
    assert said[4] == "Measured: 2 s per step, so 32 s for the other 16 steps."


def test_curves_that_cannot_be_shown_end_no_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "works.py").write_text("import time; time.sleep(0.3); print('saved')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(verbs, "SECONDS_BETWEEN_LOOKS", 0.05)

    def broken():
        raise ValueError("no picture")

    run_verb("train", module="works", meanwhile=broken)
    out = capsys.readouterr().out
    assert "saved" in out and out.count("no more curves: ValueError: no picture") == 1


# --- a kernel that dies ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_step_whose_kernel_died_is_asked_to_end_may_save_and_the_next_one_waits_for_it(tmp_path):
    (tmp_path / "saves.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    print('saving', flush=True)\n    time.sleep(1)\n"
        "    pathlib.Path(sys.argv[1]).write_text('saved')\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    (tmp_path / "after.py").write_text("import pathlib, sys; print(pathlib.Path(sys.argv[1]).read_text())")
    kernel = (
        "import pathlib, sys\nfrom apo_lora.notebook.verbs import run_verb\n"
        "run_verb(sys.argv[2], module=sys.argv[1], lock=pathlib.Path(sys.argv[3]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}{tmp_path}"}

    def start(module):
        command = [sys.executable, "-c", kernel, module, str(tmp_path / "work"), str(tmp_path / "lock")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    with start("saves") as first:
        assert first.stdout.readline() == "ready\n"
        first.kill()
    assert not (tmp_path / "work").exists()
    with start("after") as second:
        said = second.communicate(timeout=30)[0]
    assert "waiting for it to end" in said and said.endswith("saved\n")


# --- Run all ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_python() is not None, reason="tests/colab_twin runs the notebook")
def test_run_all_without_a_gpu(tmp_path):
    form = {"RECIPE": "tiny_cpu", "STEPS": 3, "NUM_GENERATIONS": 4, "ITEMS": 16, "MORE_STEPS": 2}
    notebook = executed(tmp_path, form, {"APO_PYTHON": sys.executable})
    outputs = {cell.source.splitlines()[0].removeprefix("#@title "): _text(cell) for cell in notebook.cells[1:-1]}
    assert "No GPU here" in outputs["The machine"]
    assert "GRPO + DADS + STCR with tiny_cpu.yaml" in outputs["What to train"]
    assert outputs["Before: how the base answers"].count("base</b>") == 3
    assert "step    3" in outputs["Train"] and "image/png" in outputs["Train"]
    assert "The LoRA has trained: all" in outputs["Has the LoRA trained?"]
    after = outputs["After: base and tuned, side by side"]
    assert after.count("base</b>") == after.count("tuned</b>") == 3
    assert "accuracy" in outputs["Measure on held-out items"]
    assert "report.html" in outputs["The whole run on one page"]
    assert "step    5" in outputs["Continue: after a disconnect, or for more steps"]
    assert "Nothing was exported" in outputs["Export"]
    assert (
        "Nothing was pushed" in outputs["Push to the Hub: needs HF_TOKEN in Colab's secrets (the key icon on the left)"]
    )
    run, base = sorted(path for path in (tmp_path / "content" / "runs").iterdir() if path.is_dir())
    assert base.name == f"{run.name}-base" and not (base / "metrics.jsonl").exists()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def _text(cell):
    """All that a cell shows: text, HTML, and the types of pictures."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        else:
            data = output.get("data", {})
            parts += [data.get("text/html", ""), *(kind for kind in data if kind.startswith("image/"))]
    return "\n".join(parts)
