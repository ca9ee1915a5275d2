"""Base and tuned answer to one question: they are what the two models say, and stand side by side on a terminal."""

import fcntl
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
import torch
from conftest import PROJECT
from PIL import Image
from safetensors.torch import load_file, save_file
from stirred_adapters import stirred_run

from apo_lora.chat.chat import chat
from apo_lora.chat.columns import Column, SideBySide
from apo_lora.commands.main import main
from apo_lora.errors import ModelError
from apo_lora.recipe.files import load_recipe
from apo_lora.rewards.answers.text import final_answer
from apo_lora.run.adapter import CONFIG, RECIPE_ON_HUB, WEIGHTS, find_adapter
from apo_lora.run.directory import RunDir

QUESTION = "How many red shapes plus blue shapes?"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(text, width):
    """The lines that a terminal shows after `text`, trailing spaces left out."""
    grid, row, column = {}, 0, 0
    for token in re.findall(r"\x1b\[\d+[A-Z]|[\s\S]", text):
        if token.startswith("\x1b["):
            distance = int(token[2:-1])
            row += {"A": -distance, "B": distance}.get(token[-1], 0)
            column += distance if token[-1] == "C" else 0
            assert row >= 0 and token[-1] in "ABC"
        elif token == "\n":
            row, column = row + 1, 0
        elif token == "\r":
            column = 0
        else:
            assert column < width and (row, column) not in grid  # nothing is written over
            grid[row, column] = token
            column += 1
    lines = ["".join(grid.get((r, c), " ") for c in range(width)).rstrip() for r in range(row + 1)]
    return lines


def words(lines):
    return " ".join(lines).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "run"
    return stirred_run(folder, ["grpo.max_completion_length=80"], scale=0.15, seed=1)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    from apo_lora.tiny import boards

    path = tmp_path_factory.mktemp("board") / "board.png"
    boards.reasoning_rows(1, split="test", seed=0)[0]["image"].save(path)
    return path


def ask(run, *, size=None, monkeypatch=None, **options):
    """(base, tuned, what was written), on a terminal of that size where one is given."""
    out = Terminal() if size else io.StringIO()
    if size:
        monkeypatch.setenv("COLUMNS", str(size[0]))
        monkeypatch.setenv("LINES", str(size[1]))
    return *chat(find_adapter(run.path), QUESTION, out, **options), out.getvalue()


