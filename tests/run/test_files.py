"""Files of a run: replaced as a whole, and JSON lines of which a kill costs the unfinished last one alone."""

import errno
import json
import subprocess
import sys

import pytest

from apo_lora.errors import RunDirError
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl, locked, read_jsonl, write_atomically
from apo_lora.run.resume import checkpoint_to_continue

WHOLE = '{"step": 1, "completion": "drei"}\n{"step": 2, "completion": "fünf"}\n'.encode()
INSIDE_A_CHARACTER = WHOLE.index(b"\xc3") + 1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def steps(path):
    return [row["step"] for row in read_jsonl(path)]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (len(WHOLE), [1, 2]),
        (len(WHOLE) - 1, [1, 2]),
        (len(WHOLE) - 5, [1]),
        (INSIDE_A_CHARACTER, [1]),
        (7, []),
        (0, []),
    ],
)
def test_a_cut_last_line_is_left_out_and_does_not_spoil_the_next_row(path, end, expected):
    path.write_bytes(WHOLE[:end])
    if end == INSIDE_A_CHARACTER:
        with pytest.raises(UnicodeDecodeError):
            path.read_text(encoding="utf-8")
    assert steps(path) == expected
    append_jsonl(path, [{"step": 3}])
    assert steps(path) == [*expected, 3]


@pytest.mark.parametrize("line", [b'{"step": 2, "compl', b'{"step": 2, "completion": "f\xc3"}', b"[2]", b"2", b""])
def test_a_spoiled_line_with_others_behind_it_is_one_error_and_nothing_is_lost(tmp_path, line):
    run, recipe = RunDir(tmp_path / "run"), Recipe.model_validate({"data": {"train": "boards"}})
    run.create()
    run.recipe.write_text(recipe.to_yaml())
    assert checkpoint_to_continue(run, recipe, "auto") is None
    for path in (run.metrics, run.completions, run.answers):
        spoiled = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
        path.write_bytes(spoiled)
        for read in (
            lambda path=path: list(read_jsonl(path)),
            lambda: checkpoint_to_continue(run, recipe, "auto"),
            *([] if path == run.answers else [lambda: run.rewind(1)]),
        ):
            with pytest.raises(RunDirError) as error:
                read()
            assert str(error.value).startswith(f"{path} line 2: not a JSON object; restore the file")
            assert len(str(error.value).splitlines()) == 1 and path.read_bytes() == spoiled
        path.unlink()


def test_any_text_can_be_recorded(path):
    append_jsonl(path, [{"step": 1, "completion": "half a character \ud800, null \0, right-to-left \u202e"}])
    (row,) = read_jsonl(path)
    assert row["completion"].startswith("half a character") and "\u202e" in row["completion"]


def test_atomic_writes_leave_no_litter(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_atomically(path, "1")
    write_atomically(path, "2")
    assert json.loads(path.read_text()) == 2
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


HOLDS = """
import sys, time
from pathlib import Path
from apo_lora.run.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_process_at_a_time_until_that_is_killed(tmp_path):
    with locked(tmp_path):
        pass
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunDirError, match="another process is writing to it"), locked(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []  # nothing stays behind


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def refuses(*_, **options):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr("filelock.lock_descriptor", refuses)
    with locked(tmp_path), locked(tmp_path):
        pass
