"""The verifier: same verdicts as the plain function, and a worker that may hang, die or grow without harm."""

import math
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from answer_kinds import KINDS

from apo_lora.errors import RewardError
from apo_lora.recipe.schema import RewardsSection
from apo_lora.rewards.functions import verifier_of
from apo_lora.rewards.verifier import Verifier, cores_of_this_process

ROOT = Path(__file__).parents[2]
ASKS_MATH = ("\\boxed{x+1}", "1+x")  # nothing cheaper can decide these

# A stand-in worker that does what the answer says, as the guards leave no known text that makes the true one do it.
STUB = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    answer = json.loads(line)[0]
    if "h" in answer: time.sleep(60)
    if "d" in answer: os._exit(3)
    print("1" if answer == "x+1" else "0", flush=True)
    if "q" in answer: os._exit(0)
"""


def stubbed(seconds=0.5):
    verifier = Verifier(seconds_per_item=seconds, workers=1)
    verifier._command = [sys.executable, "-c", STUB]
    return verifier


def score(verifier, answers):
    return verifier.score([f"\\boxed{{{a}}}" for a in answers], ["1+x"] * len(answers), [None] * len(answers))


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as shared:
        yield shared


def test_same_verdicts_as_the_plain_function(verifier):
    golds = [gold for of_kind in KINDS.values() for gold in of_kind]
    rows = [(text, gold.gold, gold.choices, reward) for gold in golds for text, reward in gold.completions()]
    *asked, expected = zip(*rows, strict=True)  # test_answer_kinds.py holds the plain function to the same
    assert verifier.score(*asked) == list(expected)
    assert (verifier.timeouts, verifier.crashes) == (0, 0)


def test_a_question_that_hangs_is_given_up_counted_and_the_rest_is_scored():
    with stubbed() as verifier:
        started = time.monotonic()
        assert score(verifier, ["x+1", "h+1", "h+1", "x+1", "y+1", "x+ 1"]) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
        assert time.monotonic() - started < 5
        assert (verifier.timeouts, verifier.crashes) == (1, 0)  # the second "h+1" is not asked again


def test_a_worker_that_dies_is_replaced_and_counted():
    with stubbed() as verifier:
        assert score(verifier, ["d+1", "x+1"]) == [0.0, 1.0]
        assert (verifier.timeouts, verifier.crashes) == (0, 1)


def test_a_worker_that_died_between_questions_costs_no_reward():
    with stubbed() as verifier:
        assert score(verifier, ["q+1"]) == [0.0]
        verifier._workers[0]._process.wait()
        assert score(verifier, ["x+1"]) == [1.0]
        assert verifier.crashes == 1


class Hangs:
    """A worker that answers nothing, in step with the others: each round of questions is one time-out long."""

    def __init__(self, in_step: threading.Barrier, waited: list[float]):
        self.in_step, self.waited = in_step, waited

    def send(self, line):
        return True

    def read(self, seconds):
        self.in_step.wait(timeout=20)  # breaks, and fails the test, where fewer workers are at work
        self.waited.append(seconds)
        raise queue.Empty

    def kill(self):
        pass


@pytest.mark.parametrize(("workers", "hostile"), [(1, 6), (4, 12), (4, 40), (16, 64)])
def test_hostile_questions_cost_no_more_than_the_stated_bound(workers, hostile, monkeypatch):
    waited: list[float] = []
    in_step = threading.Barrier(workers)
    monkeypatch.setattr("apo_lora.rewards.verifier._Worker", lambda *_: Hangs(in_step, waited))
    verifier = Verifier(seconds_per_item=5.0, workers=workers)
    assert score(verifier, [f"h+{n}" for n in range(hostile)]) == [0.0] * hostile
    assert verifier.timeouts == len(waited) == hostile
    rounds = [max(waited[start : start + workers]) for start in range(0, hostile, workers)]
    assert len(rounds) == math.ceil(hostile / workers)
    assert max(rounds) == 5.0 and sum(rounds) <= 5.0 * len(rounds)  # the bound is twice that: workers must start, too
    assert sum(rounds) < 2 * 5.0 * math.ceil(hostile / workers)
    if hostile > workers + 10:
        assert rounds[-1] == 0.5  # after ten time-outs there is no patience left


def test_questions_are_shared_out_among_workers_and_each_keeps_its_own():
    with stubbed(seconds=20) as verifier:
        verifier._workers = [None] * 3
        assert score(verifier, ["x+1", "d+1", "y+1", "z+1", "x +1", "1+x+0"]).count(1.0) == 1
        assert (verifier.timeouts, verifier.crashes) == (0, 1)
        workers = [worker for worker in verifier._workers if worker]
        assert len({worker._process.pid for worker in workers}) == len(workers) >= 1
    assert verifier._workers == [None] * 3


def test_a_launch_shares_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores_of_this_process() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_of_this_process() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert cores_of_this_process() == 1


def test_the_recipe_sets_the_rules():
    with verifier_of(RewardsSection()) as strict, verifier_of(RewardsSection(accept_unevaluated=True)) as loose:
        assert strict.score(["\\boxed{7+2}"], ["9"]) == [0.0] and loose.score(["\\boxed{7+2}"], ["9"]) == [1.0]
    with verifier_of(RewardsSection(convert_units=True)) as converts:
        assert converts.score(["\\boxed{500 cm}"], ["5 m"]) == [1.0]


def test_no_worker_is_started_before_it_is_needed_and_none_is_left():
    verifier = Verifier()
    assert verifier.score(["\\boxed{5}", "no"], ["5", "5"], [None, None]) == [1.0, 0.0]
    assert not any(verifier._workers)
    assert verifier.score([ASKS_MATH[0]], [ASKS_MATH[1]], [None]) == [1.0]
    process = verifier._workers[0]._process
    verifier.close()
    assert process.poll() is not None
    assert verifier.score(["\\boxed{1+x+0}"], ["1+x"], [None]) == [1.0]  # usable again
    verifier.close()


def test_a_worker_that_cannot_start_is_an_error_with_a_remedy():
    with Verifier(memory_mb=20) as verifier, pytest.raises(RewardError, match="memory_mb=20"):
        verifier.score([ASKS_MATH[0]], [ASKS_MATH[1]], [None])


def test_lengths_must_agree():
    with pytest.raises(ValueError), Verifier() as verifier:
        verifier.score(["a", "b"], ["a"], [None, None])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is bounded on Linux only")
def test_the_workers_memory_is_bounded(verifier):
    verifier.score([ASKS_MATH[0]], [ASKS_MATH[1]], [None])
    verifier._memo.clear()
    verifier.score([ASKS_MATH[0]], [ASKS_MATH[1]], [None])  # the worker runs now
    limits = Path(f"/proc/{verifier._workers[0]._process.pid}/limits").read_text()
    assert str(2048 * 2**20) in next(line for line in limits.splitlines() if "address space" in line)


def test_works_from_a_script_on_stdin_in_another_directory(tmp_path):
    (tmp_path / "sympy.py").write_text("raise SystemExit('the wrong sympy')")  # the user's directory must not shadow
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.remove('')\n"
        "from apo_lora.rewards.verifier import Verifier\n"
        "with Verifier() as v: print(v.score([r'\\boxed{x+1}'], ['1+x'], [None]), v.crashes)\n"
    )
    ran = subprocess.run([sys.executable, "-"], input=script, cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout == "[1.0] 0\n", ran.stderr
