"""Base and tuned GGUF answer one question through the real llama.cpp, as transformers and PEFT answer it."""

import io
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from gguf_model import as_gguf
from PIL import Image, ImageDraw

from apo_lora.chat import llama_server
from apo_lora.chat.chat import example_of
from apo_lora.chat.columns import Column
from apo_lora.chat.gguf import chat_gguf, files_to_ask
from apo_lora.chat.llama_server import StreamedAnswer, find_gguf, find_server, serving
from apo_lora.commands.main import main
from apo_lora.errors import ModelError
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.rewards.answers.text import final_answer
from apo_lora.run.adapter import RECIPE_ON_HUB

QUESTION = "How many red shapes?"
CHANGES = [
    "grpo.max_completion_length=12",
    "data.instruction=Answer in <answer> tags.",
    "data.system_prompt=You count.",
    "data.max_pixels=20000",
]


@pytest.fixture(scope="module")
def run(gguf_adapter, llama_cpp, tmp_path_factory):
    """A run with its GGUF and its base's, both in F32."""
    path = tmp_path_factory.mktemp("chat_gguf") / "run"
    shutil.copytree(gguf_adapter, path / "adapter")
    recipe = load_recipe(find_recipe("tiny_cpu"), CHANGES)
    (path / "recipe.yaml").write_text(recipe.to_yaml())
    shutil.copytree(as_gguf(gguf_adapter, llama_cpp, "F32"), path / "gguf")
    arguments = ["export", str(path), "--to", "base-gguf", "--quantization", "F32", "--llama-cpp", str(llama_cpp)]
    assert main(arguments) == 0
    return path


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """Larger than the recipe's limit."""
    path = tmp_path_factory.mktemp("board") / "board.png"
    image = Image.new("RGB", (280, 224), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 20, 120, 120), fill="red")
    draw.rectangle((140, 60, 250, 200), fill="blue")
    image.save(path)
    return path


@pytest.fixture(params=["xllamacpp", "llama-server"])
def program(request, monkeypatch):
    """llama.cpp's server inside the Python package, and the program, where it is on the PATH."""
    if request.param == "llama-server" and not shutil.which("llama-server"):
        pytest.skip("llama-server is not on the PATH")
    if request.param == "xllamacpp":
        pytest.importorskip("xllamacpp")
        monkeypatch.setenv("PATH", "/nowhere")
    return request.param


