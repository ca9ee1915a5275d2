"""How much GPU memory a recipe needs: an analytic estimate from the model's sizes. No torch, no GPU, no weights.

Weights, adapters, optimizer state and KV cache are exact (test_memory_bytes.py counts them on real objects).
Activations are formulas with these assumptions:

- the longest prompt the recipe admits, one image of `data.max_pixels` in it, every completion at full length;
- TRL samples a whole rollout in one call: prompts per rollout x G sequences, whose prompts are prefilled at once, a
  shared one once, and its pixels are there once; between sampling and a pass that reads them, pixels are in the host's
  memory;
- Unsloth's key-value cache has its full length from the start, transformers' grows;
- attention never holds its scores (SDPA, flash), but a mask: a byte and a 16-bit value per pair;
- keys and values are never repeated for query heads; behind a shared prompt a layer copies the prompt's once per
  completion, and the vision tower, where it is frozen, runs only in the prefill;
- a layer is the eager one of transformers, in 16 bits, and one of them is live at a time, with two of its MLP matrices
  dequantised; Unsloth's fused kernels should need less. Its values per token, and a block's per patch, are the shape's
  layer_* and tower_*: fitted to transformers' own layers on a CPU (test_activation_memory.py);
- checkpointing keeps each layer's input: on the GPU (transformers) or in the host's memory, three at a time on the
  GPU (Unsloth);
- behind the peak of torch's allocator, CUDA's context and fragmentation take OVERHEAD.

On a simulated device, PyTorch's CUDA allocator peaked within 5 % of it (test_simulated_gpu.py). No figure here has been
compared with a measured GPU run yet.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from apo_lora.family.shape import Linear, ModelShape, nf4_bytes
from apo_lora.recipe.schema import Recipe

GiB = 2**30
OVERHEAD = int(0.75 * GiB)
"""CUDA context, libraries' workspaces, fragmentation: assumed."""

MOMENTS = ("prefill", "decode", "score", "train")
"""Sampling reads the prompts, then writes token by token; the reference is scored; forward and backward."""

LOGITS_BYTES = 128 * 2**20  # scoring.LOGITS_BYTES, which cannot be imported without torch; a test holds them together


class Row(NamedTuple):
    part: str
    moments: tuple[str, ...]
    bytes: int
    how: str


@dataclass(frozen=True)
class Load:
    """How many tokens pass through the model at once."""

    rollout: int
    """Sequences sampled in one call."""
    rows: int
    """Sequences per forward and backward pass."""
    prompts: int
    """Copies of a prompt per pass, at most: one per group in it, or one per sequence where none is shared."""
    prompt: int
    image: int
    completion: int

    @property
    def length(self) -> int:
        return self.prompt + self.completion

    @property
    def pass_tokens(self) -> int:
        return self.prompts * self.prompt + self.rows * self.completion


