"""The second place of a run: a folder or the Hub. Absent, it costs a line; come back, it catches up; it restores."""

import os
import shutil

import forks
import pytest
from fake_hub import FakeHub

from apo_lora.commands.main import main
from apo_lora.errors import RunDirError
from apo_lora.recipe.combinations import combination_problems
from apo_lora.recipe.schema import Recipe
from apo_lora.run.checkpoints import COMPLETE, seal_checkpoint
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl
from apo_lora.run.mirror import Mirrors

from .tiny_runs import arguments, differences

TOKEN = "hf_thisIsTheSecretOfTheTest"


def save(run, step):
    """As a run leaves it after a checkpoint."""
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes([step]) * 1000)
    (folder / "optimizer.pt").write_bytes(os.urandom(1000))
    append_jsonl(run.metrics, [{"step": step}])
    (run.path / "recipe.yaml").write_text("a: 1\n")
    seal_checkpoint(folder)


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    save(run, 1)
    save(run, 2)
    return run


@pytest.fixture
def words():
    return []


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_holds_the_record_and_the_last_checkpoint(run, tmp_path, words):
    mirrors = Mirrors([str(tmp_path / "drive")], run, words.append)
    mirrors.finish()
    expected = {name: data for name, data in content(run.path).items() if "checkpoint-1/" not in name}
    assert content(tmp_path / "drive") == expected and f"checkpoints/checkpoint-2/{COMPLETE}" in expected
    save(run, 3)
    mirrors.finish()
    assert [p.name for p in RunDir(tmp_path / "drive").valid_checkpoints()] == ["checkpoint-3"]
    assert content(tmp_path / "drive")["metrics.jsonl"].count(b"\n") == 3 and words == []


def test_a_folder_that_is_away_is_one_warning_and_catches_up(run, tmp_path, words):
    drive = tmp_path / "mounted" / "drive"
    mirrors = Mirrors([str(drive)], run, words.append)
    mirrors.refuse_existing()
    mirrors.finish()
    mirrors.finish()
    (warning,) = words
    assert warning.startswith("warning: output.mirror: cannot copy to") and "does not exist; mount it" in warning
    assert not drive.parent.exists()
    drive.parent.mkdir()
    save(run, 3)
    mirrors.finish()
    assert len(words) == 2 and "is available again" in words[1]
    assert [p.name for p in RunDir(drive).valid_checkpoints()] == ["checkpoint-3"]


def test_a_run_in_the_mirror_is_not_overwritten(run, tmp_path, words):
    drive = tmp_path / "mounted" / "drive"
    Mirrors([str(tmp_path / "old")], run, words.append).finish()
    with pytest.raises(RunDirError, match="already contains a run; continue it with --resume auto"):
        Mirrors([str(tmp_path / "old")], RunDir(tmp_path / "new"), words.append).refuse_existing()
    other = RunDir(tmp_path / "other")
    save(other, 1)
    mirrors = Mirrors([str(drive)], other, words.append)
    mirrors.refuse_existing()  # out of reach
    drive.parent.mkdir()
    (tmp_path / "old").rename(drive)
    before = content(drive)
    mirrors.finish()
    assert content(drive) == before and "cannot copy" in words[-1]


def test_a_lost_run_comes_back_from_the_first_place_that_has_it(run, tmp_path, words):
    places = [str(tmp_path / "away" / "x"), str(tmp_path / "cut"), str(tmp_path / "drive")]
    Mirrors(places[1:], run, words.append).finish()
    (tmp_path / "cut/checkpoints/checkpoint-2" / COMPLETE).unlink()
    expected = content(tmp_path / "drive")
    shutil.rmtree(run.path)
    assert Mirrors(places, run, words.append).restore() == places[2]
    assert content(run.path) == expected
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    shutil.rmtree(run.path)
    assert Mirrors(places[:2], run, words.append).restore() is None and not run.path.exists()


def test_the_checkpoint_under_way_is_spared(run, tmp_path, words):
    mirrors = Mirrors([str(tmp_path / "drive")], run, words.append)
    mirrors.copy()
    assert mirrors.in_use.name == "checkpoint-2"
    save(run, 3)
    run.remove_old_checkpoints(1, spare=mirrors.in_use)
    assert [path.name for path in run.valid_checkpoints()] == ["checkpoint-2", "checkpoint-3"]


