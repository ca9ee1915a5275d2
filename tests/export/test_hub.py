"""A push onto a Hub on this machine, through huggingface_hub: bytes, privacy, card, interruptions, one-line errors."""

import hashlib
import json
import os
import signal
import time

import forks
import pytest
import yaml
from fake_hub import FakeHub

from apo_lora.errors import HubError
from apo_lora.export.gguf import REPORT
from apo_lora.export.hub import RECIPE_ON_HUB, push
from apo_lora.family.lookup import licence_of_base
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.adapter import CONFIG, WEIGHTS, find_adapter
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl, write_json

TOKEN = "hf_thisIsTheSecretOfTheTest"
QWEN_3B = "unsloth/Qwen2.5-VL-3B-Instruct-bnb-4bit"

# In a fork, since huggingface_hub reads its environment once; it ends as `apo-lora` does.
CHILD = """
import sys
from pathlib import Path
from apo_lora.run.adapter import find_adapter
from apo_lora.errors import UserError
from apo_lora.export.hub import push
run, repo, private, what, folder = sys.argv[1:]
try:
    print(push(find_adapter(run), repo=repo, private=private == "private", what=what,
               folder=Path(folder) if folder else None))
except UserError as error:
    print("\\n".join(error.problems), file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub():
    hub = FakeHub(TOKEN, namespaces=("me", "lab"))
    yield hub
    hub.close()


@pytest.fixture
def run(tmp_path):
    """The record of a run of the 3B recipe, with random bytes for weights."""
    run = RunDir(tmp_path / "run")
    run.adapter.mkdir(parents=True)
    (run.adapter / CONFIG).write_text(json.dumps({"base_model_name_or_path": QWEN_3B}))
    (run.adapter / WEIGHTS).write_bytes(os.urandom(300_000))
    run.recipe.write_text(load_recipe(find_recipe("single_gpu")).to_yaml())
    packages = {"apo-lora": "0.1.0", "trl": "1.15.2", "xformers": None}
    write_json(run.environment, {"python": "3.12.1", "packages": packages, "gpu": {"name": "RTX 4090"}})
    measured = {"accuracy_95_low": 0.1, "accuracy_95_high": 0.9, "length_correct": 50, "length_wrong": None,
                "truncated": 0.0, "well_formatted": 1.0}  # fmt: skip
    write_json(run.evaluation, {
        "before": {"reasoning": measured | {"accuracy": 0.25}}, "after": {"reasoning": measured | {"accuracy": 0.75}}
    })  # fmt: skip
    append_jsonl(run.metrics, [{"step": step} for step in (1, 2, 3)])
    return run


def arguments(hub, run, repo="me/counts", private="private", what="adapter", folder="", **environment):
    home = run.path.parent / "home"  # no token and no cache of the user's
    environment = os.environ | {
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1",
    } | environment  # fmt: skip
    return {"arguments": ["-c", CHILD, run.path, repo, private, what, folder], "env": environment}


def push_in_child(*positional, **options):
    return forks.run(**arguments(*positional, **options), timeout=120)


def assert_one_line(finished, *words):
    assert finished.returncode == 2 and finished.stdout == ""
    assert len(finished.stderr.strip().splitlines()) == 1, finished.stderr
    for word in words:
        assert word in finished.stderr
    assert TOKEN not in finished.stderr and "SIGNED" not in finished.stderr


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what arrives ----------------------------------------------------------------------------------------------------


def test_files_arrive_as_they_are_and_nothing_is_left_behind(hub, run):
    before = snapshot(run.path)
    finished = push_in_child(hub, run)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == f"{hub.url}/me/counts"
    repo = hub.repos["me/counts"]
    assert repo["private"] and repo["commits"] == 1
    assert set(repo["files"]) == {CONFIG, WEIGHTS, "README.md", RECIPE_ON_HUB}
    for name in (CONFIG, WEIGHTS):
        assert repo["files"][name] == before[f"adapter/{name}"]
    assert repo["files"][RECIPE_ON_HUB] == before["recipe.yaml"]
    assert snapshot(run.path) == before
    everything = [finished.stdout.encode(), finished.stderr.encode(), *repo["files"].values()]
    everything += snapshot(run.path.parent).values()
    assert not [content for content in everything if TOKEN.encode() in content]


def test_what_was_pushed_is_an_adapter_again(hub, run, tmp_path):
    assert push_in_child(hub, run).returncode == 0
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in hub.repos["me/counts"]["files"].items():
        (pulled / name).write_bytes(content)
    assert find_adapter(pulled).base_name == QWEN_3B
    assert load_recipe(pulled / RECIPE_ON_HUB) == load_recipe(run.recipe)


def test_public_only_when_asked(hub, run):
    assert push_in_child(hub, run, private="public").returncode == 0
    assert not hub.repos["me/counts"]["private"]
    commits = hub.repos["me/counts"]["commits"]
    assert_one_line(push_in_child(hub, run), "me/counts", "is public", "nothing was sent")
    assert hub.repos["me/counts"]["commits"] == commits


@pytest.mark.parametrize(("what", "file"), [("merged", "model.safetensors"), ("gguf", "model-q4.gguf")])
def test_another_folder_goes_the_same_way(hub, run, tmp_path, what, file):
    folder = tmp_path / "export"
    (folder / "part").mkdir(parents=True)
    (folder / file).write_bytes(os.urandom(5000))
    (folder / "part" / "config.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state").write_text("of a tool")
    assert push_in_child(hub, run, what=what, folder=folder).returncode == 0
    files = hub.repos["me/counts"]["files"]
    assert set(files) == {file, "part/config.json", "README.md", RECIPE_ON_HUB}
    assert files[file] == (folder / file).read_bytes()


def test_the_card_says_what_the_export_merged_into(hub, run, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    write_json(folder / REPORT, {"onto": "trained"})
    assert push_in_child(hub, run, what="merged", folder=folder).returncode == 0
    assert "--onto trained" in " ".join(hub.repos["me/counts"]["files"]["README.md"].decode().split())


def test_a_second_push_of_the_same_sends_no_large_file(hub, run):
    assert push_in_child(hub, run).returncode == 0
    assert len(hub.sent()) == 1
    assert push_in_child(hub, run).returncode == 0
    assert len(hub.sent()) == 1 and hub.repos["me/counts"]["commits"] == 1


# --- the card --------------------------------------------------------------------------------------------------------


def card_of(hub, run, **options):
    finished = push_in_child(hub, run, **options)
    assert finished.returncode == 0, finished.stderr
    card = hub.repos["me/counts"]["files"]["README.md"].decode()
    return yaml.safe_load(card.split("---\n")[1]), card


def test_the_card_says_what_a_stranger_must_know(hub, run):
    front_matter, card = card_of(hub, run)
    assert front_matter["base_model"] == QWEN_3B and front_matter["base_model_relation"] == "adapter"
    assert front_matter["library_name"] == "peft" and front_matter["pipeline_tag"] == "image-text-to-text"
    assert front_matter["license"] == "other" and front_matter["license_name"] == "qwen-research"
    assert front_matter["license_link"].endswith("/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE")
    assert front_matter["datasets"] == ["hiyouga/geometry3k"] and "apo" in front_matter["tags"]
    assert "not for commercial use" in card
    assert "| reasoning | accuracy (95 % interval) | 0.250 (0.10-0.90) | 0.750 (0.10-0.90) |" in card
    assert "for 3 optimizer steps" in card and "GRPO + DADS + STCR" in card
    assert 'from_pretrained(base, "me/counts")' in card
    recipe = card.split("<details>")[1].split("```yaml\n")[1].split("```")[0]
    assert recipe == run.recipe.read_text()
    assert "Python 3.12.1 on RTX 4090; apo-lora 0.1.0, trl 1.15.2." in card


def test_a_base_and_data_of_this_machine_are_no_ids(hub, run):
    """The Hub would refuse a card that gives a path for an id."""
    recipe = load_recipe(run.recipe, ["data.train=/home/me/puzzles.jsonl"])
    run.recipe.write_text(recipe.to_yaml())
    (run.adapter / CONFIG).write_text(json.dumps({"base_model_name_or_path": "/home/me/models/mine"}))
    front_matter, card = card_of(hub, run)
    assert not {"base_model", "base_model_relation", "datasets"} & front_matter.keys()
    assert "adapter for `mine`" in card and "on `puzzles.jsonl`" in card
    assert front_matter["license"] == "unknown" and "does not know the licence" in card


def test_the_card_of_an_adapter_without_a_run_says_what_is_unknown(hub, run):
    config = {"base_model_name_or_path": QWEN_3B, "r": 16, "lora_alpha": 32}
    (run.adapter / CONFIG).write_text(json.dumps(config))
    (run.adapter / "README.md").write_text("PEFT's: [More Information Needed]")
    folder = RunDir(run.path)
    folder.path = run.adapter
    front_matter, card = card_of(hub, folder)
    assert set(hub.repos["me/counts"]["files"]) == {CONFIG, WEIGHTS, "README.md"}
    assert front_matter["base_model"] == QWEN_3B and front_matter["license"] == "other"
    assert "(rank 16, alpha 32)" in card and 'from_pretrained(base, "me/counts")' in card
    assert "nothing was measured" in card and "More Information Needed" not in card
    assert "apo" not in front_matter["tags"]  # by what it was trained, nobody knows


def test_what_a_push_made_goes_up_again_with_its_card(hub, run, tmp_path):
    assert push_in_child(hub, run).returncode == 0
    first = dict(hub.repos["me/counts"]["files"])
    pulled = RunDir(tmp_path / "pulled")
    pulled.path.mkdir()
    for name, content in first.items():
        (pulled.path / name).write_bytes(content)
    assert push_in_child(hub, pulled, repo="lab/counts").returncode == 0
    assert hub.repos["lab/counts"]["files"] == first


def test_a_card_that_the_hub_refuses_is_one_line(hub, run):
    hub.refused["/api/validate-yaml"] = 400
    assert_one_line(push_in_child(hub, run), "rejected the model card")


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "other"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "apache-2.0"),
        ("unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit", "apache-2.0"),
        ("Qwen/Qwen3-VL-2B-Instruct", "apache-2.0"),
        ("unsloth/Qwen3-VL-4B-Instruct-unsloth-bnb-4bit", "apache-2.0"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "unknown"),
        ("unsloth/not-Qwen3-VL-4B-Instruct", "unknown"),
        ("somebody/Qwen2.5-VL-7B-Instruct", "unknown"),
        ("Qwen/Qwen2.5-VL-72B-Instruct", "unknown"),
        ("/models/Qwen2.5-VL-3B-Instruct", "unknown"),
    ],
)
def test_the_licence_of_a_base(base, licence):
    assert licence_of_base(base).front_matter["license"] == licence


# --- interrupted -----------------------------------------------------------------------------------------------------


def test_a_dropped_connection_is_one_line_and_the_next_push_resumes(hub, run):
    hub.drop_next_commit = True
    assert_one_line(push_in_child(hub, run), "the push failed", "push again")
    assert hub.repos["me/counts"]["files"] == {} and len(hub.sent()) == 1
    assert push_in_child(hub, run).returncode == 0
    assert len(hub.sent()) == 1  # the weights had arrived
    assert hub.repos["me/counts"]["files"][WEIGHTS] == (run.adapter / WEIGHTS).read_bytes()


def test_a_killed_push_resumes_at_the_file_that_was_not_whole(hub, run, tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    parts = {f"model-{n}-of-2.safetensors": os.urandom(200_000) for n in (1, 2)}
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    first, second = (hashlib.sha256(content).hexdigest() for content in parts.values())
    hub.hold = second
    process = forks.Forked(**arguments(hub, run, what="merged", folder=folder))
    deadline = time.monotonic() + 60
    while not (hub.holding.is_set() and first in hub.large):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert hub.repos["me/counts"]["files"] == {} and second not in hub.large

    hub.hold = None
    assert push_in_child(hub, run, what="merged", folder=folder).returncode == 0
    assert sorted(hub.sent()) == sorted([f"/large/{first}", f"/large/{second}", f"/large/{second}"])
    files = hub.repos["me/counts"]["files"]
    assert {name: files[name] for name in parts} == parts and hub.repos["me/counts"]["commits"] == 1


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_wrong_token(hub, run):
    assert_one_line(push_in_child(hub, run, HF_TOKEN="hf_another"), "me/counts", "(401)", "settings/tokens")


def test_a_token_that_may_not_create(hub, run):
    hub.refused["/api/repos/create"] = 403
    assert_one_line(push_in_child(hub, run, repo="lab/counts"), "lab/counts", "(403)", "write access to lab")
    assert not hub.repos


def test_a_token_for_one_repository_that_exists(hub, run):
    hub.refused["/api/repos/create"] = 403
    hub.repos["lab/counts"] = {"private": True, "files": {}, "commits": 0}
    assert push_in_child(hub, run, repo="lab/counts").returncode == 0
    assert hub.repos["lab/counts"]["commits"] == 1


def test_a_token_that_may_create_but_not_commit(hub, run):
    hub.refused["/api/models/me/counts/commit"] = 403
    assert_one_line(push_in_child(hub, run), "(403)")
    assert hub.repos["me/counts"]["files"] == {}


def test_another_refusal_shows_no_signed_address(hub, run):
    hub.refused["/large/"] = 418
    assert_one_line(push_in_child(hub, run), "the Hub returned status 418")


def test_no_such_namespace(hub, run):
    assert_one_line(push_in_child(hub, run, repo="nobody/counts"), "no nobody", "(404)", "--repo")


def test_a_hub_that_cannot_be_reached(run):
    finished = push_in_child("http://127.0.0.1:1", run)
    assert_one_line(finished, "http://127.0.0.1:1 cannot be reached", "network")


def test_offline(hub, run):
    assert_one_line(push_in_child(hub, run, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    assert not hub.requests


def test_no_token(hub, run):
    assert_one_line(push_in_child(hub, run, HF_TOKEN=""), "no Hub token", "HF_TOKEN")
    assert not hub.requests


@pytest.mark.parametrize("repo", ["counts", "me/my counts", "me/a/b"])
def test_a_name_that_is_none(run, repo):
    with pytest.raises(HubError, match=f"--repo {repo}"):
        push(find_adapter(run.path), repo=repo)


def test_a_run_without_its_record(run):
    run.environment.unlink()
    with pytest.raises(HubError, match="record, needed for the model card, cannot be read"):
        push(find_adapter(run.path), repo="me/counts")


def test_xet_that_cannot_write_is_one_line(hub, run):
    """The way that large files really go; this Hub has no token for it."""
    assert_one_line(push_in_child(hub, run, HF_HUB_DISABLE_XET="0"), "me/counts")
    assert hub.repos["me/counts"]["files"] == {}
