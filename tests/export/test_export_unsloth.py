"""GGUF through Unsloth: when it is chosen, what is made of its files, and its real code on this host's CPU."""

import ast
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from forks import environment, forks_address
from gguf_model import forking_program

from apo_lora.commands.main import main
from apo_lora.export import by_unsloth as export_unsloth
from apo_lora.recipe.files import find_recipe, load_recipe


@pytest.fixture
def as_program(monkeypatch, tmp_path):
    """Makes a script take the place of the program that imports Unsloth; no llama.cpp is found."""

    def use(script):
        monkeypatch.setattr(export_unsloth, "_PROGRAM", (str(script),))
        monkeypatch.setattr(export_unsloth, "is_possible", lambda recipe: True)
        monkeypatch.setenv("PATH", "/nowhere")

    return use


def stand_in(folder, names):
    script = folder / "program.py"
    script.write_text(
        "import json, pathlib\n"
        f"files = [pathlib.Path(name).absolute() for name in {names}]\n"
        "[file.write_text(file.name) for file in files]\n"
        "pathlib.Path('files.json').write_text(json.dumps([str(file) for file in files]))\n"
    )
    return script


def test_the_installed_unsloth_takes_what_it_is_given():
    """Read, not imported: without a GPU it refuses. Other names or another order upstream are noticed here."""
    source = Path(importlib.util.find_spec("unsloth").submodule_search_locations[0]) / "save.py"
    functions = {
        node.name: node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)
    }
    function = functions["unsloth_save_pretrained_gguf"]
    assert [a.arg for a in function.args.args][:4] == ["self", "save_directory", "tokenizer", "quantization_method"]
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    keys = {key.value for value in returned if isinstance(value, ast.Dict) for key in value.keys}
    assert "gguf_files" in keys


def test_its_files_get_our_names(as_program, tmp_path):
    as_program(stand_in(tmp_path, ["merged.Q8_0.gguf", "merged.BF16-mmproj.gguf"]))
    (tmp_path / "out").mkdir()
    text, mmproj = export_unsloth.convert(tmp_path, tmp_path / "out", "mine", "Q8_0")
    assert (text.name, text.read_text()) == ("mine-Q8_0.gguf", "merged.Q8_0.gguf")
    assert (mmproj.name, mmproj.read_text()) == ("mmproj-mine-BF16.gguf", "merged.BF16-mmproj.gguf")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [text.name, mmproj.name]


@pytest.fixture
def adapter(load_tiny, stir_adapter, tmp_path):
    policy = load_tiny()
    stir_adapter(policy.model, scale=0.05)
    policy.model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["merged.Q8_0.gguf"], "no vision file (mmproj)"),
        (["merged.BF16.gguf", "merged.BF16-mmproj.gguf"], "not one Q8_0 model"),
    ],
)
def test_a_vision_file_that_unsloth_left_out_is_an_error(names, says, as_program, adapter, tmp_path, capsys):
    as_program(stand_in(tmp_path, names))
    assert main(["export", str(adapter), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "program.py"]


def test_a_failure_is_one_line_with_the_way_out(as_program, adapter, tmp_path, capsys):
    script = tmp_path / "program.py"
    script.write_text("raise RuntimeError('Unsloth: no network\\nMore about it.')")
    as_program(script)
    assert main(["export", str(adapter), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "RuntimeError: Unsloth: no network" in error and "--llama-cpp DIR" in error


def test_it_is_for_a_gpu_whose_engine_is_unsloth(monkeypatch):
    recipe = load_recipe(find_recipe("tiny_cpu"))
    other = load_recipe(find_recipe("tiny_cpu"), ["model.engine=transformers"])
    for has_gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        chosen = [export_unsloth.is_possible(each) for each in (recipe, None, other)]
        assert chosen == [has_gpu, has_gpu, False]


def test_a_llama_cpp_that_was_named_is_not_passed_over(as_program, adapter, tmp_path, capsys):
    as_program(stand_in(tmp_path, []))
    assert main(["export", str(adapter), "--to", "gguf", "--llama-cpp", str(tmp_path)]) == 2
    assert "no convert_hf_to_gguf.py in" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_unsloth_exports(gguf_adapter, llama_cpp_sources, llama_quantize, as_program, tmp_path, monkeypatch):
    """The whole command, with Unsloth's own code made to run on a CPU, and a llama.cpp where it keeps its own."""
    if torch.cuda.is_available():
        pytest.skip("Unsloth on a CPU is for hosts without a GPU")
    home = Path(forks_address("unsloth")).with_name("llama.cpp")
    home.mkdir()
    shutil.copy(llama_cpp_sources / "convert_hf_to_gguf.py", home)
    for part in ("conversion", "gguf-py"):
        shutil.copytree(llama_cpp_sources / part, home / part)
    shutil.copy(llama_quantize / "llama-quantize", home)
    for name, value in environment("unsloth").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", str(home))
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_SCRIPTS_DIR", str(home))
    as_program(forking_program(tmp_path, "unsloth", PROJECT / "tests" / "support" / "unsloth_gguf.py"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    out = tmp_path / "out"
    assert main(["export", str(gguf_adapter), "--to", "gguf", "--out", str(out)]) == 0
    report = json.loads((out / "export_report.json").read_text())
    text, mmproj = report["files"]
    assert text["file"] == "adapter-Q8_0.gguf" and "Q8_0" in text["tensor_types"]
    assert set(mmproj["vision_matrices"]) <= {"F16", "F32"} and mmproj["vision_matrices"]
    assert {path.name for path in out.iterdir()} == {"export_report.json", "Modelfile", text["file"], mmproj["file"]}