def test_a_repository_has_a_name():
    recipe = Recipe.model_validate({"data": {"train": "boards"}, "output": {"mirror": ("hub:me", "hub:me/x", "a/b")}})
    assert [problem for problem in combination_problems(recipe) if "mirror" in problem] == [
        "output.mirror: 'hub:me' is not a Hub repository; write hub:ORG/NAME"
    ]


# --- the Hub ---------------------------------------------------------------------------------------------------------

# A child process, since huggingface_hub reads its environment once.
CHILD = """
import sys
from apo_lora.run.mirror import Mirrors
from apo_lora.run.directory import RunDir
what, run, place = sys.argv[1:]
mirrors = Mirrors([place], RunDir(run), print)
if what == "restore":
    print("from", mirrors.restore())
else:
    if what == "start":
        mirrors.refuse_existing()
    mirrors.finish(60)
"""


@pytest.fixture
def hub():
    hub = FakeHub(TOKEN, namespaces=("me",))
    yield hub
    hub.close()


def in_child(hub, what, run, place="hub:me/mirror", **environment):
    environment = os.environ | {
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(run.path.parent / "home"), "NO_PROXY": "127.0.0.1",
    } | environment  # fmt: skip
    finished = forks.run(["-c", CHILD, what, run.path, place], env=environment, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert TOKEN not in finished.stdout + finished.stderr and "SIGNED" not in finished.stdout + finished.stderr
    return finished.stdout.strip()


@pytest.mark.slow
def test_the_hub_holds_a_private_copy_and_gives_it_back(hub, run, tmp_path):
    assert in_child(hub, "start", run) == ""
    repo = hub.repos["me/mirror"]
    expected = {name: data for name, data in content(run.path).items() if "checkpoint-1/" not in name}
    assert repo["private"] and repo["files"] == expected
    assert "already contains a run" in refusal(hub, run)
    lost = RunDir(tmp_path / "lost")
    assert in_child(hub, "restore", lost) == "from hub:me/mirror"
    assert content(lost.path) == expected


def refusal(hub, run):
    with pytest.raises(AssertionError) as error:
        in_child(hub, "start", run)
    return str(error.value)


@pytest.mark.slow
def test_an_older_checkpoint_goes_with_the_commit_of_the_next(hub, run):
    in_child(hub, "start", run)
    save(run, 3)
    assert in_child(hub, "go on", run) == ""
    folders = {name.split("/")[1] for name in hub.repos["me/mirror"]["files"] if name.startswith("checkpoints/")}
    assert folders == {"checkpoint-3"} and hub.repos["me/mirror"]["commits"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HF_TOKEN": "hf_another"}, "(401)"),
        ({"HF_TOKEN": ""}, "no Hub token"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "cannot be reached"),
    ],
)
def test_a_hub_that_takes_nothing_is_one_warning(hub, run, environment, words):
    (line,) = in_child(hub, "start", run, **environment).splitlines()
    assert line.startswith("warning: output.mirror: cannot copy to hub:me/mirror") and words in line
    assert line.endswith("training continues, and the next checkpoint is tried again.")
    assert not hub.repos


@pytest.mark.slow
def test_a_public_repository_gets_nothing(hub, run):
    hub.repos["me/mirror"] = {"private": False, "files": {}, "commits": 0}
    assert "is public" in in_child(hub, "start", run) and hub.repos["me/mirror"]["files"] == {}


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_whose_folder_is_gone_goes_on_from_its_mirror(tmp_path, capsys):
    assert main(arguments(tmp_path / "whole")) == 0
    assert main(arguments(tmp_path / "lost", "train.max_steps=4")) == 0
    shutil.rmtree(tmp_path / "lost/run")
    capsys.readouterr()
    assert main(arguments(tmp_path / "lost")) == 0
    said = capsys.readouterr().out
    assert f"was missing and has been restored from {tmp_path}/lost/mirror" in said and "Continuing from" in said
    assert "checkpoint-4" in said and "step    5" in said and "step    4" not in said
    assert differences(tmp_path / "lost", tmp_path / "whole") == []
