"""A recipe: everything that decides a run, in one frozen, strict tree. Defaults live here; shipped recipes are sparse.

A recipe is YAML (safe loader), found by path or by the name of a shipped one, then changed by `key=value` overrides.
Unknown keys, wrong types and impossible combinations are all reported at once, as one RecipeError.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from apo_lora.errors import RecipeError


def _number_from_text(value: Any) -> Any:
    """PyYAML reads `1e-5` (no dot) as text; the typed recipe is where it becomes a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number_from_text)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelSection(Section):
    name: str = "tiny"
    """`tiny` (the embedded CPU model), a Hugging Face id, or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; none is the default branch."""
    engine: Literal["auto", "unsloth", "transformers"] = "auto"
    """`auto` is Unsloth on a GPU and transformers + PEFT without one."""
    load_in_4bit: bool = False
    """NF4 weights through bitsandbytes: a quarter of the memory of 16-bit ones. Works on a CPU too."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` is bfloat16 where the GPU computes it natively, float16 on older GPUs, float32 on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: much less memory for about a third more time."""


class LoraSection(Section):
    r: Count = 16
    """Rank of the update."""
    alpha: Positive = 32.0
    """Scale of the update is alpha / r."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Layers of the language model that get an adapter, by the last part of their name."""
    vision: bool = False
    """Also adapt the vision tower's linear layers."""


class DataSection(Section):
    train: str
    """`boards` (the built-in task), a .json, .jsonl or .parquet file, a folder holding one, or a Hugging Face id."""
    eval: str | None = None
    """Held-out items, measured before and after training. Same forms as `train`."""
    general: str | None = None
    """Items of another skill, never trained on: measured before and after, to see what training made it forget."""
    split: str = "train"
    """Split of a Hugging Face id that `train` reads."""
    eval_split: str = "test"
    """Split of a Hugging Face id that `eval` and `general` read."""
    image_column: str | None = None
    """Column names, where they are not one of the usual ones (`apo-lora check-data` shows what was found)."""
    problem_column: str | None = None
    answer_column: str | None = None
    choices_column: str | None = None
    system_prompt: str | None = None
    """System message; none leaves it to the model's own chat template."""
    instruction: str | None = None
    """Text put after every problem, for instance how to dress the answer."""
    max_pixels: Count | None = None
    """Larger images are shrunk to this many pixels, aspect ratio kept. 28 x 28 pixels are one token."""
    min_pixels: Count | None = None
    max_prompt_tokens: Count = 2048
    """Longer prompts (image tokens included) are dropped at load and counted, never truncated."""
    limit: Count | None = None
    """Use only the first so many rows of `train`."""
    eval_limit: Count = 192
    """Use only the first so many rows of `eval` and of `general`."""


class RewardsSection(Section):
    functions: tuple[str, ...] = ("accuracy", "format")
    """`accuracy` (0 or 1), `format` (0 or 0.5), or your own as `module:function` or `file.py:function`."""
    weights: tuple[Number, ...] | None = None
    """One factor per function; none is 1 for each."""
    correct_by: str = "accuracy"
    """The function whose value 1 means 'correct', which is what DADS and STCR look at."""
    seconds_per_item: Positive = 5.0
    """Time limit for verifying one completion; over it, the completion earns 0 and the time-out is counted."""


class GrpoSection(Section):
    num_generations: Annotated[int, Field(ge=2)] = 8
    """G: completions sampled per prompt."""
    prompts_per_step: Count = 8
    """Prompts per optimizer step."""
    prompts_per_rollout: Count | None = None
    """Prompts sampled at once, a multiple of prompts_per_step; none is equal to it (fully on-policy)."""
    num_iterations: Count = 1
    """Times that each rollout is trained on."""
    completions_per_pass: Count = 8
    """Completions per forward and backward pass: memory against speed, the result is the same."""
    max_completion_length: Count = 1024
    """Longest completion, in tokens; longer ones are cut and count as truncated."""
    mask_truncated_completions: bool = False
    """Leave truncated completions out of the loss."""
    temperature: Positive = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 samples from the whole vocabulary."""
    beta: NonNegative = 1e-3
    """Weight of the KL to the frozen base."""
    epsilon: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    """Clip range of the probability ratio."""


class ApoSection(Section):
    dads: Literal["complement_exp", "exp_decay", "constant"] | None = None
    """Shape of the difficulty-adaptive KL weight of positives; `complement_exp` is the paper's, none is off."""
    stcr: Annotated[Number, Field(gt=1)] | None = None
    """Base of the factor on wrong completions that are longer than the right ones; 1.00001 as released, none is off."""
    stcr_amplify_positive: bool = True
    """As released, STCR multiplies positive advantages of long wrong answers too; false leaves those alone."""
    entropy_coef: NonNegative = 0.0
    """Weight of an entropy bonus in the loss."""


