"""The Colab notebook: what its cells may do, and Run all without a GPU."""

import ast
import io
import json
import re
import signal
import sys
from types import SimpleNamespace

import nbformat
import pytest
from conftest import PROJECT

from apo_lora.machine.host import Gpu
from apo_lora.notebook import session, verbs
from apo_lora.notebook.machine import banner, suited_recipe
from apo_lora.notebook.verbs import CellOutput, StepFailed, run_module
from apo_lora.recipe.files import shipped_recipes
from apo_lora.run.directory import RunDir

sys.path.insert(0, str(PROJECT / "colab"))
from execute import NOTEBOOK, as_a_screen_shows, executed

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


def test_the_install_cell_imports_nothing_and_installs_the_pinned_set():
    assert "import" not in CODE[0]
    assert "constraints.txt" in CODE[0]


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


def test_a_progress_bar_becomes_its_last_state():
    out = io.StringIO()
    cell = CellOutput(out)
    cell.write(b"start\n\rbar  0%\rbar 50%")
    cell.write("\rbar 100% \u00e9".encode()[:-1])  # half a character
    cell.write("\u00e9".encode()[-1:] + b"\nend")
    cell.close()
    assert as_a_screen_shows(out.getvalue()) == "start\nbar 100% \u00e9\nend\n"


def test_a_line_written_over_a_bar_stands_alone(monkeypatch):
    monkeypatch.setattr(verbs, "SECONDS_BETWEEN_LOOKS", -1)
    out = io.StringIO()
    cell = CellOutput(out)
    cell.write(b"\ra long bar 50%\r              \rstep 1\n\ra long bar 60%\n")
    assert "a long bar 50%" in out.getvalue()
    assert as_a_screen_shows(out.getvalue()) == "step 1\na long bar 60%\n"


def test_a_failing_verb_is_one_line_without_traceback(capsys):
    with pytest.raises(StepFailed, match="exit code 2") as failure:
        verbs.run_verb("train", "--recipe", "nowhere.yaml")
    assert failure.value._render_traceback_() == [str(failure.value)]
    assert "nowhere.yaml: no such file" in capsys.readouterr().out


def test_secrets_reach_the_process_alone(monkeypatch, tmp_path):
    (tmp_path / "tell.py").write_text("import os; print(len(os.environ['HF_TOKEN']))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    run_module("tell", name="tell", secrets={"HF_TOKEN": "hf_secret"})
    import os

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

    # A shell starts what it puts into the background with SIGINT ignored; a kernel of a notebook has it.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(StepFailed, match="Run the cell again"):
            run_module("waits", name="train", meanwhile=interrupt)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert "saved" in capsys.readouterr().out


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_curves_of_a_run_that_starts_again_are_drawn_again(tmp_path, monkeypatch):
    """A run that was cut before its first checkpoint has steps, and train empties that record when it starts anew."""
    shown = []
    handle = SimpleNamespace(update=shown.append)
    monkeypatch.setattr(session, "display", lambda picture, display_id: shown.append(picture) or handle)
    run = RunDir(tmp_path)
    curves = session.Curves(run)
    for steps, num_shown in ((1, 1), (0, 1), (0, 1), (1, 2), (2, 3), (2, 3)):
        run.metrics.write_text(
            "".join(f'{{"step": {n}, "reward": 0.5, "accuracy": 0.5}}\n' for n in range(1, steps + 1))
        )
        curves.redraw()
        assert len(shown) == num_shown


# --- Run all ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_all_without_a_gpu(tmp_path):
    notebook = executed(
        tmp_path, {"RECIPE": "tiny_cpu", "STEPS": 3, "NUM_GENERATIONS": 4, "ITEMS": 16, "MORE_STEPS": 2}
    )
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
    run, base = sorted((tmp_path / "runs").iterdir())
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
