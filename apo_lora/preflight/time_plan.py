"""How long a step takes, modelled: what each phase launches, moves and computes, on four GPUs. Nobody has measured it.

A phase takes as long as the slowest of three: its kernel launches, one after the other; its bytes at the GPU's
bandwidth; its arithmetic at the GPU's peak. The counts are formulas, whose numbers were fitted to what the exact 3B did
on a simulated device (benchmarks/results/simulated-2026-11; test_simulated_gpu.py holds them together). Layers were not
compiled there: where Unsloth compiles them, fewer bytes are moved in scoring and training.
"""

from typing import NamedTuple

from apo_lora.family.shape import ModelShape, nf4_bytes
from apo_lora.preflight.memory_plan import kv_bytes_per_token, load_of, uses_unsloth, value_bytes
from apo_lora.recipe.schema import Recipe


class GPU(NamedTuple):
    name: str
    bandwidth: float
    """Bytes per second, published."""
    flops: float
    """Of dense 16-bit products with float32 sums per second, published."""
    launch: float
    """Seconds of the host per kernel, assumed: eager PyTorch under Python; a T4 is on a slower host."""


GPUS = (
    GPU("T4", 320e9, 65e12, 55e-6),
    GPU("RTX 3090", 936e9, 71e12, 20e-6),
    GPU("RTX 4090", 1008e9, 165e12, 20e-6),
    GPU("H100", 3350e9, 989e12, 20e-6),
)


class Work(NamedTuple):
    launches: float
    bytes: float
    flops: float

    def times(self, number: float) -> "Work":
        return Work(*(number * part for part in self))

    def seconds(self, gpu: GPU) -> float:
        return max(self.launches * gpu.launch, self.bytes / gpu.bandwidth, self.flops / gpu.flops)


def time_table(shape: ModelShape, recipe: Recipe) -> list[list[str]]:
    """Seconds of one optimizer step on each GPU, by phase and altogether, with a head."""
    work = step_work(shape, recipe)
    seconds = {phase: [done.seconds(gpu) for gpu in GPUS] for phase, done in work.items()}
    seconds["a step"] = list(map(sum, zip(*seconds.values(), strict=True)))
    return [["seconds", *(gpu.name for gpu in GPUS)]] + [
        [phase, *(f"{number:.1f}" for number in numbers)] for phase, numbers in seconds.items()
    ]


def step_work(shape: ModelShape, recipe: Recipe) -> dict[str, Work]:
    """Of one optimizer step with completions of full length, by phase; without sampling where vLLM does it."""
    load, rows = load_of(recipe, shape), recipe.grpo.completions_per_pass
    passes, rollouts = recipe.completions_per_step / rows, recipe.completions_per_step / load.rollout
    scored = passes * (1 if rollouts == 1 else 2)  # the old policy as well, where a rollout feeds several steps
    work = {"scoring": score_pass(shape, recipe).times(scored), "training": train_pass(shape, recipe).times(passes)}
    if recipe.rollout.engine != "transformers":
        return work
    decode = token(shape, recipe).times(load.completion * rollouts)
    return {"prefill": prefill(shape, recipe).times(rollouts), "decode": decode, **work}


def _weights(shape: ModelShape) -> int:
    return sum(linear.weights for linear in shape.language_linears())


def _dequantised(shape: ModelShape, recipe: Recipe, names: tuple[str, ...] = ()) -> float:
    """Bytes moved around products with the language model's weights, or those of `names`: where they are in 4 bits,
    they are read, written in 16, and read again."""
    weights = sum(linear.weights for linear in shape.language_linears() if not names or linear.name in names)
    return weights * (4.5 if recipe.model.load_in_4bit else value_bytes(recipe))


def _layers(shape: ModelShape, recipe: Recipe, tokens: int, moved: float, head_norms: float) -> Work:
    """Tokens through all layers at once, which move `moved` times what a layer holds at its peak, and `head_norms`
    times what has norms within heads; without launches."""
    values = moved * shape.layer_forward + head_norms * shape.head_norms
    layers = shape.layers * tokens * value_bytes(recipe) * values
    return Work(0, _dequantised(shape, recipe) + layers, 2 * _weights(shape) * tokens)


def prefill(shape: ModelShape, recipe: Recipe) -> Work:
    """The prompts of a rollout and their images; a prompt's cache is then copied for each of its completions."""
    load, size = load_of(recipe, shape), value_bytes(recipe)
    read = recipe.prompts_per_rollout if recipe.grpo.shared_prompt else load.rollout
    patches = read * load.image * shape.patches_per_token
    language = _layers(shape, recipe, read * load.prompt, 6.4, 31)
    tower = 8.2 * shape.vision_layers * patches * size * shape.tower_forward
    held = load.length if uses_unsloth(recipe) else load.prompt
    copied = 2 * load.rollout * held * kv_bytes_per_token(shape, size) if recipe.grpo.shared_prompt else 0
    in_tower = 2 * patches * sum(linear.weights for linear in shape.vision_linears())
    launches = 136 * shape.layers + shape.tower_launches(patches)
    return Work(launches, language.bytes + tower + copied, language.flops + in_tower)


def token(shape: ModelShape, recipe: Recipe) -> Work:
    """One token of every completion. Above 16 rows, bitsandbytes dequantises what is narrow for its 4-bit kernel."""
    load, linears = load_of(recipe, shape), shape.language_linears()
    held = load.length if uses_unsloth(recipe) else load.prompt + load.completion / 2
    cache = load.rollout * held * kv_bytes_per_token(shape, value_bytes(recipe))
    launches, head = (83 if shape.head_norms else 66) * shape.layers, shape.vocabulary * shape.hidden
    stored = sum(map(nf4_bytes, linears)) if recipe.model.load_in_4bit else value_bytes(recipe) * _weights(shape)
    if recipe.model.load_in_4bit and load.rollout > 16:
        narrow = tuple(linear.name for linear in linears if linear.name not in ("gate_proj", "up_proj"))
        stored += _dequantised(shape, recipe, narrow) * 4 / 4.5
        launches += 3 * len(narrow) * shape.layers
    activations = 256 * shape.vocabulary * load.rollout  # above all, logits in float32
    moved = stored + cache + value_bytes(recipe) * head + activations
    return Work(launches, moved, 2 * (_weights(shape) + head) * load.rollout)


def score_pass(shape: ModelShape, recipe: Recipe) -> Work:
    """The reference's pass: the layers without adapters, and the head."""
    load = load_of(recipe, shape)
    layers = _layers(shape, recipe, load.pass_tokens, 4.6, 31)
    logits = shape.vocabulary * load.rows * load.completion
    launches = shape.layers * ((92 if shape.head_norms else 72) + 3.2 * load.rows)
    return Work(launches, layers.bytes + 35 * logits, layers.flops + 2 * shape.hidden * logits)


def train_pass(shape: ModelShape, recipe: Recipe) -> Work:
    """Forward, forward once more where activations are not kept, and backward to the inputs; the head's forward and
    backward come together."""
    load = load_of(recipe, shape)
    times = 3 if recipe.model.gradient_checkpointing else 2
    layers = _layers(shape, recipe, load.pass_tokens, 7.9, 51).times(times)
    logits = shape.vocabulary * load.rows * load.completion
    launches = shape.layers * ((483 if shape.head_norms else 408) + 16 * load.rows)
    return Work(launches, layers.bytes + 82 * logits, layers.flops + 4 * shape.hidden * logits)
