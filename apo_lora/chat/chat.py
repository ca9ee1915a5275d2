"""One question, answered by the base and the tuned model: the same model with its adapter off and on."""

import os
import shutil
from pathlib import Path
from typing import Any, TextIO

import torch

from apo_lora.chat.columns import Column, SideBySide
from apo_lora.data.columns import Columns
from apo_lora.data.examples import Example
from apo_lora.data.formats import IMAGE_MARK, read_row
from apo_lora.data.images import image_refs
from apo_lora.data.text import BadRow
from apo_lora.errors import DataError
from apo_lora.policy.loading import Policy, reference_mode
from apo_lora.policy.tuned import load_tuned
from apo_lora.recipe.schema import Recipe
from apo_lora.rewards.answers.text import final_answer
from apo_lora.rollout.sampling import GREEDY, Completion, sample
from apo_lora.run.adapter import AdapterSource, recipe_for


def chat(
    source: AdapterSource,
    question: str,
    out: TextIO,
    *,
    image: str | None = None,
    sampled: bool = False,
    max_tokens: int | None = None,
    recipe: Recipe | None = None,
) -> tuple[Completion, Completion]:
    """Writes the answers of base and tuned model to `out` as they come, and returns them.

    The question is asked as in the recipe (system prompt, instruction, image size): `recipe`, else the run's.
    Greedy, or `sampled` as in training; at most `max_tokens`, or the recipe's max_completion_length. Raises DataError,
    ModelError in one line.
    """
    example, recipe = example_of(question, image), recipe_for(source, recipe)
    policy = load_tuned(source, recipe)
    if sampled:
        torch.seed()  # loading has seeded the fresh adapter, and every sample would be the same one
    changes = ({} if sampled else GREEDY) | ({"max_new_tokens": max_tokens} if max_tokens else {})

    screen = SideBySide(out, tuple(shutil.get_terminal_size()) if out.isatty() else None)
    column = screen.first(f"base: {Path(source.base_name).name}")
    with reference_mode(policy.model):
        base = _answer(policy, example, recipe, changes, column)
    column = screen.second(f"tuned: {source.name}")
    tuned = _answer(policy, example, recipe, changes, column)
    screen.end(column)
    return base, tuned


def example_of(question: str, image: str | None) -> Example:
    """Under the rules for a row of data: no reserved token, an image that can be read."""
    # A row must have a gold answer; this one is never used.
    row = {"problem": question, "answer": "0", "image": image and os.path.realpath(Path(image).expanduser())}
    columns = Columns(problem="problem", answer="answer", image=("image",))
    try:
        fields = read_row(row, columns)
        images = image_refs(fields.images, folders=[Path(row["image"] or ".").parent], row=1)
        if fields.problem.count(IMAGE_MARK) > len(images):
            raise BadRow("image missing", f"the question contains {IMAGE_MARK}; add --image FILE")
    except BadRow as error:
        raise DataError(f"chat: {error}") from None
    return Example(1, fields.problem, row["answer"], None, images)


def _answer(policy: Policy, example: Example, recipe: Recipe, changes: dict[str, Any], column: Column) -> Completion:
    """The completion, written to the column word by word."""
    from transformers import TextStreamer

    class IntoColumn(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            column.put(text)

    streamer = IntoColumn(policy.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    completion = sample(policy, [example], recipe, streamer=streamer, **changes)[0]
    close(column, completion)
    return completion


def close(column: Column, completion: Completion) -> None:
    """Writes the answer that a verifier finds in it, and its length."""
    answer = final_answer(completion.text)
    cut = ", cut off there (--max-tokens)" if completion.truncated else ""
    column.put(f"\n\nanswer  {answer.text if answer else 'none found'}\nlength  {completion.length} tokens{cut}")
