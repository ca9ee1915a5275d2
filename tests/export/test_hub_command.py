"""`apo-lora export --to hub`: what is handed to the push. That it arrives is shown in test_hub.py."""

import json

import pytest

from apo_lora.commands.main import main
from apo_lora.export import targets
from apo_lora.run.adapter import CONFIG, WEIGHTS
from apo_lora.tiny import BASE_DIR


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"base_model_name_or_path": str(BASE_DIR)}))
    (folder / WEIGHTS).write_bytes(b"")  # not read here
    return folder


@pytest.fixture
def pushed(monkeypatch):
    calls = []

    def push(source, **options):
        calls.append((source.folder, options))
        return "https://hub.example/me/counts"

    monkeypatch.setattr("apo_lora.export.hub.push", push)
    return calls


def test_an_adapter_goes_to_the_hub_privately(adapter, pushed, capsys):
    assert main(["export", str(adapter), "--to", "hub", "--repo", "me/counts"]) == 0
    assert pushed == [(adapter, {"repo": "me/counts", "private": True, "what": "adapter", "folder": None})]
    assert "https://hub.example/me/counts: the adapter, private" in capsys.readouterr().out
    assert main(["export", str(adapter), "--to", "hub", "--repo", "me/counts", "--public"]) == 0
    assert pushed[-1][1]["private"] is False


def test_a_checked_export_goes_as_it_is_and_an_absent_one_is_made(adapter, pushed, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(targets, "export_merged", lambda source, out, onto: made.append(out))
    arguments = ["export", str(adapter), "--to", "hub", "--repo", "me/counts", "--what", "merged"]
    assert main([*arguments, "--out", str(tmp_path / "absent")]) == 0 and made == [tmp_path / "absent"]
    (tmp_path / "there").mkdir()
    assert main([*arguments, "--out", str(tmp_path / "there")]) == 2 and len(pushed) == 1  # no report: not ours
    (tmp_path / "there" / targets.REPORT).write_text("{}")
    assert main([*arguments, "--out", str(tmp_path / "there")]) == 0 and len(made) == 1
    assert pushed[-1][1]["folder"] == tmp_path / "there"
    (tmp_path / "there" / targets.REPORT).write_text('{"onto": "trained"}')
    to_there = [*arguments, "--out", str(tmp_path / "there"), "--onto"]
    assert main([*to_there, "trained"]) == 0 and main([*to_there, "original"]) == 2
    assert "was exported with --onto trained" in capsys.readouterr().err


def test_the_hub_wants_a_name(adapter, pushed, capsys):
    assert main(["export", str(adapter), "--to", "hub"]) == 2
    assert "--repo ORG/NAME" in capsys.readouterr().err and not pushed