class TrainSection(Section):
    max_steps: Count | None = None
    """Optimizer steps; none means `epochs` decides."""
    epochs: Positive = 1.0
    """Passes over the training prompts."""
    learning_rate: Positive = 1e-6
    lr_scheduler: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    optimizer: Literal["auto", "adamw_torch", "adamw_8bit"] = "auto"
    """`auto` is 8-bit Adam on a GPU and plain AdamW on a CPU."""
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    save_steps: Count = 50
    """Optimizer steps between checkpoints (a whole number of rollouts)."""
    keep_checkpoints: Count = 2
    """Older valid checkpoints are removed."""
    max_nonfinite_steps: Count = 3
    """Stop after so many optimizer steps in a row with a NaN or infinite gradient; each is skipped and counted."""
    preflight: bool = True
    """Before step 1, check image, reference and sampling, and find out whether the largest example fits."""
    evaluate: bool = True
    """Measure `data.eval` and `data.general` before and after."""


class OutputSection(Section):
    dir: str = "runs/{recipe}"
    """Run directory; `{recipe}` is the recipe's name."""
    logging_steps: Count = 1
    """Optimizer steps between lines on the screen; metrics.jsonl gets every step."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers, where installed."""
    log_completions: bool = True
    """Write every completion with its rewards to completions.jsonl."""


class Recipe(Section):
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection
    rewards: RewardsSection = RewardsSection()
    grpo: GrpoSection = GrpoSection()
    apo: ApoSection = ApoSection()
    train: TrainSection = TrainSection()
    output: OutputSection = OutputSection()

    @property
    def prompts_per_rollout(self) -> int:
        return self.grpo.prompts_per_rollout or self.grpo.prompts_per_step

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.prompts_per_rollout // self.grpo.prompts_per_step * self.grpo.num_iterations

    @property
    def completions_per_step(self) -> int:
        return self.grpo.prompts_per_step * self.grpo.num_generations

    @property
    def method(self) -> str:
        """In words: GRPO, GRPO + DADS, GRPO + STCR, or GRPO + DADS + STCR (which is APO)."""
        return " + ".join(["GRPO", *(["DADS"] if self.apo.dads else []), *(["STCR"] if self.apo.stcr else [])])

    def in_run_dir(self, path: Path) -> "Recipe":
        """The same recipe with its run directory spelled out."""
        return self.model_copy(update={"output": self.output.model_copy(update={"dir": str(path)})})

    def to_yaml(self) -> str:
        """The resolved recipe, every key with its value; load_recipe reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def combination_problems(recipe: Recipe) -> Iterator[str]:
    """Keys that are valid each but not together. Touches neither disk nor device."""
    grpo, apo, rewards = recipe.grpo, recipe.apo, recipe.rewards
    if recipe.completions_per_step % grpo.completions_per_pass:
        yield (
            f"grpo.completions_per_pass: {grpo.completions_per_pass} does not divide prompts_per_step x num_generations"
            f" = {recipe.completions_per_step}; use one of {_divisors(recipe.completions_per_step)}"
        )
    if recipe.prompts_per_rollout % grpo.prompts_per_step:
        yield (
            f"grpo.prompts_per_rollout: {grpo.prompts_per_rollout} is no multiple of grpo.prompts_per_step = "
            f"{grpo.prompts_per_step}"
        )
    elif recipe.train.save_steps % recipe.steps_per_rollout:
        yield (
            f"train.save_steps: {recipe.train.save_steps} is no multiple of the {recipe.steps_per_rollout} steps that "
            "one rollout feeds; a checkpoint inside a rollout could not be resumed exactly"
        )
    if apo.dads not in (None, "constant") and grpo.beta == 0:
        yield "apo.dads: shapes the KL, but grpo.beta is 0; set grpo.beta above 0 or apo.dads to null"
    if rewards.correct_by not in rewards.functions:
        yield f"rewards.correct_by: {rewards.correct_by!r} is not in rewards.functions {list(rewards.functions)}"
    if rewards.weights is not None and len(rewards.weights) != len(rewards.functions):
        yield (
            f"rewards.weights: {len(rewards.weights)} given for {len(rewards.functions)} functions; "
            "give one per function"
        )
    for name in {"lm_head", "embed_tokens"} & set(recipe.lora.target_modules):
        yield f"lora.target_modules: {name} is tied to the model's other end, a merge would lose it; leave it out"
    if (recipe.data.min_pixels or 0) > (recipe.data.max_pixels or float("inf")):
        yield f"data.min_pixels: {recipe.data.min_pixels} is above data.max_pixels = {recipe.data.max_pixels}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def describe_keys() -> Iterator[str]:
    """Every key with its default and meaning, section by section, for reading."""
    for section, field in Recipe.model_fields.items():
        yield f"{section}:"
        for key, info in field.annotation.model_fields.items():
            default = "required" if info.is_required() else _inline_yaml(info.default)
            yield f"  {key}: {default}" + (f"    # {' '.join(info.description.split())}" if info.description else "")


def _inline_yaml(value: Any) -> str:
    return yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True).split("\n")[0]


# --- loading ---------------------------------------------------------------------------------------------------------

# Recipes stand beside the package in a checkout, and inside it after an install from the wheel.
_SHIPPED_DIRS = (Path(__file__).parent.parent / "recipes", Path(__file__).parent / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """Name (without .yaml) to path."""
    folder = next((d for d in _SHIPPED_DIRS if (d / "tiny_cpu.yaml").is_file()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_recipe(name: str) -> Path:
    """A recipe by path, or by the name of a shipped one, with or without .yaml."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    stem = name.removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    raise RecipeError(
        f"recipe {name}: no such file, and no shipped recipe of that name{_did_you_mean(stem, shipped)}; "
        "`apo-lora recipes` lists them"
    )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `section.key=value` overrides. Raises RecipeError with every problem found."""
    path = Path(path)
    tree = _read_yaml(path)
    problems = [problem for text in overrides if (problem := _apply_override(tree, text))]
    return _validated(tree, path.name, problems)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}:{where} is not valid YAML ({reason})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)})")
    return tree


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Sets one `section.key=value` in the tree (the value read as YAML); returns the problem, if any."""
    key, equals, value = text.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        return f"override {text!r}: write it as section.key=value, for instance grpo.num_generations=4"
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return f"override {text!r}: the value is not valid YAML; quote it"
    if not isinstance(tree.get(section), dict):
        tree[section] = {}
    tree[section][name] = parsed
    return None


