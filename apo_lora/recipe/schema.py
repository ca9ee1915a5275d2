"""A recipe: everything that decides a run, in one frozen, strict tree. Defaults live here; shipped recipes are sparse.

This is the schema; combinations.py has what is not allowed together, and files.py reads recipes from YAML.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from apo_lora.machine.paths import at_home


def _number_from_text(value: Any) -> Any:
    """PyYAML reads `1e-5` (no dot) as text; the typed recipe is where it becomes a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_number_from_text)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_several)]
"""One name, or a list of them."""
Place = Annotated[str, AfterValidator(at_home)]
"""A path, or a name of something that is not one; a leading ~ is the home folder."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelSection(Section):
    name: Place = "tiny"
    """`tiny` (the embedded CPU model), a Hugging Face id, or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; null is the default branch."""
    engine: Literal["auto", "unsloth", "transformers"] = "auto"
    """`auto` is Unsloth on a GPU, and transformers + PEFT without one."""
    load_in_4bit: bool = False
    """Load the base in NF4 through bitsandbytes: a quarter of the memory of 16-bit weights. Also works on a CPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` is bfloat16 if the GPU supports it natively, float16 on older GPUs, and float32 on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""


class LoraSection(Section):
    r: Count = 16
    """Rank of the LoRA update."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / r."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the language model that get an adapter, by the last part of their name."""
    vision: bool = False
    """Also adapt the linear layers of the vision tower."""
    start: Place | None = None
    """Adapter to train further: a run, a folder in PEFT's format, or a Hugging Face id; null starts from a fresh one.
    Rank, alpha, layers and, unless given, dropout are those of that adapter."""


class ColumnsSection(Section):
    image: Names | None = None
    problem: str | None = None
    answer: str | None = None
    choices: Names | None = None


class DataSection(Section):
    train: Place
    """`boards` (the built-in task), a .json, .jsonl or .parquet file, a folder with one, a Hugging Face id, or a
    benchmark's name (`apo-lora eval --help` lists them)."""
    eval: Place | None = None
    """Held-out items, evaluated before and after training. Accepts what `train` accepts."""
    general: Place | None = None
    """Items of another skill, evaluated before and after training to see what the model forgets. Never trained on."""
    benchmarks: tuple[Place, ...] = ()
    """What `apo-lora eval` evaluates, in full, instead of `eval` and `general`: mathvista, mathverse, mmk12, mmstar,
    mmmu, or anything that `train` accepts."""
    split: str = "train"
    """Split of the Hugging Face data set in `train`."""
    eval_split: str = "test"
    """Split of the Hugging Face data sets in `eval` and `general`."""
    columns: ColumnsSection = ColumnsSection()
    """Columns by name: `{image: ..., problem: ..., answer: ..., choices: ...}`. null recognises the usual names
    (`apo-lora check-data` shows what was found); a list takes several image or choice columns; `choices: none` asks
    open questions though the data offer choices."""
    answer_as: Literal["text", "label", "letter", "from_0", "from_1"] | None = None
    """What a gold answer says of a choice, where the data leave it open: its text, its own label, the letter or the
    number of its place. null finds out from all rows together."""
    image_folder: Place | None = None
    """Folder that image paths start from; null is the folder of the data file. Paths that lead out are rejected."""
    system_prompt: str | None = None
    """System message; null leaves it to the data row, or to the model's chat template."""
    instruction: str | None = None
    """Text added after every problem, for instance the answer format to use."""
    max_pixels: Count | None = None
    """Shrink larger images to this many pixels, keeping their shape; a token is 28 x 28 (Qwen3-VL: 32 x 32) pixels."""
    min_pixels: Count | None = None
    """Enlarge smaller images to this many pixels, keeping the aspect ratio."""
    max_prompt_tokens: Count = 2048
    """Longer prompts (image tokens included) are dropped and counted at load time, never truncated."""
    limit: Count | None = None
    """Use only this many rows of `train`, from the start; null uses all (of `boards`, 2048)."""
    eval_limit: Count = 192
    """Use only this many rows of `eval` and of `general`, from the start."""

    @model_validator(mode="before")
    @classmethod
    def _columns_by_older_names(cls, section: Any) -> Any:
        """`answer_column` and its like are read as `columns.answer`: recipes of earlier runs have them."""
        if not isinstance(section, dict) or not isinstance(section.get("columns", {}), dict):
            return section
        older = {name: f"{name}_column" for name in ColumnsSection.model_fields}
        named = {name: section[key] for name, key in older.items() if section.get(key) is not None}
        rest = {key: value for key, value in section.items() if key not in older.values()}
        return {**rest, "columns": {**named, **section.get("columns", {})}} if named else rest


BUILT_IN_REWARDS = {"accuracy": 1.0, "relaxed": 1.0, "iou": 1.0, "format": 0.5, "overlong": 0.0, "repetition": 0.0}
"""The rewards in the box, and the highest value of each."""


class RewardsSection(Section):
    functions: Annotated[tuple[Place, ...], BeforeValidator(_one_or_several)] = ("accuracy", "format")
    """Reward functions: `accuracy` (0 or 1), `relaxed` (the same with a tolerance for numbers), `iou` (overlap of
    boxes, 0 to 1), `format` (0 or 0.5), the penalties `overlong` and `repetition` (-1 to 0), or your own as
    `module:function` or `file.py:function`."""
    weights: tuple[Number, ...] | None = None
    """One weight per function; null weights each by 1."""
    correct_by: str = "accuracy"
    """The function that decides which completions are correct, for DADS and STCR."""
    correct_from: Positive = 1.0
    """Smallest value of that function that counts as correct; for `iou`, 0.5 is usual."""
    relaxed_tolerance: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    """How far from the gold number `relaxed` lets an answer be, relative to it: ChartQA's 5 %."""
    boxes: Literal["pixels", "thousandths"] = "pixels"
    """Unit of the boxes that `iou` compares, in the data as in completions: pixels of the image as the model sees it
    (Qwen2.5-VL), or 0 to 1000 (Qwen3-VL), where larger numbers are no box."""
    overlong_tokens: Count | None = None
    """Last tokens before grpo.max_completion_length, over which the penalty of `overlong` grows from 0 to -1; null is
    a fifth of them, as in DAPO."""
    repetition_ngram: Count = 3
    """Tokens in a row that `repetition` counts as repeated when they occur again."""
    seconds_per_item: Positive = 5.0
    """Time limit for verifying one completion; a completion that exceeds it earns 0, and the timeout is counted."""
    accept_unevaluated: bool = False
    """Accept arithmetic that is still to be done as a whole number: `10+2` for 12."""
    convert_units: bool = False
    """Accept the right quantity in another unit: 100 cm for 1 m, 1.5 hours for 90 min, radians for degrees."""

    def overlong_cache(self, max_tokens: int) -> int:
        """The tokens below `max_tokens` that `overlong` punishes."""
        return self.overlong_tokens or max(1, max_tokens // 5)


class GrpoSection(Section):
    num_generations: Annotated[int, Field(ge=2)] = 8
    """G: completions sampled per prompt."""
    prompts_per_step: Count = 8
    """Prompts per optimizer step."""
    prompts_per_rollout: Count | None = None
    """Prompts per rollout, a multiple of prompts_per_step; null is equal to it (fully on-policy)."""
    num_iterations: Count = 1
    """Number of times to train on each rollout."""
    completions_per_pass: Count = 8
    """Completions per forward and backward pass: trades memory for speed, with the same result."""
    shared_prompt: bool = True
    """Compute each prompt once for all of its completions: faster, with the same result. Turned off, with a message,
    for models that do not support it."""
    zero_variance_groups: Literal["keep", "skip", "resample"] = "keep"
    """What to do with groups whose completions all earned the same reward: `keep` them (as the released code does),
    `skip` them (their KL too), or `resample` other prompts instead (at most twice, then skip)."""
    max_completion_length: Count = 1024
    """Maximum length of a completion, in tokens; longer ones are cut and count as truncated."""
    mask_truncated_completions: bool = False
    """Leave truncated completions out of the loss."""
    temperature: Positive = 1.0
    """Sampling temperature; log-probabilities are computed at the same temperature."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1 samples from the whole vocabulary."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k most likely tokens; 0 samples from the whole vocabulary."""
    beta: NonNegative = 1e-3
    """Weight of the KL divergence to the reference."""
    reference: Literal["base", "start"] = "base"
    """What the KL divergence keeps the policy near: the frozen `base` without any adapter, or a frozen copy of the
    adapter in lora.start, where it is 0 at the `start`."""
    epsilon: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    """Clip range of the probability ratio. The ratio is 1, and nothing is clipped, where a rollout feeds one step."""
    epsilon_high: Positive | None = None
    """Upper clip range: DAPO's clip-higher, 0.28 there; null is equal to epsilon."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio of each `token` (as released), or of a whole `sequence` (GSPO, with normalization
    `sequences`)."""
    normalization: Literal["tokens", "sequences", "constant"] = "tokens"
    """Mean of the policy loss over `tokens` (as released, and DAPO), over `sequences` (GRPO), or over sequences x
    max_completion_length, a `constant` (Dr. GRPO). The KL is a mean over sequences under each."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the rewards' standard deviation in their `group` (as released), in the whole rollout
    (`batch`, Lite PPO), or not at all (`none`, Dr. GRPO)."""


class RolloutSection(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples completions: the model's own generate(), or a vLLM server that takes the adapter of every step.
    `apo-lora setup-vllm` makes its environment."""
    servers: Literal["auto"] | Annotated[tuple[str, ...], Field(min_length=1)] = "auto"
    """`auto` starts a vLLM server on this machine, one per process, and stops it with the run; or the URLs of servers
    that share the requests, and to which output.dir must be visible under the same path. Their key is VLLM_API_KEY."""
    vllm_gpu_memory_utilization: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """Fraction of the GPU's memory that the server may use: its own copy of the weights, and the cache."""
    quantization: Literal["auto", "bitsandbytes", "none"] = "auto"
    """How the server holds the base: `auto` is as it is trained, bitsandbytes for model.load_in_4bit."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the server on this machine's loopback; 0 is any free one."""
    server_seconds: Positive = 600.0
    """Longest wait for the server's start, and for one answer of it."""
    ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """1 samples the next rollout while this one trains, with the adapter that the training begins with: one rollout
    behind, which importance weights correct. With the vllm engine only."""
    importance_cap: Positive | None = 2.0
    """Largest importance weight of a token: where the sampler's log-probabilities are known, the policy term is
    weighted by the trainer's probability over the sampler's; null leaves it unweighted."""


class ApoSection(Section):
    dads: Literal["complement_exp", "exp_decay", "constant"] | None = None
    """Shape of the difficulty-adaptive KL weight of positive completions; `complement_exp` is the paper's, null
    is off."""
    stcr: Annotated[Number, Field(gt=1)] | None = None
    """Base of the factor on wrong completions that are longer than the correct ones; the released code uses 1.00001,
    null is off."""
    stcr_amplify_positive: bool = True
    """Also amplify positive advantages of long wrong completions, as released; false leaves them unchanged."""
    entropy_coef: NonNegative = 0.0
    """Weight of an entropy bonus in the loss."""


class TrainSection(Section):
    max_steps: Count | None = None
    """Optimizer steps of the run; null trains for `epochs`."""
    epochs: Positive = 1.0
    """Passes over the training prompts, if max_steps is null."""
    learning_rate: Positive = 1e-6
    lr_scheduler: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises from 0."""
    optimizer: Literal["auto", "adamw_torch", "adamw_8bit"] = "auto"
    """`auto` is 8-bit AdamW on a GPU and AdamW in PyTorch on a CPU."""
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the adapter, the order of prompts and sampling."""
    save_steps: Count = 50
    """Optimizer steps between checkpoints; must cover whole rollouts."""
    save_minutes: Positive | None = None
    """Also save after this many minutes without a checkpoint, at the end of a rollout; for sessions that may be cut."""
    keep_checkpoints: Count = 2
    """Number of complete checkpoints to keep; older ones are removed."""
    max_nonfinite_steps: Count = 3
    """Stop after this many optimizer steps in a row with a NaN or infinite gradient; each is skipped and counted."""
    preflight: bool = True
    """Before step 1, check images, reference and sampling, and that the largest example fits in memory."""
    evaluate: bool = True
    """Evaluate on `data.eval` and `data.general` before and after training."""
    eval_steps: Count | None = None
    """Optimizer steps between measurements of some items of `data.eval` during training; must cover whole rollouts;
    null measures before and after training only."""
    eval_items: Count = 64
    """Items of each of those measurements: the first of `data.eval`, with the same seed every time."""
    patience: Count | None = None
    """Stop after this many of those measurements in a row without a new best accuracy; null trains to the end."""


class OutputSection(Section):
    dir: Place = "runs/{recipe}"
    """Run directory; `{recipe}` is the recipe's name."""
    logging_steps: Count = 1
    """Optimizer steps between printed lines; metrics.jsonl records every step."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers to report to; each must be installed."""
    keep_best: bool = False
    """Keep the adapter that measured best during training in `adapter-best`, beside that of the last step."""
    show_completions: Count | None = None
    """Optimizer steps between views of one prompt's completions in the terminal; null shows none."""
    log_completions: bool = True
    """Record every completion with its rewards in completions.jsonl."""
    mirror: tuple[Place, ...] = ()
    """Where to copy the run's record and last checkpoint: folders (for instance on Google Drive) or `hub:ORG/NAME`."""


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
    def server_in_4bit(self) -> bool:
        """Whether a vLLM server holds the base in 4 bits."""
        wanted = self.rollout.quantization
        return wanted == "bitsandbytes" or (wanted == "auto" and self.model.load_in_4bit)

    @property
    def completions_per_step(self) -> int:
        return self.grpo.prompts_per_step * self.grpo.num_generations

    @property
    def method(self) -> str:
        """GRPO, GRPO + DADS, GRPO + STCR, or GRPO + DADS + STCR (which is APO)."""
        return " + ".join(["GRPO", *(["DADS"] if self.apo.dads else []), *(["STCR"] if self.apo.stcr else [])])

    def in_run_dir(self, path: Path) -> "Recipe":
        """The same recipe with its run directory spelled out."""
        return self.model_copy(update={"output": self.output.model_copy(update={"dir": str(path)})})

    def on_base(self, name: str) -> "Recipe":
        """The same recipe with another model.name."""
        return self.model_copy(update={"model": self.model.model_copy(update={"name": name})})

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
