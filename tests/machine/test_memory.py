"""Peak memory is bytes on every system."""

import resource
from types import SimpleNamespace

import psutil
import pytest

from apo_lora.machine import memory


@pytest.mark.parametrize(("platform", "expected"), [("linux", 3 * 1024), ("darwin", 3), ("win32", 5)])
def test_each_system_has_a_unit_of_its_own(platform, expected, monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=5))
    assert memory.peak_resident_memory() == expected


def test_the_peak_of_this_process_is_at_least_what_it_holds_now():
    held = psutil.Process().memory_info().rss
    assert held * 0.9 < memory.peak_resident_memory() < psutil.virtual_memory().total
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert memory.peak_resident_memory() > held + 250_000_000
