"""Everything in bad_input_cases.py ends in its one line, exit code 2, in seconds, and writes nothing."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_input_cases import CASES, CHECK, GOOD, Case
from data_sets import jsonl, link, noise, png, png_of_size

from apo_lora.commands.main import main
from apo_lora.data.examples import load_examples
from apo_lora.errors import DataError
from apo_lora.recipe.schema import DataSection


@pytest.fixture(autouse=True)
def here(tmp_path, tmp_path_factory, monkeypatch):
    """A folder of its own to stand in. The cache of `datasets` is elsewhere, as it is for users."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path


def make(files: dict, folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check(case: Case, code: int, error: str, seconds: float) -> None:
    expected = (case.says,) if isinstance(case.says, str) else case.says
    lines = [line for line in error.splitlines() if "Loading weights" not in line and line.strip()]
    assert code == 2, (code, error)
    assert "Traceback" not in error
    assert len(lines) == len(expected), error
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line), line
    assert seconds < case.seconds + 10  # measured: well below the limit; 10 s are for a machine that is busy otherwise


def test_there_are_at_least_120_and_no_two_the_same():
    assert len(CASES) >= 120
    assert len({case.what for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_bad_input_is_one_line_exit_2_and_nothing_written(case, here, capsys):
    make(case.files, here)
    before = contents(here)
    started = time.monotonic()
    try:
        code = main(shlex.split(case.command))
    except SystemExit as exit:  # argparse
        code = exit.code
    check(case, code, capsys.readouterr().err, time.monotonic() - started)
    assert contents(here) == before


SAMPLE = ("a verb with a slip", "a recipe that is nowhere", "a tag that would run a command", "no such file",
          "image: 50,000 x 50,000 pixels", "row: the gold is a megabyte", "fewer rows than a step takes",
          "a run that is not finished", "a run directory that holds a run")  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.what in SAMPLE], ids=lambda case: case.what)
def test_the_same_as_a_program_of_its_own(case, here):
    """What the table runs inside of pytest, as a user would: a process, its exit code, its seconds."""
    make(case.files, here)
    before = contents(here)
    started = time.monotonic()
    command = [sys.executable, "-m", "apo_lora.commands.main", *shlex.split(case.command)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    check(case, finished.returncode, finished.stderr, time.monotonic() - started)
    assert contents(here) == before


# --- a few bad rows are dropped and counted, not fatal ---------------------------------------------------------------

A_FEW_BAD_ROWS = {
    "a missing image": ({**GOOD, "image": "none.png"}, r"image missing \(no file .*none.png\)"),
    "an image cut off": ({**GOOD, "image": "cut.png"}, r"image unreadable \(image cut.png: cannot be decoded"),
    "a bomb": ({**GOOD, "image": "bomb.png"}, r"image too large \(bomb.png has more than 89,478,485 pixels\)"),
    "an image outside": ({**GOOD, "image": "../b.png"}, r"image outside the data folder \(../b.png resolves to"),
    "half a character in a path": ({**GOOD, "image": "\ud83d.png"}, r"image missing \(.*ud83d.png"),
    "a path that clears the screen": ({**GOOD, "image": "\x1b[2J.png"}, r"image missing \(no file .*\\x1b\[2J.png\)"),
    "no gold": ({**GOOD, "image": "a.png", "answer": None}, r"no answer \(the answer is empty\)"),
    "a row that is a number": (5, r"not a mapping \(the row is 5\)"),
    "an image token": ({"problem": "<|image_pad|>", "image": "a.png", "answer": "1"}, r"reserved token"),
}


@pytest.mark.parametrize("bad", A_FEW_BAD_ROWS, ids=str)
def test_a_bad_row_among_good_ones_is_dropped_and_named(bad, here, capsys):
    row, says = A_FEW_BAD_ROWS[bad]
    rows = [{**GOOD, "image": "a.png"}] * 3
    make(
        {
            "set/data.jsonl": jsonl(*rows, row),
            "set/a.png": png(),
            "set/cut.png": noise("PNG")[:9000],
            "set/bomb.png": png_of_size(50_000, 50_000),
            "b.png": png(),
        },
        here,
    )
    assert main(shlex.split(f"{CHECK}set")) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and shown.encode()
    assert re.search(r"rows +4 \(3 usable, 1 dropped\)", shown)
    assert re.search(rf"dropped row 4: {says}", shown), shown


# --- images elsewhere -------------------------------------------------------------------------------------------------


def test_images_elsewhere_can_be_named(here):
    make({"data.jsonl": jsonl({**GOOD, "image": "a.png"}), "pictures/a.png": png()}, here)
    section = DataSection(train="data.jsonl", image_folder="pictures")
    (example,) = load_examples("data.jsonl", section, split="train").examples
    assert example.images[0].path == Path(here, "pictures/a.png")


def test_links_of_the_hubs_cache_lead_to_its_blobs(here, monkeypatch):
    """A snapshot holds links only; they are no way out of the data folder."""
    import huggingface_hub.constants

    home = here / "hub" / "datasets--someone--pictures"
    snapshot = home / "snapshots" / "1"
    make({f"{home}/blobs/abc": png(), f"{snapshot}/data.jsonl": jsonl({**GOOD, "image": "a.png"})}, here)
    (snapshot / "a.png").symlink_to("../../blobs/abc")
    section = DataSection(train=str(snapshot))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "hub"))
    (example,) = load_examples(str(snapshot), section, split="train").examples
    assert example.images[0].open().size == (60, 30)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "elsewhere"))
    with pytest.raises(DataError, match="image outside the data folder"):
        load_examples(str(snapshot), section, split="train")


def test_a_picture_that_is_asked_about_may_be_a_link(here):
    """The user names it, so it may lie anywhere."""
    from apo_lora.chat.chat import example_of

    make({"pictures/a.png": png(), "b.png": link("pictures/a.png")}, here)
    assert example_of("What is it?", "b.png").images[0].size == (60, 30)
