"""A recipe's inputs: the one place that opens them, for training, the checks before it and evaluation.

A row of the first `limit` rows of its source survives, in this order,
  1. if it can be used: it has a problem, a gold answer that can be graded, and its images are where it says;
  2. if all of its images decode;
  3. if its prompt is within data.max_prompt_tokens (`Inputs.fitting`, which needs the model's processor).
The others are counted, with the reason. 1 and 2 need no heavy library, so that problems in the data show at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from apo_lora.data.examples import Example, Loaded, drop_long_prompts, drop_undecodable, load_examples
from apo_lora.data.items import refuse_mixture
from apo_lora.data.text import row_numbers
from apo_lora.errors import DataError
from apo_lora.recipe.schema import DataSection, Recipe


class SetSpec(NamedTuple):
    """A data set, as a recipe or a command line names it."""

    spec: str
    """As in `data.train`."""
    split: str
    limit: int | None


class Inputs(NamedTuple):
    train: Loaded | None
    """None where it was not asked for."""
    held_out: dict[str, Loaded]
    """By title."""

    @property
    def held_out_examples(self) -> dict[str, Sequence[Example]]:
        return {title: loaded.examples for title, loaded in self.held_out.items()}

    def fitting(self, processor: Any, data: DataSection) -> "Inputs":
        """Without the rows whose prompt is too long."""
        return Inputs(
            self.train and drop_long_prompts(self.train, processor, data),
            {title: drop_long_prompts(loaded, processor, data) for title, loaded in self.held_out.items()},
        )


def open_inputs(recipe: Recipe, *, train: bool = True, held_out: Mapping[str, SetSpec] | None = None) -> Inputs:
    """The rows that can be used and whose images decode.

    `train`: whether to open those to train on. `held_out`: the sets to open beside them; None is what training
    measures. Raises DataError for a source that cannot be read, or of which more than half is dropped.
    """

    def opened(rows: SetSpec) -> Loaded:
        loaded = load_examples(rows.spec, recipe.data, split=rows.split, limit=rows.limit, seed=recipe.train.seed)
        return drop_undecodable(loaded)

    data = recipe.data
    if held_out is None:
        held_out = held_out_sets(recipe) if recipe.train.evaluate else {}
    trained = opened(SetSpec(data.train, data.split, data.limit)) if train else None
    others = {title: opened(rows) for title, rows in held_out.items()}
    return Inputs(trained, {title: _compared(other, trained) for title, other in others.items()} if trained else others)


def _compared(held_out: Loaded, trained: Loaded) -> Loaded:
    """With a warning where its rows are trained on as well: what is measured on those is memory."""
    looks = {_look(example) for example in held_out.examples}
    known = {(look, _pictures(e)) for e in trained.examples if (look := _look(e)) in looks}
    both = [e.row for e in held_out.examples if (_look(e), _pictures(e)) in known]
    if not both:
        return held_out
    warning = (
        f"{held_out.source}: {len(both)} of {len(held_out.examples)} held-out rows are also in data.train "
        f"({row_numbers(both)}); set data.eval or data.eval_split to rows that are not trained on"
    )
    return replace(held_out, warnings=(*held_out.warnings, warning))


def _look(example: Example) -> tuple[Any, ...]:
    """What is cheap to compare of a question, however it is spaced, cased or answered. Without a picture, the choices
    may be all that tells two questions apart."""
    words = " ".join(example.problem.casefold().split())
    return words, tuple(image.size for image in example.images) or example.choices


def _pictures(example: Example) -> tuple[str, ...]:
    return tuple(image.digest() for image in example.images)


def held_out_sets(recipe: Recipe) -> dict[str, SetSpec]:
    """By title, as reports and records call them: those of data.eval and data.general that the recipe names."""
    data = recipe.data
    named = {"reasoning": data.eval, "general": data.general}
    return {title: SetSpec(spec, data.eval_split, data.eval_limit) for title, spec in named.items() if spec}


def require_trainable(inputs: Inputs, recipe: Recipe) -> None:
    """Raises DataError where the rows are fewer than one rollout samples, or only some of them have an image."""
    examples = inputs.train.examples
    if len(examples) < recipe.prompts_per_rollout:
        raise DataError(
            f"data.train: {len(examples)} usable rows, but a rollout needs {recipe.prompts_per_rollout}; "
            "lower grpo.prompts_per_step, or add data"
        )
    refuse_mixture(examples)