def greedy_answers(run, board):
    """By transformers and PEFT alone: what the bare base says, and the base with the run's adapter."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from apo_lora.tiny import BASE_DIR

    base = AutoModelForImageTextToText.from_pretrained(BASE_DIR, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(BASE_DIR)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.open(board)], return_tensors="pt")

    def answer(model):
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=80)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(ids, skip_special_tokens=True)

    return answer(base), answer(PeftModel.from_pretrained(base, run.adapter).eval())


def test_the_answers_are_those_of_the_two_models(run, board):
    of_base, of_tuned = greedy_answers(run, board)
    assert of_base != of_tuned
    base, tuned, _ = ask(run, image=str(board))
    assert (base.text, tuned.text) == (of_base, of_tuned)


def test_a_reader_that_is_no_terminal_gets_plain_text(run, board):
    base, tuned, text = ask(run, image=str(board))
    assert "\x1b" not in text
    first, second = text.split("tuned: run\n")
    for completion, part in ((base, first), (tuned, second)):
        assert completion.text in part
        answer = final_answer(completion.text)
        assert f"answer  {answer.text if answer else 'none found'}\n" in part
        assert f"length  {completion.length} tokens" in part
    assert final_answer(base.text)  # the base is taught to give one


@pytest.mark.parametrize("width", [60, 120])
def test_side_by_side_where_there_is_room(run, board, width, monkeypatch):
    base, tuned, text = ask(run, size=(width, 50), monkeypatch=monkeypatch, image=str(board))
    if width == 60:
        assert "\x1b" not in text and text.index("base: ") < text.index("tuned: ")
        return
    lines = shown(text, width)
    assert lines[0].startswith("base: ") and lines[0].index("tuned: run") == (width - 3) // 2 + 3
    left, right = [line[: (width - 3) // 2] for line in lines], [line[(width - 3) // 2 + 3 :] for line in lines]
    assert "".join(base.text.split()) in "".join(words(left)) and "".join(tuned.text.split()) in "".join(words(right))
    assert f"length {base.length} tokens" in " ".join(words(left))
    assert f"length {tuned.length} tokens" in " ".join(words(right))
    assert lines[-1] == ""  # the prompt of the shell comes below both


def test_a_question_without_an_image_and_a_limit(run):
    base, tuned, text = ask(run, max_tokens=5)
    assert base.length == tuned.length == 5 and text.count("5 tokens, cut off there (--max-tokens)") == 2
    assert ask(run, max_tokens=6)[0].text.startswith(base.text)


def test_sampled_answers_vary_and_greedy_ones_do_not(run):
    """Loading seeds the fresh adapter: the samples must not come out the same each time for that."""
    assert len({ask(run, sampled=True)[:2] for _ in range(3)}) > 1
    assert len({ask(run)[:2] for _ in range(2)}) == 1


# --- what cannot be answered -----------------------------------------------------------------------------------------


def test_an_adapter_of_another_size_is_refused(run, tmp_path):
    other = RunDir(shutil.copytree(run.path, tmp_path / "other"))
    edit_config(other.adapter, r=4)
    with pytest.raises(ModelError, match="cannot be loaded"):
        ask(other)
    (other.adapter / WEIGHTS).write_bytes(b"cut short")
    with pytest.raises(ModelError, match="cannot be read"):
        ask(other)


def test_an_adapter_alone_answers_as_its_run_does(run, board, tmp_path):
    """Rank, alpha and layers are its own, whatever the recipe says of them; a pulled folder brings its recipe."""
    answers = ask(run, image=str(board))[:2]
    alone = RunDir(shutil.copytree(run.adapter, tmp_path / "alone"))
    other = load_recipe(run.recipe, ["lora.r=2", "lora.alpha=1", "lora.target_modules=[q_proj]", "lora.vision=true"])
    assert ask(alone, image=str(board), recipe=other)[:2] == answers
    (alone.path / RECIPE_ON_HUB).write_text(other.to_yaml())
    base, tuned, text = ask(alone, image=str(board))
    assert (base, tuned) == answers and "tuned: alone\n" in text


def edit_config(adapter, **values):
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(adapter, change):
    path = adapter / WEIGHTS
    save_file(dict(change(name, weight) for name, weight in load_file(path).items()), path)


def test_an_adapter_by_an_older_transformers_answers_the_same(run, tmp_path):
    """Before 4.52 the layers had other names; the answers do depend on the adapter."""
    answers = ask(run)[:2]
    assert answers[0] != answers[1]
    old = RunDir(shutil.copytree(run.path, tmp_path / "old"))
    names = re.compile(r"model\.(language_model\.(?=layers)|(?=visual))")
    edit_weights(old.adapter, lambda name, weight: (re.sub(names, lambda m: "model." if m[1] else "", name), weight))
    assert not [name for name in load_file(old.adapter / WEIGHTS) if "language_model" in name]
    assert ask(old)[:2] == answers


ELSEWHERE = {
    "all linear layers": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
    "all layers but some": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
    "the tower alone": {"target_modules": r".*visual\.blocks.*\.(qkv|proj)"},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
}


@pytest.mark.parametrize("how", ELSEWHERE, ids=str)
def test_an_adapter_trained_by_peft_alone_gives_its_model(how, run, tmp_path):
    """Whatever a recipe cannot say of its layers: the logits are those of PEFT's own model."""
    from peft import LoraConfig, get_peft_model
    from stirred_adapters import stir
    from transformers import AutoModelForImageTextToText

    from apo_lora.policy.tuned import load_tuned
    from apo_lora.run.adapter import recipe_for
    from apo_lora.tiny import BASE_DIR

    base = AutoModelForImageTextToText.from_pretrained(BASE_DIR, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **ELSEWHERE[how]))
    stir(model)
    model.save_pretrained(tmp_path)
    source = find_adapter(tmp_path)
    policy = load_tuned(source, recipe_for(source, load_recipe(run.recipe)))
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?"
    red = Image.new("RGB", (84, 84), "red")
    inputs = policy.processor(text=[text], images=[red], return_tensors="pt")
    with torch.no_grad():
        logits = [each.eval()(**inputs).logits for each in (policy.model, model)]
        with model.disable_adapter():
            assert not torch.allclose(model(**inputs).logits, logits[1], atol=1e-2)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda adapter: edit_config(adapter, use_dora=True), "trained with use_dora, which is not supported"),
        (
            lambda adapter: edit_weights(adapter, lambda name, weight: (name, weight / 0)),
            "weights of the adapter are NaN",
        ),
        (
            lambda adapter: edit_weights(adapter, lambda name, weight: (f"x.{name}", weight)),
            "has none of the adapter's layers",
        ),
        (lambda adapter: (adapter / WEIGHTS).write_bytes(b"cut short"), "cannot be read"),
        (lambda adapter: (adapter / CONFIG).write_text('{"base_model_name_or_path": "x/y"}'), "only LoRA"),
    ],
)
def test_an_adapter_alone_that_cannot_be_loaded_is_one_line(spoil, says, run, tmp_path, capsys):
    alone = shutil.copytree(run.adapter, tmp_path / "alone")
    spoil(alone)
    assert main(["chat", str(alone), QUESTION, "--recipe", "tiny_cpu"]) == 2
    *progress, error = capsys.readouterr().err.strip().splitlines()
    assert says in error and all("Loading weights" in line for line in progress)


