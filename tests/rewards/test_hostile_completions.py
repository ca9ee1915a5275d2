"""Over 500 completions meant to do harm, through the reward functions that training calls.

None runs anything, none raises, none takes longer than its seconds, the worker's memory has an end; and where a
completion has a right reward, that is the one it gets.
"""

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hostile_cases import HOSTILE, Hostile, hostile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from apo_lora.recipe.schema import RewardsSection
from apo_lora.rewards.answers import match
from apo_lora.rewards.functions import reward_functions
from apo_lora.rewards.scores import gold_is_parsable, quick_verdict
from apo_lora.rewards.verifier import Verifier
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl

SECONDS = 3.0
FAMILIES = sorted({case.family for case in hostile("x")})

# What the audit hook of this process saw while it was switched on. A hook can never be taken out again.
WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "import", "exec")
seen: list[str] = []
is_watching = False


def _watch(event: str, arguments: tuple) -> None:
    if is_watching and event in WATCHED:
        seen.append(event)


sys.addaudithook(_watch)


@pytest.fixture(scope="module")
def verifier():
    with Verifier(seconds_per_item=SECONDS, workers=1) as verifier:
        verifier.score(["\\boxed{x+1}"], ["1+x"], [None])  # the worker is there before anything is timed or watched
        yield verifier


def rewards_in_training(cases: list[Hostile], verifier: Verifier, **section) -> list[list[float]]:
    """As TRL calls them: message lists, and every column of the data."""
    columns = {
        "prompts": [[{"role": "user", "content": "How many? <answer>42</answer>"}]] * len(cases),
        "completions": [[{"role": "assistant", "content": case.text}] for case in cases],
        "completion_ids": [[1]] * len(cases),
        "answer": [case.gold for case in cases],
        "choices": [case.choices for case in cases],
        "trainer_state": None,
    }
    return [function(**columns) for function in reward_functions(RewardsSection(**section), verifier)]


def test_they_are_many_and_different():
    cases = hostile("x")
    assert len(cases) >= 500 and len({Hostile(*case[:3], None, 0) for case in cases}) == len(cases)
    assert min(Counter(case.family for case in cases).values()) >= 10
    assert sum(case.reward for case in cases) >= 50  # a verifier that always says no would not pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_earns_what_it_should_runs_nothing_and_is_quick(family, verifier, tmp_path, monkeypatch):
    global is_watching
    monkeypatch.chdir(tmp_path)
    cases = [case for case in hostile(str(tmp_path / "sentinel")) if case.family == family]
    rewards_in_training(cases[:1], verifier)  # imports what is imported lazily
    given_up = verifier.timeouts + verifier.crashes
    seen.clear()
    is_watching = True
    started = time.monotonic()
    accuracy, form = rewards_in_training(cases, verifier)
    seconds = time.monotonic() - started
    is_watching = False
    wrong = [(case.text[:80], case.gold, got) for case, got in zip(cases, accuracy, strict=True) if got != case.reward]
    assert not wrong
    assert set(form) <= {0.0, 0.5}
    assert not list(tmp_path.iterdir())
    assert not seen or verifier.timeouts + verifier.crashes > given_up  # but for a new worker after a time-out
    # The guards leave nothing that hangs; measured: 2 s a family at most, 6 s beside other work. The limit: see below.
    assert seconds < 30 and verifier.timeouts + verifier.crashes <= given_up + 2


def test_no_single_completion_holds_up_the_training_process():
    """What is decided there, without a worker that could be killed: milliseconds, and a bound for a busy machine."""
    slowest = 0.0
    for case in hostile("x"):
        started = time.perf_counter()
        quick_verdict(case.text, case.gold, case.choices)
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 3  # measured: 0.13 s


# --- the walls, one by one, with those before them taken down --------------------------------------------------------


