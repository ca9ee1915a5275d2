"""`apo-lora check-data` and `apo-lora check-rewards`: checks of the rows that training would see."""

from typing import Any

from apo_lora.data.examples import Loaded
from apo_lora.data.inputs import open_inputs
from apo_lora.data.report import report
from apo_lora.errors import printable
from apo_lora.recipe.schema import Recipe
from apo_lora.rewards.check import check_functions, table
from apo_lora.rewards.functions import verifier_of
from apo_lora.rewards.plugins import find_rewards


def check_data(recipe: Recipe) -> None:
    """Prints what the rows contain: answers, images, prompt lengths, and each dropped row. Raises UserError."""
    loaded, processor = _training_rows(recipe)
    print("\n".join(map(printable, report(loaded, recipe.data, processor))))


def check_rewards(recipe: Recipe) -> bool:
    """Prints how each row's gold answer and a wrong one are scored by each built-in reward of the recipe.

    True if all are as expected. Raises UserError.
    """
    find_rewards(recipe.rewards.functions)
    loaded, _ = _training_rows(recipe)
    rows = [(e.answers[0], list(e.choices) if e.choices else None) for e in loaded.examples]
    with verifier_of(recipe.rewards) as verifier:
        checks = check_functions(rows, recipe.rewards, verifier, recipe.grpo.max_completion_length)
    print("\n".join([*map(printable, loaded.lines()), *table(checks)]))
    return all(check.passed == check.checked for check in checks)


def _training_rows(recipe: Recipe) -> tuple[Loaded, Any]:
    """The rows, and the model's processor, which says how long their prompts are."""
    inputs = open_inputs(recipe, held_out={})
    # The heavy libraries come only now, so that problems in the data show at once.
    from apo_lora.policy.loading import load_processor

    processor = load_processor(recipe.model, recipe.data)
    return inputs.fitting(processor, recipe.data).train, processor