# --- the columns -----------------------------------------------------------------------------------------------------


def test_a_column_wraps_at_words_whatever_the_pieces():
    text = "one two three\nfour abcdefghijklm"
    wrapped = ["one two", "three", "four", "abcdefghij", "klm"]
    for pieces in ([text], re.findall(r"\S+|\s+", text)):
        out = io.StringIO()
        column = Column(out, width=10)
        for piece in pieces:
            column.put(piece)
        assert [line.rstrip() for line in out.getvalue().split("\n")] == wrapped and column.height == 5


def test_wide_signs_take_two_cells():
    out = io.StringIO()
    Column(out, width=6).put("答案是四个")
    assert out.getvalue() == "答案是\n四个"


def test_a_terminal_is_given_no_orders_by_a_model():
    out = io.StringIO()
    Column(out, width=None).put("a\x1b[2Jb\x07\rc\td\n")
    assert out.getvalue() == "a[2Jbc    d\n"


@pytest.mark.parametrize(("first", "second"), [("1\n2\n3\n4", "5"), ("1", "2\n3\n4\n5"), ("1\n2", "3\n4")])
def test_whichever_is_longer_the_end_is_below_both(first, second):
    out = Terminal()
    screen = SideBySide(out, (83, 24))
    screen.first("a").put(first)
    column = screen.second("b")
    column.put(second)
    screen.end(column)
    out.write("$")
    lines = shown(out.getvalue(), 83)
    assert [line[:40].strip() for line in lines[:-1]][: 2 + len(first.split())] == ["a", "", *first.split()]
    assert [line[43:] for line in lines[:-1]][: 2 + len(second.split())] == ["b", "", *second.split()]
    assert lines[-1] == "$" and len(lines) == 3 + max(len(first.split()), len(second.split()))


def test_what_has_scrolled_away_is_not_written_beside():
    def written(lines):
        out = Terminal()
        screen = SideBySide(out, (83, 10))
        screen.first("a").put("\n".join("x" * lines))
        screen.second("b").put("y")
        return out.getvalue()

    assert "\x1b" in written(5)
    assert "\x1b" not in written(12) and written(12).endswith("b\n\ny")


def test_the_real_command_on_a_real_terminal(run, board):
    own, childs = pty.openpty()
    fcntl.ioctl(childs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "apo_lora.commands.main", "chat", str(run.path), "--image", str(board), QUESTION],
        stdin=childs, stdout=childs, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    os.close(childs)
    text = b""
    while True:
        try:
            piece = os.read(own, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        text += piece
    assert process.wait(timeout=120) == 0, process.stderr.read().decode()
    os.close(own)
    lines = shown(text.decode(), 100)
    assert lines[0].startswith("base: ") and "tuned: run" in lines[0]
    assert sum(line.count("length  ") for line in lines) == 2


@pytest.mark.slow
def test_unsloth_gives_the_same_answers(run, board, tmp_path):
    from unsloth_on_cpu import run_script

    if torch.cuda.is_available():
        pytest.skip("Unsloth on a CPU is for hosts without a GPU")
    finished = run_script(
        PROJECT / "tests" / "support" / "unsloth_chat.py", str(run.path), str(board), QUESTION, folder=tmp_path
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert tuple(json.loads(finished.stdout.splitlines()[-1])) == greedy_answers(run, board)
