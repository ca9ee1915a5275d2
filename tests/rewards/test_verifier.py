"""The verifier: same verdicts as the plain function, and a worker that may hang, die or grow without harm."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile_cases import HOSTILE
from reward_cases import RIGHT, WHOLE, WRONG

from apo_lora.errors import RewardError
from apo_lora.rewards.scores import accuracy_reward
from apo_lora.rewards.verifier import Verifier

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
    verifier = Verifier(seconds_per_item=seconds)
    verifier._command = [sys.executable, "-c", STUB]
    return verifier


def score(verifier, answers):
    return verifier.score([f"\\boxed{{{a}}}" for a in answers], ["1+x"] * len(answers), [None] * len(answers))


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as shared:
        yield shared


def test_same_verdicts_as_the_plain_function(verifier):
    rows = [(f"<think>so</think><answer>{a}</answer>", gold, choices) for a, gold, choices in RIGHT + WRONG]
    rows += [row[:3] for row in WHOLE]
    got = verifier.score(*(list(column) for column in zip(*rows, strict=True)))
    assert got == [accuracy_reward(*row) for row in rows]
    assert (verifier.timeouts, verifier.crashes) == (0, 0)


def test_hostile_completions_do_not_stop_the_others(verifier):
    wraps = ("<answer>%s</answer>", "\\boxed{%s}")
    completions = [wrap.replace("%s", text) for text in HOSTILE.values() for wrap in wraps]
    completions = [ASKS_MATH[0], *completions, "\\boxed{1+x+0}"]
    started = time.monotonic()
    got = verifier.score(completions, ["1+x"] * len(completions), [None] * len(completions))
    assert got == [1.0] + [0.0] * (len(completions) - 2) + [1.0]
    assert time.monotonic() - started < 20


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
        verifier._worker._process.wait()
        assert score(verifier, ["x+1"]) == [1.0]
        assert verifier.crashes == 1


def test_no_worker_is_started_before_it_is_needed_and_none_is_left():
    verifier = Verifier()
    assert verifier.score(["\\boxed{5}", "no"], ["5", "5"], [None, None]) == [1.0, 0.0]
    assert verifier._worker is None
    assert verifier.score([ASKS_MATH[0]], [ASKS_MATH[1]], [None]) == [1.0]
    process = verifier._worker._process
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
    limits = Path(f"/proc/{verifier._worker._process.pid}/limits").read_text()
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


def test_the_worker_is_quick_to_start_and_imports_no_torch():
    code = (
        "import sys, time; t = time.time(); import apo_lora.rewards.verifier as v; v.math_equal('x+1', '1+x');"
        "print('torch' in sys.modules, 'sympy' in sys.modules)"
    )
    started = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "False True\n"
    assert time.monotonic() - started < 10  # 1 second; the machine may be busy
