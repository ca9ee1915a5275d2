"""A seeded part of the kill matrix, as one command in a process of its own: it forks, and pytest has threads."""

from collections import Counter
from types import SimpleNamespace

import forks
import pytest

from .kill_matrix import cases
from .write_points import KINDS

KILLS = 12


def test_every_kind_of_write_has_its_turn():
    operations = [(kind, "open", "") for kind in KINDS for _ in range(5)]
    wanted = list(cases(KILLS, seed=1, reference=SimpleNamespace(operations=operations, seconds=3.0)))
    assert Counter(case.number.name for case in wanted) == {"SIGKILL": 12, "SIGTERM": 2, "SIGINT": 2}
    first = [case.moments[0].point for case in wanted[:KILLS]]
    assert {point.kind for point in first if point} == set(KINDS) and None in first
    assert wanted == list(cases(KILLS, seed=1, reference=SimpleNamespace(operations=operations, seconds=3.0)))
    assert any(len(case.moments) == 2 for case in wanted)


@pytest.mark.slow
def test_killed_runs_end_as_the_uninterrupted_one():
    command = ["-m", "tests.faults.kill_matrix", "--kills", KILLS, "--seed", "1", "--only-forks"]
    finished = forks.run(command, timeout=1800)
    print(finished.stdout)
    assert finished.returncode == 0, finished.stdout + finished.stderr[-3000:]