def with_worker(code: str, seconds: float = 1.0, memory_mb: int = 2048) -> Verifier:
    """A verifier whose worker runs `code` before it starts to answer; `v` is its module."""
    verifier = Verifier(seconds_per_item=seconds, memory_mb=memory_mb)
    imports = "import apo_lora.rewards.verifier as v, apo_lora.rewards.answers.mathematics as m"
    start = f"{imports}\n{code}\nv.main(['{memory_mb}'])"
    verifier._command = [sys.executable, "-P", "-c", start]
    return verifier


NO_GUARDS = "m.is_safe_math = lambda text: True"
EVALUATES = "equal = v.math_equal\nv.math_equal = lambda a, b: equal(a, b) if b == 'x+1' else eval(a) is None"


def test_what_eats_time_is_cut_off_and_the_others_are_scored(monkeypatch):
    """Without the guards, Math-Verify would work on these for hours."""
    monkeypatch.setattr(match, "is_safe_math", lambda text: True)
    towers = ["(x+1)^{9^{9^9}}", "(x+y+z+1)^{900}-(x+z+y+1)^{901}", "((x+1)^{10}+(y+1)^{10})^{10}"]
    with with_worker(NO_GUARDS) as verifier:
        started = time.monotonic()
        answers = ["\\boxed{1+x}", *(f"\\boxed{{{text}}}" for text in towers), "\\boxed{x + 1 + 0}"]
        got = verifier.score(answers, ["x+1"] * len(answers), None)
        assert got[0] == got[-1] == 1 and set(got[1:-1]) == {0}
        assert verifier.timeouts + verifier.crashes > 0
        assert time.monotonic() - started < 30


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is bounded on Linux only")
def test_what_eats_memory_meets_its_end():
    """A question that takes 1.5 GB in steps of 64 MB: it gets them under a limit of 4 GB, and not under one of 1 GB."""
    eats = "equal = v.math_equal\nv.math_equal = lambda a, b: equal(a, b) if '9' not in a else eat()\n"
    eats += "def eat(held=[]):\n    try:\n        while len(held) < 24: held.append(bytearray(2**26))\n"
    eats += "    except MemoryError: return bool(held)"
    ends = {}
    for memory_mb in (1024, 4096):
        with with_worker(eats, seconds=30.0, memory_mb=memory_mb) as verifier:
            ends[memory_mb] = verifier.score(["\\boxed{1+x}", "\\boxed{x+9}", "\\boxed{x+0+1}"], ["x+1"] * 3, None)
    assert ends == {1024: [1, 1, 1], 4096: [1, 0, 1]}


@pytest.mark.parametrize("payload", ["__import__('os').system('touch %s')", "open('%s', 'w')",
                                     "__import__('subprocess').run(['touch', '%s'])",
                                     "__import__('socket').socket()"])  # fmt: skip
def test_a_worker_that_did_evaluate_text_could_do_nothing_with_it(payload, tmp_path, monkeypatch):
    """With guards gone and eval in the place of the parser. The same worker without its wall does make the file."""
    monkeypatch.setattr(match, "is_safe_math", lambda text: True)
    monkeypatch.setattr(match, "strip_unit", lambda text: text)
    sentinel = tmp_path / "sentinel"
    question = match.MathQuestion(payload.replace("%s", str(sentinel)), "1+x")
    with with_worker(EVALUATES) as verifier:
        assert verifier._ask(question) == 0 and verifier.crashes == 1  # the refusal is an error, and ends the stand-in
        assert not sentinel.exists()
    with with_worker(EVALUATES + "\nv._refuse_side_effects = lambda: None", seconds=20) as verifier:
        assert verifier._ask(question) == 0 and verifier.crashes == 0
    assert sentinel.exists() == ("%s" in payload)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_worker_has_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("LANG_OF_TEST", "kept")
    with Verifier() as verifier:
        verifier.score(["\\boxed{1+x}"], ["x+1"], None)
        shown = Path(f"/proc/{verifier._workers[0]._process.pid}/environ").read_bytes()
    assert b"secret" not in shown and b"LANG_OF_TEST=kept" in shown


# --- fuzzing ---------------------------------------------------------------------------------------------------------

