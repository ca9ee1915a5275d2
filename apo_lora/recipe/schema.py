"""A recipe: everything that decides a run, in one frozen, strict tree. Defaults live here; shipped recipes are sparse.

Here is the schema and what may not be combined; recipe_file.py reads it from YAML.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


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
    """`boards` (the built-in task), a .json, .jsonl or .parquet file, a folder holding one, a Hugging Face id, or a
    benchmark's name (`apo-lora eval --help` lists them)."""
    eval: str | None = None
    """Held-out items, measured before and after training. Same forms as `train`."""
    general: str | None = None
    """Items of another skill, never trained on: measured before and after, to see what training made it forget."""
    benchmarks: tuple[str, ...] = ()
    """What `apo-lora eval` measures in place of `eval` and `general`, whole: mathvista, mathverse, mmk12, mmstar, mmmu,
    or anything that `train` takes."""
    split: str = "train"
    """Split of a Hugging Face id that `train` reads."""
    eval_split: str = "test"
    """Split of a Hugging Face id that `eval` and `general` read."""
    image_column: str | None = None
    """Column names, where they are not one of the usual ones (`apo-lora check-data` shows what was found)."""
    problem_column: str | None = None
    answer_column: str | None = None
    choices_column: str | None = None
    image_folder: str | None = None
    """Where image paths start, if not in the folder of the data file. None may lead out of it."""
    system_prompt: str | None = None
    """System message; none leaves it to the model's own chat template."""
    instruction: str | None = None
    """Text put after every problem, for instance in which format to answer."""
    max_pixels: Count | None = None
    """Larger images are shrunk to this many pixels, aspect ratio kept. One token is 28 x 28 of them in Qwen2.5-VL."""
    min_pixels: Count | None = None
    max_prompt_tokens: Count = 2048
    """Longer prompts (image tokens included) are dropped at load and counted, never truncated."""
    limit: Count | None = None
    """Use only the first so many rows of `train`."""
    eval_limit: Count = 192
    """Use only the first so many rows of `eval` and of `general`."""

    def without_columns(self) -> "DataSection":
        """The same for data whose columns are not the recipe's."""
        names = ("image_column", "problem_column", "answer_column", "choices_column")
        return self.model_copy(update=dict.fromkeys(names))


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
    shared_prompt: bool = True
    """Score completions of one prompt behind a single copy of it: faster, same result. Falls back where it cannot."""
    zero_variance_groups: Literal["keep", "skip", "resample"] = "keep"
    """Groups whose completions all earned the same: `keep` (as released), `skip` (no pass computes them, not their KL
    either), or `resample` (other prompts in their place, twice at most; what still has no variance is skipped)."""
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


class RolloutSection(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    """Who samples: the model's own generate(), or vLLM on the same GPU, through Unsloth and where it is installed."""
    vllm_gpu_memory_utilization: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """Fraction of the GPU's memory that vLLM may hold, the weights it shares with the trainer included."""


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
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    save_steps: Count = 50
    """Optimizer steps between checkpoints (a whole number of rollouts)."""
    save_minutes: Positive | None = None
    """Also save at the first rollout border after so many minutes without a checkpoint: for sessions that end."""
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
    mirror: tuple[str, ...] = ()
    """Second places of the run's record and last checkpoint: a folder (as of Google Drive), or `hub:ORG/NAME`."""


class Recipe(Section):
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection
    rewards: RewardsSection = RewardsSection()
    grpo: GrpoSection = GrpoSection()
    rollout: RolloutSection = RolloutSection()
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

    def total_steps(self, num_examples: int) -> int:
        """Optimizer steps of the run: max_steps, or whole rollouts for `epochs` passes over the examples."""
        rollouts = int(num_examples * self.train.epochs) // self.prompts_per_rollout
        return self.train.max_steps or max(1, rollouts) * self.steps_per_rollout

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


def differences(before: Recipe, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """`section.key` to its two values, where they differ."""
    old, new = before.model_dump(), after.model_dump()
    return {
        f"{section}.{key}": (old[section][key], value)
        for section, keys in new.items()
        for key, value in keys.items()
        if value != old[section][key]
    }


def combination_problems(recipe: Recipe, num_processes: int = 1) -> Iterator[str]:
    """Keys that are valid each but not together, or not over so many processes. Touches neither disk nor device."""
    grpo, apo, rewards = recipe.grpo, recipe.apo, recipe.rewards
    share, rest = divmod(recipe.completions_per_step, num_processes)
    if rest:
        yield (
            f"grpo.prompts_per_step: prompts_per_step x num_generations = {recipe.completions_per_step} completions "
            f"cannot be shared out evenly among {num_processes} processes; use a multiple of {num_processes}"
        )
    elif share % grpo.completions_per_pass:
        among = f" / {num_processes} processes" if num_processes > 1 else ""
        yield (
            f"grpo.completions_per_pass: {grpo.completions_per_pass} does not divide prompts_per_step x num_generations"
            f"{among} = {share}; use one of {_divisors(share)}"
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
    if grpo.zero_variance_groups == "resample" and num_processes > 1:
        yield "grpo.zero_variance_groups: resample works in one process, where it sees whole groups; use skip or keep"
    if apo.dads not in (None, "constant") and grpo.beta == 0:
        yield "apo.dads: shapes the KL, but grpo.beta is 0; set grpo.beta above 0 or apo.dads to null"
    if rewards.correct_by not in rewards.functions:
        yield f"rewards.correct_by: {rewards.correct_by!r} is not in rewards.functions {list(rewards.functions)}"
    if rewards.weights is not None and len(rewards.weights) != len(rewards.functions):
        yield (
            f"rewards.weights: {len(rewards.weights)} given for {len(rewards.functions)} functions; "
            "give one per function"
        )
    for place in recipe.output.mirror:
        if place.startswith("hub:") and not re.fullmatch(r"hub:[\w.-]+/[\w.-]+", place):
            yield f"output.mirror: {place!r} names no repository; write hub:ORG/NAME"
    if recipe.rollout.engine == "vllm":
        yield from _vllm_problems(recipe)
    if not recipe.lora.target_modules:
        yield "lora.target_modules: empty, so nothing would train; name layers, or leave the key out for all of them"
    for name in {"lm_head", "embed_tokens"} & set(recipe.lora.target_modules):
        yield f"lora.target_modules: {name} is tied to the model's other end, a merge would lose it; leave it out"
    if (recipe.data.min_pixels or 0) > (recipe.data.max_pixels or float("inf")):
        yield f"data.min_pixels: {recipe.data.min_pixels} is above data.max_pixels = {recipe.data.max_pixels}"


def _vllm_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.lora.vision:
        yield "lora.vision: vLLM applies adapters to language layers alone; use false, or rollout.engine=transformers"
    if recipe.model.engine == "transformers":
        yield "model.engine: rollout.engine=vllm works through Unsloth; use auto, or rollout.engine=transformers"
    if recipe.model.revision is not None:
        yield "model.revision: vLLM through Unsloth loads the default branch; leave it out, or give a local folder"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