@torch.no_grad()
def greedy_answers(run, board):
    """(text, tokens) by transformers and PEFT: of the base, and with the adapter; images resized as in training."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from apo_lora.policy.loading import limit_image_size

    base_folder = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    recipe = load_recipe(run / "recipe.yaml")
    base = AutoModelForImageTextToText.from_pretrained(base_folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(base_folder)
    limit_image_size(processor, recipe.data)
    example = example_of(QUESTION, board and str(board))
    text = processor.apply_chat_template(example.messages(recipe.data), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[i.open() for i in example.images] or None, return_tensors="pt")

    def answer(model):
        ids = model.generate(
            **inputs, do_sample=False, max_new_tokens=12, suppress_tokens=QWEN2_5_VL.vision_token_ids(processor)
        )[0, inputs["input_ids"].shape[1] :]  # fmt: skip
        return processor.decode(ids, skip_special_tokens=True), len(ids)

    return answer(base), answer(PeftModel.from_pretrained(base, run / "adapter").eval())


def shown(text):
    """As a column shows it."""
    out = io.StringIO()
    Column(out, width=None).put(text)
    return out.getvalue()


# --- in the real llama.cpp --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("with_image", [pytest.param(False, marks=pytest.mark.matrix), True])
def test_the_answers_are_those_of_transformers(run, board, program, with_image, capsys):
    image = board if with_image else None
    base, tuned = greedy_answers(run, image)
    assert base != tuned
    arguments = ["chat", str(run), QUESTION, "--gguf", *(["--image", str(image)] if image else [])]
    assert main(arguments) == 0
    written = capsys.readouterr().out
    first, second = written.split("tuned: adapter-F32.gguf\n")
    assert first.startswith("base: base-F32.gguf\n")
    for (text, length), part in ((base, first), (tuned, second)):
        answer = final_answer(text)
        assert shown(text) in part and f"answer  {shown(answer.text) if answer else 'none found'}\n" in part
        assert f"length  {length} tokens" in part


@pytest.mark.slow
def test_the_image_is_bounded_as_in_training(run, board, program):
    """The prompt has as many tokens as the processor makes of it, and more without the limit."""
    from transformers import AutoProcessor

    from apo_lora.chat.gguf import chat_messages
    from apo_lora.data.examples import image_tokens
    from apo_lora.export.image_limits import image_token_limits
    from apo_lora.policy.loading import limit_image_size

    recipe = load_recipe(run / "recipe.yaml")
    base_folder = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    processor = AutoProcessor.from_pretrained(base_folder)
    free = image_tokens(processor, (280, 224))
    limit_image_size(processor, recipe.data)
    assert (bounded := image_tokens(processor, (280, 224))) < free
    example = example_of(QUESTION, str(board))
    prompts = []
    for limits in (image_token_limits(recipe.data, QWEN2_5_VL), {}):
        with serving(find_gguf(run / "gguf"), find_server(None), context=1024, image_tokens=limits) as url:
            answer = StreamedAnswer(url, chat_messages(example, recipe), max_tokens=1, temperature=0.0)
            list(answer)
            prompts.append(answer.prompt_length)
    assert prompts[1] - prompts[0] == free - bounded


@pytest.mark.slow
def test_the_pieces_come_as_they_are_made(run, program):
    """More than one write per answer; one model at a time; sampled answers vary and greedy ones do not."""
    tuned, base, recipe = files_to_ask(run, None, None)
    writes = []
    out = io.StringIO()
    out.write = lambda text: writes.append(text) or len(text)
    first = chat_gguf(tuned, None, recipe, QUESTION, out, max_tokens=8)
    assert first[0] is None and first[1].length == 8 and first[1].truncated
    assert len(writes) > 8 and "--base-gguf" in writes[-1]
    assert chat_gguf(tuned, None, recipe, QUESTION, io.StringIO(), max_tokens=8) == first
    sampled = [chat_gguf(tuned, None, recipe, QUESTION, io.StringIO(), max_tokens=8, sampled=True) for _ in range(2)]
    assert sampled[0] != sampled[1]


@pytest.mark.slow
def test_a_pulled_gguf_folder_is_asked_by_the_recipe_in_it(run, program, tmp_path, capsys):
    pulled = shutil.copytree(run / "gguf", tmp_path / "pulled")
    assert main(["chat", str(pulled), QUESTION, "--gguf", "--max-tokens", "2"]) == 2
    assert "--recipe R" in capsys.readouterr().err
    assert main(["chat", str(pulled), QUESTION, "--gguf", "--max-tokens", "2", "--recipe", "tiny_cpu"]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("tuned: ") and "Not compared with the base" in alone
    shutil.copy(run / "recipe.yaml", pulled / RECIPE_ON_HUB)
    base = ["--base-gguf", str(run / "base_gguf")]
    assert main(["chat", str(pulled), QUESTION, "--gguf", "--max-tokens", "2", *base]) == 0
    assert capsys.readouterr().out.startswith("base: ")


@pytest.mark.slow
def test_a_file_that_is_no_model_is_one_line(run, program, tmp_path, capsys):
    broken = shutil.copytree(run / "gguf", tmp_path / "broken")
    (broken / "adapter-F32.gguf").write_bytes(b"GGUF, but not really")
    assert main(["chat", str(broken), QUESTION, "--gguf", "--recipe", "tiny_cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert "adapter-F32.gguf" in error and len(error.splitlines()) == 1


# --- what cannot be asked ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A GGUF folder by name only."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("m-Q8_0.gguf", "mmproj-m-F16.gguf"):
        (folder / name).write_bytes(b"")
    return folder


def test_two_files_are_found_with_and_without_a_report(folder):
    assert find_gguf(folder).text.name == "m-Q8_0.gguf" and find_gguf(folder).mmproj.name == "mmproj-m-F16.gguf"
    (folder / "another.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="one model and one mmproj"):
        find_gguf(folder)
    report = {"files": [{"file": "another.gguf"}, {"file": "mmproj-m-F16.gguf"}]}
    (folder / "export_report.json").write_text(json.dumps(report))
    assert find_gguf(folder).text.name == "another.gguf"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gguf", "--llama-cpp", "nowhere", "--recipe", "tiny_cpu"], "--llama-cpp nowhere: no such folder"),
        (["--gguf"], "give one with --recipe R"),
        (["--gguf", "--recipe", "nowhere"], "no such file"),
        (["--gguf", "--recipe", "tiny_cpu", "--base-gguf", "nowhere"], "nowhere: no such folder"),
        (["--gguf", "--recipe", "tiny_cpu", "--image", "nowhere.png"], "no file"),
        (["--llama-cpp", "nowhere"], "need --gguf"),
    ],
)
def test_bad_use_is_one_line(folder, arguments, says, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["chat", str(folder), QUESTION, *arguments]) == 2
    written = capsys.readouterr()
    assert says in written.err and len(written.err.strip().splitlines()) == 1 and written.out == ""


def test_a_run_without_a_gguf_says_how_to_make_one(tmp_path, load_tiny, capsys):
    load_tiny().model.save_pretrained(tmp_path / "run" / "adapter")
    shutil.copy(find_recipe("tiny_cpu"), tmp_path / "run" / "recipe.yaml")
    assert main(["chat", str(tmp_path / "run"), QUESTION, "--gguf"]) == 2
    assert "--to gguf" in capsys.readouterr().err.splitlines()[-1]


def test_a_server_that_ends_is_one_line(folder, tmp_path, capsys):
    """A stand-in for a llama-server that does not know an option."""
    program = tmp_path / "llama.cpp" / "llama-server"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys; print('loading'); sys.exit('error: invalid argument: -np')\n")
    program.chmod(0o755)
    arguments = ["--gguf", "--recipe", "tiny_cpu", "--llama-cpp", str(program.parent)]
    assert main(["chat", str(folder), QUESTION, *arguments]) == 2
    assert "llama-server did not start (error: invalid argument: -np)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (400, {"error": {"message": "the request exceeds the available context size"}}, "exceeds the available"),
        (500, "<html>", "HTTP 500"),
        (200, 'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
        (200, "data: {cut", "the connection was lost"),
    ],
)
def test_an_answer_that_is_none_is_one_line(status, body, says):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(ModelError, match=says):
            list(StreamedAnswer(f"http://127.0.0.1:{server.server_port}", []))


def test_neither_program_nor_package_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(llama_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install xllamacpp"):
        find_server(None)