PIECES = (
    "<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "\\fbox{", "}", "{", "(", ")", "[", "]", "$", "$$",
    "\\(", "\\)", "\\frac{1}{2}", "\\frac", "\\sqrt{2}", "\\sqrt", "\\text{", "\\left(", "\\right)", "^", "^{2}", "_",
    "!", "|", "\\pi", "\\infty", "x", "y", "1", "42", "0", "-", "+", "*", "**", "/", "=", "<", ">", "\\le", "\\cup",
    "\\in", ",", ".", ":", ";", " ", "\n", "%", "1,000", "3.14", "1e5", "1/2", "half", "dozen", "cm", "km/h", "°",
    "yes", "no", "or", "and", "not", "is", "the answer is", "A", "B", "(B)", "B.", "option B", "a dog", "a cat",
    "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\sin", "\\log_2", "\u200b", "\u202e", "\x00", "½", "²", "４",
    "中", "\ud800", "<|im_end|>", "####", "**", "`", "'", '"', "__import__('os')",
)  # fmt: skip
completion = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=25).map("".join)
golds = st.sampled_from(
    ["42", "x+1", "\\frac{1}{2}", "B", "yes", "3:4", "(1, 2)", "y = 5", "\\{1, 2\\}", "a dog", "50%"]
)
choices = st.none() | st.just(["a cat", "a dog", "1/2", "x+1"])
fuzz = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@fuzz
@given(text=completion, gold=golds, choices=choices)
@example(text=HOSTILE["lone surrogates"], gold="42", choices=None)
def test_any_text_earns_0_or_1_twice_the_same_and_in_time(verifier, text, gold, choices):
    case = Hostile("fuzz", text, gold, choices)
    started = time.monotonic()
    first = rewards_in_training([case], verifier)
    assert time.monotonic() - started < SECONDS + 20  # one question, and perhaps the start of a worker after it
    verifier._memo.clear()
    assert rewards_in_training([case], verifier) == first
    assert first[0][0] in (0.0, 1.0) and first[1][0] in (0.0, 0.5)


@fuzz
@given(gold=completion, choices=st.none() | st.lists(completion, max_size=4), text=completion)
def test_any_gold_can_be_judged_against(gold, choices, text):
    """Gold comes from data, which others wrote: it is refused at load or graded, and never raises."""
    if gold_is_parsable(gold, choices):
        quick_verdict(text, gold, choices)
        quick_verdict(f"<answer>{gold}</answer>", gold, choices)


# --- a training step -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_steps_on_hostile_completions_end_and_are_recorded(tmp_path, monkeypatch):
    """The real command; only what the model would have sampled is replaced, token by token."""
    import trl

    from apo_lora.commands.main import main

    sentinel = tmp_path / "sentinel"
    texts = [case.text for case in hostile(str(sentinel)) if len(case.text) < 250][::3]
    assert len(texts) > 128
    given_out = iter(texts * 2)
    sample = trl.GRPOTrainer._generate_single_turn

    def hostile_completions(self, prompt_ids, *arguments, **options):
        sampled, logprobs = sample(self, prompt_ids, *arguments, **options)
        ids = [self._tokenizer(next(given_out).encode("utf-8", "replace").decode())["input_ids"] for _ in sampled]
        return [row[: self.max_completion_length] or own for row, own in zip(ids, sampled, strict=True)], logprobs

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", hostile_completions)
    run = RunDir(tmp_path / "run")
    options = ["train.max_steps=2", "grpo.max_completion_length=96", "train.evaluate=false", "train.preflight=false"]
    assert main(["train", "--recipe", "tiny_cpu.yaml", *options, f"output.dir={run.path}"]) == 0
    steps = list(read_jsonl(run.metrics))
    assert len(steps) == 2
    for step in steps:
        figures = [value for value in step.values() if isinstance(value, int | float)]
        assert len(figures) > 20 and all(math.isfinite(value) for value in figures)
        assert step["seconds_reward"] < 60
    rows = list(read_jsonl(run.completions))
    assert len(rows) == 128 and any("__import__" in row["completion"] for row in rows)
    assert json.dumps(rows) and not sentinel.exists()
