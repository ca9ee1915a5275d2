"""The two built-in rewards: is the final answer correct (0 or 1), and is the format followed (0 or 0.5).

Cheap comparisons decide most completions in microseconds; only what they cannot decide is given to Math-Verify.
`accuracy_reward` does that in this process, behind guards; training uses `verifier.Verifier`, which does it in a
process that can be killed. Both give the same verdict.

Numbers are compared exactly; a long decimal (6 places or more) may differ by one part in a million, so 0.333333
is 1/3 but 3.14 is not pi, and 0.33 is not 1/3. "50%" is 0.5, and a missing percent sign or unit is forgiven; another
unit (30 m for 30 cm) is not. `Rules` widen this where a recipe asks for it.
"""

import re
from collections.abc import Sequence

from apo_lora.rewards.answers.gold import read_gold
from apo_lora.rewards.answers.match import MathQuestion, judge
from apo_lora.rewards.answers.mathematics import math_equal
from apo_lora.rewards.answers.same import STRICT, Rules
from apo_lora.rewards.answers.text import final_answer

FORMAT_REWARD = 0.5
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORMAT = re.compile(r"<think>\s*(?!</think>)\S.*</think>\s*<answer>\s*(?!</answer>)\S.*</answer>", re.DOTALL)


def accepted(answer: str | Sequence[str]) -> Sequence[str]:
    """The texts that are each right: one, or those of a list."""
    return (answer,) if isinstance(answer, str) else answer


def accuracy_reward(
    completion: str, answer: str | Sequence[str], choices: Sequence[str] | None = None, rules: Rules = STRICT
) -> float:
    """1.0 if the completion's final answer is the gold `answer`, else 0.0.

    `answer` may be a choice's letter or its text, and so may the completion's; of several answers, each is right. An
    empty choice is a letter that is not in use. Gold that `gold_is_parsable` rejects earns nothing, whatever the
    completion says.
    """
    if not isinstance(answer, str):
        return max(accuracy_reward(completion, one, choices, rules) for one in answer)
    verdict = quick_verdict(completion, answer, choices, rules)
    if isinstance(verdict, MathQuestion):
        verdict = math_equal(verdict.answer, verdict.gold)
    return 1.0 if verdict else 0.0


def quick_verdict(
    completion: str, answer: str, choices: Sequence[str] | None = None, rules: Rules = STRICT
) -> bool | MathQuestion:
    """The verdict as far as cheap comparison goes; a `MathQuestion` where it does not."""
    gold = read_gold(answer, tuple(choices or ()))
    found = final_answer(completion)
    if gold is None or found is None:
        return False
    return judge(found, gold, rules)


def format_reward(completion: str) -> float:
    """0.5 for `<think>...</think>` followed by one `<answer>...</answer>`, both filled, and nothing else."""
    if any(completion.count(tag) != 1 for tag in _TAGS):
        return 0.0
    return FORMAT_REWARD if _FORMAT.fullmatch(completion.strip()) else 0.0


def gold_is_parsable(answer: str | Sequence[str], choices: Sequence[str] | None = None) -> bool:
    """False for gold that no completion can match: empty, only punctuation, a letter or a text outside the choices."""
    if isinstance(answer, list | tuple):
        return any(gold_is_parsable(one, choices) for one in answer)
    return isinstance(answer, str) and read_gold(answer, tuple(choices or ())) is not None
