"""The screen's encoding, and what launchers and notebooks leave in the environment."""

import io
import os
import sys

import pytest

from apo_lora.machine.process import accept_every_sign, forget_other_launches

LAUNCH = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    for name in (*LAUNCH, "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK"),
        ({"RANK": "3"}, "RANK"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "WORLD_SIZE, RANK"),
        ({**LAUNCH, "WORLD_SIZE": "four"}, None),
        ({**LAUNCH, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, None),  # torchrun of one process
    ],
    ids=str,
)
def test_variables_that_start_no_group_are_dropped(given, says, monkeypatch, capsys):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    forget_other_launches()
    assert not set(LAUNCH) & set(os.environ)
    assert capsys.readouterr().err == (
        f"Ignored in the environment: {says}; no launcher started this process.\n" if says else ""
    )


def test_a_launch_of_several_processes_stays(monkeypatch, capsys):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    forget_other_launches()
    assert {name: os.environ[name] for name in LAUNCH} == LAUNCH and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"2 \\u03c0 = \\u6570"), ("cp1252", b"2 \\u03c0 = \\u6570"), ("utf-8", "2 π = 数".encode())],
)
def test_a_screen_shows_what_it_can(encoding, shown, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    if encoding != "utf-8":
        with pytest.raises(UnicodeEncodeError):
            screen.write("π")
    monkeypatch.setattr(sys, "stdout", screen)
    accept_every_sign()
    print("2 π = 数", end="", flush=True)
    assert screen.buffer.getvalue() == shown


def test_a_screen_that_is_no_text_stream_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", object())
    accept_every_sign()
