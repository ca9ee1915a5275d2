"""The work that is measured, the same for everybody: pictures, prompts, how long completions are, the reward.

Every prompt has exactly the length that the recipe admits, with a picture of exactly its largest size; a completion is
as long as it may be. So a measured peak is the recipe's, and peers read and write equal numbers of tokens.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from apo_lora.data.examples import load_examples, prompt_lengths
from apo_lora.family.lookup import find_shape
from apo_lora.policy.loading import load_processor
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.recipe.schema import Recipe
from benchmarks.gpu.measurements import Setting

REWARD = "benchmarks.gpu.work:alternating"

# What a recipe reads or writes beside its model and training data, which are replaced: the Hub may be out of reach.
OFFLINE = (
    "data.eval=null",
    "data.general=null",
    "data.benchmarks=[]",
    "output.report_to=[]",
    "output.mirror=[]",
)

# What a rehearsal changes in every recipe: sizes that a CPU gets through in seconds.
SMALLER = {
    "tiny": (
        "data.max_pixels=12544",
        "data.max_prompt_tokens=280",
        "grpo.max_completion_length=16",
        "rollout.quantization=none",
    ),
}


def alternating(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1, 0, 1, 0, ...: every group of completions is half right, whatever was sampled."""
    return [float(number % 2 == 0) for number in range(len(completions))]


def recipe_on_random_model(name: str, setting: Setting, run: str, *overrides: str) -> Recipe:
    """A shipped recipe on the random model, with problems of the largest size that it admits; it needs no network.

    `run` names its folder in the scratch folder.
    """
    problems = setting.folder / f"problems-{run}" / "problems.jsonl"
    given = (
        f"model.name={setting.model}",
        f"data.train={problems}",
        f"rewards.functions=[{REWARD}]",
        f"rewards.correct_by={REWARD}",
        f"output.dir={setting.folder / run}",
        "train.warmup_steps=0",
        *OFFLINE,
        *overrides,
        *SMALLER.get(setting.size, ()),
    )
    recipe = load_recipe(find_recipe(name), given)
    write_problems(problems, recipe)
    return recipe


def write_problems(path: Path, recipe: Recipe) -> None:
    """As many as one rollout takes, each exactly `data.max_prompt_tokens` long. A byte of text is a token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = find_shape(recipe.model.name)
    size = picture_size(recipe.data.max_pixels, shape.patch * shape.merge)
    rows = []
    for number in range(max(2, recipe.prompts_per_rollout)):
        name = f"{number}.png"
        Image.frombytes("RGB", size, random.Random(number).randbytes(3 * math.prod(size))).save(path.with_name(name))
        rows.append({"problem": f"How many circles are there in picture {number:03}?", "answer": "3", "image": name})
    _write_rows(path, rows)
    processor = load_processor(recipe.model, recipe.data)
    for row, length in zip(rows, _lengths(path, recipe, processor), strict=True):
        row["problem"] += "." * (recipe.data.max_prompt_tokens - length)
    _write_rows(path, rows)
    lengths = _lengths(path, recipe, processor)
    assert set(lengths) == {recipe.data.max_prompt_tokens}, f"prompts of {lengths} tokens"


def picture_size(pixels: int, token_side: int) -> tuple[int, int]:
    """Width and height of a picture of exactly so many pixels, in whole tokens, as square as that can be."""
    tokens = pixels // token_side**2
    height = max(side for side in range(1, math.isqrt(tokens) + 1) if tokens % side == 0)
    return token_side * (tokens // height), token_side * height


def full_length_only(trainer: Any) -> None:
    """Every completion of this trainer, whose ever it is, gets exactly the number of tokens that it may have."""
    if sampler := getattr(trainer, "sampler", None):
        whole = {"min_tokens": sampler.options["max_tokens"], "ignore_eos": True, "stop_token_ids": []}
        sampler.options |= whole
    trainer.generation_config.min_new_tokens = trainer.generation_config.max_new_tokens


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _lengths(path: Path, recipe: Recipe, processor: Any) -> list[int]:
    return prompt_lengths(load_examples(str(path), recipe.data, split="train").examples, processor, recipe.data)