def _validated(tree: dict[str, Any], source: str, problems: list[str]) -> Recipe:
    # YAML has lists and no tuples; an empty section (`apo:`) reads as None and means "all defaults".
    tree = {name: {} if body is None and name in Recipe.model_fields else body for name, body in tree.items()}
    problems = list(problems)
    try:
        recipe = Recipe.model_validate(_lists_to_tuples(tree))
    except ValidationError as error:
        problems += [_one_line(detail) for detail in error.errors()]
        # Also look for impossible combinations among what is valid, so that one message holds everything.
        try:
            recipe = Recipe.model_validate(_lists_to_tuples(_without(tree, error)))
        except ValidationError:
            recipe = None
    problems += combination_problems(recipe) if recipe else ()
    if problems:
        raise RecipeError(*(f"{source}: {problem}" for problem in problems))
    return recipe


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _without(tree: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """The tree less the keys that the error complains of; a missing data.train gets a placeholder."""
    bad = {tuple(str(part) for part in detail["loc"][:2]) for detail in error.errors()}
    kept = {
        section: {key: value for key, value in body.items() if (section, str(key)) not in bad}
        for section, body in tree.items()
        if isinstance(body, dict) and section in Recipe.model_fields
    }
    return {**kept, "data": {"train": "-", **kept.get("data", {})}}


def _one_line(detail: Any) -> str:
    """A pydantic error as `section.key: what is wrong, with the remedy`."""
    loc = [str(part) for part in detail["loc"]]
    key, kind = ".".join(loc), detail["type"]
    if kind == "extra_forbidden":
        siblings = Recipe.model_fields if len(loc) == 1 else Recipe.model_fields[loc[0]].annotation.model_fields
        return f"{key}: unknown key{_did_you_mean(loc[-1], siblings, prefix='.'.join([*loc[:-1], '']))}"
    if kind == "missing":
        return f"{key}: missing; it has no default"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key}: a section is a mapping of keys, not {detail['input']!r}"
    return f"{key}: {detail['input']!r} is not valid ({detail['msg'][0].lower()}{detail['msg'][1:]})"


def _did_you_mean(word: str, known: Any, prefix: str = "") -> str:
    if near := difflib.get_close_matches(word, list(known), n=1, cutoff=0.5):
        return f"; did you mean {prefix}{near[0]}?"
    # A key put into the wrong section is the other common slip.
    homes = [section for section, field in Recipe.model_fields.items() if word in field.annotation.model_fields]
    return f"; did you mean {homes[0]}.{word}?" if homes else f"; valid here: {', '.join(known)}"