def prompts_per_pass(recipe: Recipe) -> int:
    """Groups that the fullest pass takes from: a pass may begin and end inside of one."""
    rows, group = recipe.grpo.completions_per_pass, recipe.grpo.num_generations
    if not recipe.grpo.shared_prompt:
        return rows
    starts = range(0, recipe.completions_per_step, rows)
    return max((start + rows - 1) // group - start // group + 1 for start in starts)


def load_of(recipe: Recipe, shape: ModelShape) -> Load:
    prompt, pixels = recipe.data.max_prompt_tokens, recipe.data.max_pixels
    image = pixels // shape.pixels_per_token if pixels else shape.max_image_tokens
    return Load(
        rollout=recipe.prompts_per_rollout * recipe.grpo.num_generations,
        rows=recipe.grpo.completions_per_pass,
        prompts=prompts_per_pass(recipe),
        prompt=prompt,
        image=min(image, prompt),
        completion=recipe.grpo.max_completion_length,
    )


@dataclass(frozen=True)
class Plan:
    load: Load
    rows: tuple[Row, ...]

    @property
    def peaks(self) -> dict[str, int]:
        """torch's allocator at its highest, by moment."""
        return {m: sum(row.bytes for row in self.rows if m in row.moments) for m in MOMENTS}

    @property
    def total(self) -> int:
        """Bytes of GPU memory needed."""
        return max(self.peaks.values()) + OVERHEAD


def plan(shape: ModelShape, recipe: Recipe) -> Plan:
    load = load_of(recipe, shape)
    rows = (
        *weight_rows(shape, recipe),
        *adapter_rows(shape, recipe),
        *(sampling_rows(shape, recipe, load) if recipe.rollout.engine == "transformers" else ()),
        *scoring_rows(shape, recipe, load),
        *training_rows(shape, recipe, load),
    )
    return Plan(load, tuple(row for row in rows if row.bytes))


def server_share(recipe: Recipe) -> float:
    """Of the GPU's memory, what a vLLM server on it takes at its start: for its own weights and cache."""
    rollout = recipe.rollout
    return rollout.vllm_gpu_memory_utilization if (rollout.engine, rollout.servers) == ("vllm", "auto") else 0.0


def server_needs(shape: ModelShape, recipe: Recipe) -> tuple[int, int]:
    """Bytes of a vLLM server's weights, and of the cache for one completion with its prompt. What else it holds is not
    known here: activations, and CUDA graphs.
    """
    held = recipe.model.model_copy(update={"load_in_4bit": recipe.server_in_4bit, "engine": "unsloth"})
    weights = sum(row.bytes for row in weight_rows(shape, recipe.model_copy(update={"model": held})))
    return weights, load_of(recipe, shape).length * kv_bytes_per_token(shape, value_bytes(recipe))


def uses_unsloth(recipe: Recipe) -> bool:
    """The plan is for a GPU, where `auto` is Unsloth."""
    return recipe.model.engine != "transformers"


def value_bytes(recipe: Recipe) -> int:
    return 4 if recipe.model.dtype == "float32" else 2


def wide_bytes(recipe: Recipe) -> int:
    """Of a value that is not quantised: PEFT's preparation for k-bit training lifts such weights to float32, and with
    them what passes between layers; Unsloth's leaves them in 16 bits."""
    return 4 if recipe.model.load_in_4bit and not uses_unsloth(recipe) else value_bytes(recipe)


# --- always held -----------------------------------------------------------------------------------------------------


def weight_rows(shape: ModelShape, recipe: Recipe) -> Iterator[Row]:
    count, linears = shape.parameters(), shape.language_linears()
    quantised, wide = recipe.model.load_in_4bit, wide_bytes(recipe)
    for part, group in (("attention", linears[:4]), ("mlp", linears[4:])):
        stored = sum(map(nf4_bytes, group)) if quantised else count[part] * value_bytes(recipe)
        bits = "NF4" if quantised else f"{8 * value_bytes(recipe)}-bit"
        yield Row(f"language {part}, {bits}", MOMENTS, stored, f"{count[part]:,} weights")
    for part, name in (
        ("embedding", "embedding = lm_head" if shape.tied else "embedding"),
        ("lm_head", "lm_head"),
        ("biases_and_norms", "biases, norms"),
    ):
        yield Row(f"{name}, {8 * wide}-bit", MOMENTS, count[part] * wide, f"{count[part]:,} weights")
    tower = count["vision_blocks"] + count["vision_ends"]
    yield Row(f"vision tower, {8 * wide}-bit", MOMENTS, tower * wide, f"{tower:,} weights")


def lora_tensors(shape: ModelShape, recipe: Recipe) -> list[tuple[int, int]]:
    """(values, copies) of every LoRA matrix."""
    adapted: list[Linear] = [x for x in shape.language_linears() if x.name in recipe.lora.target_modules]
    if recipe.lora.vision:
        adapted += shape.vision_linears()
    return [(recipe.lora.r * width, x.copies) for x in adapted for width in (x.inputs, x.outputs)]


def lora_parameters(shape: ModelShape, recipe: Recipe) -> int:
    return sum(values * copies for values, copies in lora_tensors(shape, recipe))


def adam_bytes(values: int, *, in_8bit: bool) -> int:
    """Two states of one tensor. bitsandbytes keeps small ones in float32, and a scale per 256 values of the others."""
    if not in_8bit or values < 4096:
        return 2 * 4 * values
    return 2 * (values + 4 * math.ceil(values / 256))


def adapter_rows(shape: ModelShape, recipe: Recipe) -> Iterator[Row]:
    parameters, in_8bit = lora_parameters(shape, recipe), recipe.train.optimizer != "adamw_torch"
    states = sum(adam_bytes(values, in_8bit=in_8bit) * copies for values, copies in lora_tensors(shape, recipe))
    yield Row("LoRA", MOMENTS, 4 * parameters, f"{parameters:,} float32 values, r = {recipe.lora.r}")
    yield Row("LoRA in 16 bits", MOMENTS, 2 * parameters, "for the rollout; autocast's copy of a pass")
    if recipe.grpo.reference == "start":
        yield Row("LoRA of the reference", MOMENTS, 4 * parameters, "a frozen copy of lora.start")
    yield Row("optimizer state", MOMENTS, states, f"two Adam states in {'8' if in_8bit else '32'} bits")
    # A micro-batch's own gradients come apart from those of the step so far (trainer.compute_loss).
    sets = 1 if recipe.completions_per_step == recipe.grpo.completions_per_pass else 2
    yield Row("LoRA gradients", ("train",), 4 * parameters * sets, f"float32, {sets} x; dropped between steps")


# --- sampling --------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(shape: ModelShape, bytes_per_value: int = 2) -> int:
    return 2 * shape.layers * shape.kv_width * bytes_per_value


def sampling_rows(shape: ModelShape, recipe: Recipe, load: Load) -> Iterator[Row]:
    size, rollout = value_bytes(recipe), load.rollout
    read = recipe.prompts_per_rollout if recipe.grpo.shared_prompt else rollout
    patches = load.image * shape.patches_per_token
    pixels = read * patches * shape.values_per_patch
    per_token = kv_bytes_per_token(shape, wide_bytes(recipe))
    both = ("prefill", "decode")
    yield Row("images of the rollout", both, 4 * pixels, f"{read} x {patches:,} patches in float32")
    if uses_unsloth(recipe) and size == 2:
        yield Row("images in 16 bits", both, 2 * pixels, "Unsloth's copy for generate()")
    held = load.length if uses_unsloth(recipe) else load.prompt
    yield Row("KV cache", ("prefill",), read * held * per_token, f"{read} x {held:,} tokens")
    yield Row("KV cache", ("decode",), rollout * load.length * per_token, f"{rollout} x {load.length:,} tokens")
    work = {
        "vision tower": read * patches * size * shape.tower_forward,
        "one layer": read * load.prompt * size * shape.layer_forward + dequantised(shape, recipe),
    }
    yield _largest("prefill", work)
    masks = (read + 2) * load.prompt * held
    yield Row("attention mask", ("prefill",), masks, f"{read} x {load.prompt:,} x {held:,} pairs; a row's in 16 bits")
    logits = rollout * shape.vocabulary * (size + 4 * 4)
    grown = 0 if uses_unsloth(recipe) else rollout * load.length * shape.kv_width * wide_bytes(recipe)
    yield Row("next-token logits", ("decode",), logits, "one in 16 bits, four in float32")
    yield Row("growth of the cache", ("decode",), grown, "one layer's keys are copied as it grows")


# --- scoring and training --------------------------------------------------------------------------------------------


def scoring_rows(shape: ModelShape, recipe: Recipe, load: Load) -> Iterator[Row]:
    size, patches = value_bytes(recipe), load.prompts * load.image * shape.patches_per_token
    if tower_runs_once(recipe):
        features = recipe.prompts_per_rollout * load.image * shape.feature_width * size
        how = f"{recipe.prompts_per_rollout} x {load.image:,} tokens, held until the next rollout"
        yield Row("image features", MOMENTS, features, how)
    else:
        how = f"patches of {load.prompts} x {load.image:,} tokens in float32"
        yield Row("images of a pass", ("score", "train"), patches * shape.values_per_patch * 4, how)
    if tower_runs_once(recipe):  # while sampling; where a server samples, here, prompt by prompt
        patches = load.image * shape.patches_per_token if recipe.rollout.engine == "vllm" else 0
    work = {
        "vision tower": patches * size * shape.tower_forward,
        "one layer": load.pass_tokens * size * shape.layer_forward
        + copied_keys(shape, recipe, load, 1)
        + dequantised(shape, recipe),
        "lm_head chunk": 5 * logits_chunk(shape, load) // 2,
    }
    yield _largest("score", work)


def training_rows(shape: ModelShape, recipe: Recipe, load: Load) -> Iterator[Row]:
    size, patches = value_bytes(recipe), load.prompts * load.image * shape.patches_per_token
    tokens, both = load.pass_tokens, ("score", "train")
    hidden = 2 * load.rows * load.completion * shape.hidden * size
    yield attention_mask(recipe, load)
    yield Row("completions' hidden states", both, hidden, "twice: of all positions, and without padding")
    yield kept_activations(shape, recipe, load, patches)
    chunk, in_loss = logits_chunk(shape, load), recipe.apo.entropy_coef > 0
    work = {
        "vision tower": patches * size * shape.tower_backward if tower_has_gradient(recipe) else 0,
        "one layer": tokens * size * shape.layer_backward
        + copied_keys(shape, recipe, load, load.rows)
        + dequantised(shape, recipe),
        "lm_head chunk": (6 if in_loss else 5) * chunk // 2,
    }
    yield _largest("train", work)


def attention_mask(recipe: Recipe, load: Load) -> Row:
    """Of whole padded rows; behind a shared prompt, one per group, of its longest completion."""
    if not recipe.grpo.shared_prompt:
        how = f"{load.rows} x {load.length:,}^2 pairs"
        return Row("attention mask", ("score", "train"), mask_bytes(load.rows, load.length), how)
    pairs = load.prompts * load.completion * load.length
    how = f"{load.prompts} x {load.completion:,} x {load.length:,} pairs"
    return Row("attention mask", ("score", "train"), value_bytes(recipe) * pairs, how)


def copied_keys(shape: ModelShape, recipe: Recipe, load: Load, completions: int) -> int:
    """The prompt's keys and values, copied to stand before those of each completion."""
    return 2 * completions * load.length * shape.kv_width * value_bytes(recipe) if recipe.grpo.shared_prompt else 0


def tower_runs_once(recipe: Recipe) -> bool:
    return recipe.grpo.shared_prompt and not recipe.lora.vision


def logits_chunk(shape: ModelShape, load: Load) -> int:
    """Bytes of one float32 tensor of logits in scoring.py."""
    rows = max(1, LOGITS_BYTES // (4 * shape.vocabulary))
    return 4 * shape.vocabulary * min(rows, load.rows * load.completion)


def tower_has_gradient(recipe: Recipe) -> bool:
    """Checkpointing makes the inputs require gradients, so backward runs through the tower even where it is frozen,
    unless its features are there before."""
    return recipe.lora.vision or (recipe.model.gradient_checkpointing and not tower_runs_once(recipe))


def kept_activations(shape: ModelShape, recipe: Recipe, load: Load, patches: int) -> Row:
    """What forward leaves for backward."""
    size, tokens = value_bytes(recipe), load.pass_tokens
    layer_input, block_input = tokens * shape.hidden * wide_bytes(recipe), patches * shape.vision_hidden * size
    if not recipe.model.gradient_checkpointing:
        vision = shape.vision_layers * patches * size * shape.tower_saved if recipe.lora.vision else 0
        layer = tokens * size * shape.layer_saved + copied_keys(shape, recipe, load, load.rows)
        kept = shape.layers * layer + vision
        return Row("activations, not checkpointed", ("train",), kept, f"{shape.layers} layers whole")
    if uses_unsloth(recipe):
        return Row("layer inputs, offloaded", ("train",), 3 * layer_input, "three on the GPU, the rest in RAM")
    blocks = shape.vision_layers if tower_has_gradient(recipe) else 0
    kept = shape.layers * layer_input + blocks * block_input
    return Row("layer inputs", ("train",), kept, f"of {shape.layers} layers and {blocks} vision blocks")


def dequantised(shape: ModelShape, recipe: Recipe) -> int:
    """Two MLP matrices in 16 bits."""
    return 2 * shape.hidden * shape.intermediate * value_bytes(recipe) if recipe.model.load_in_4bit else 0


def mask_bytes(rows: int, length: int) -> int:
    return rows * length**2 * (1 + 2)


def _largest(moment: str, work: dict[str, int]) -> Row:
    """Parts that are never live together: only the largest counts."""
    part = max(work, key=work.__getitem__)
    return Row(f"working memory: {part}", (moment,), work[part], f"largest of {', '.join(work)}")


# --- what fits -------------------------------------------------------------------------------------------------------


def with_rollout(recipe: Recipe, *, prompts: int, generations: int, completion: int) -> Recipe:
    """The recipe with one completion per pass and another rollout."""
    changes = {
        "prompts_per_step": prompts,
        "prompts_per_rollout": None,
        "num_generations": generations,
        "completions_per_pass": 1,
        "max_completion_length": completion,
    }
    return recipe.model_copy(update={"grpo": recipe.grpo.model_copy(update=changes)})


def largest_group(shape: ModelShape, recipe: Recipe, gpu_bytes: int, *, prompts: int, completion: int) -> int:
    """The largest G, up to 64, that fits a GPU with this much memory; 0 if not even 2 fit."""
    fitting = 0
    for generations in range(2, 65):
        smaller = with_rollout(recipe, prompts=prompts, generations=generations, completion=completion)
        if plan(shape, smaller).total > gpu_bytes:
            break
        fitting = generations
    return fitting
