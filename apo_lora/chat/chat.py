"""One question, answered by the base and the tuned model: the same model with its adapter off and on."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from apo_lora.chat.columns import Column, SideBySide
from apo_lora.data.columns import Columns
from apo_lora.data.examples import Example, prompt_lengths
from apo_lora.data.formats import IMAGE_MARK, read_row
from apo_lora.data.images import image_refs
from apo_lora.data.text import BadRow
from apo_lora.errors import DataError, ModelError
from apo_lora.family.lookup import inner_model_of
from apo_lora.policy.loading import Policy, import_engine, reference_mode
from apo_lora.policy.shared_prompt.vision_features import tower_is_frozen
from apo_lora.policy.tuned import load_tuned, lora_config
from apo_lora.preflight.sample import sample_by_vllm
from apo_lora.recipe.schema import Recipe
from apo_lora.rewards.answers.text import final_answer
from apo_lora.rollout.sampling import GREEDY, Completion, sample, until_end
from apo_lora.rollout.vllm.sampler import ASK_AGAIN, VllmSampler
from apo_lora.rollout.vllm.server import servers_problem, serving
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
    engine: str = "transformers",
) -> tuple[Completion, Completion]:
    """Writes the answers of base and tuned model to `out` as they come, and returns them.

    The question is asked as in the recipe (system prompt, instruction, image size): `recipe`, else the run's.
    Greedy, or `sampled` as in training; at most `max_tokens`, or the recipe's max_completion_length. `engine`:
    transformers, or vllm for whole answers from a server, as the recipe's section rollout describes it. Raises
    DataError, ModelError in one line.
    """
    example, recipe = example_of(question, image), recipe_for(source, recipe)
    import_engine(recipe.model)
    recipe = _as_asked(source, recipe, max_tokens, engine)
    if problem := servers_problem(recipe):
        raise ModelError(problem)
    with serving(recipe, source.folder.parent, [example]) as servers:
        policy = load_tuned(source, recipe)
        if sampled:
            torch.seed()  # loading has seeded the fresh adapter, and every sample would be the same one
        if servers:
            _require_served(example, policy, recipe)
        sampler = VllmSampler(servers, policy, recipe, ASK_AGAIN) if servers else None
        answer = partial(_answer, policy, example, recipe, sampled, sampler)
        screen = SideBySide(out, tuple(shutil.get_terminal_size()) if out.isatty() else None)
        column = screen.first(f"base: {Path(source.base_name).name}")
        with reference_mode(policy.model):
            base = answer(None, column)
        column = screen.second(f"tuned: {source.name}")
        tuned = answer(0, column)
        screen.end(column)
    return base, tuned


def _as_asked(source: AdapterSource, recipe: Recipe, max_tokens: int | None, engine: str) -> Recipe:
    """With what a server reserves: tokens, and the rank of the adapter, which need not be the recipe's."""
    length = max_tokens or recipe.grpo.max_completion_length
    changes = {
        "grpo": recipe.grpo.model_copy(update={"max_completion_length": length}),
        "rollout": recipe.rollout.model_copy(update={"engine": engine}),
        "lora": recipe.lora.model_copy(update={"r": lora_config(source).r}),
    }
    return recipe.model_copy(update=changes)


def _require_served(example: Example, policy: Policy, recipe: Recipe) -> None:
    """Raises ModelError, DataError where vLLM could not answer as the policy does."""
    if not tower_is_frozen(inner_model_of(policy.model)):
        raise ModelError("--engine vllm: vLLM applies adapters only to language layers; leave it out")
    (length,), most = prompt_lengths([example], policy.processor, recipe.data), recipe.data.max_prompt_tokens
    if length > most:
        raise DataError(
            f"chat: the question has {length:,} tokens with its image, and data.max_prompt_tokens is {most:,}; use "
            "--engine transformers"
        )


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


def _answer(
    policy: Policy,
    example: Example,
    recipe: Recipe,
    sampled: bool,
    sampler: VllmSampler | None,
    step: int | None,
    column: Column,
) -> Completion:
    """The completion, written to the column: word by word as the policy makes it, or whole from vLLM's `sampler`, which
    wants to be told by `step` whether the adapter is on.
    """
    if sampler:
        changes = {} if sampled else {"temperature": 0.0}
        _, answer = sample_by_vllm(sampler, policy, [example], recipe, step, **changes)
        completion = until_end(answer.ids[0], sampler.options["stop_token_ids"], policy.processor)
        column.put(completion.text)
    else:
        streamer = _into(column, policy)
        completion = sample(policy, [example], recipe, streamer=streamer, **({} if sampled else GREEDY))[0]
    close(column, completion)
    return completion


def _into(column: Column, policy: Policy) -> Any:
    """A streamer of generate()."""
    from transformers import TextStreamer

    class IntoColumn(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            column.put(text)

    return IntoColumn(policy.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def close(column: Column, completion: Completion) -> None:
    """Writes the answer that a verifier finds in it, and its length."""
    answer = final_answer(completion.text)
    cut = ", cut off there (--max-tokens)" if completion.truncated else ""
    column.put(f"\n\nanswer  {answer.text if answer else 'none found'}\nlength  {completion.length} tokens{cut}")
