"""The memory plan's formulas for activations, against the allocator of a CPU."""

from dataclasses import replace

import pytest
import torch

from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.family.qwen3_vl import QWEN3_VL
from apo_lora.preflight.memory_plan import (
    LOGITS_BYTES,
    attention_mask,
    copied_keys,
    load_of,
    logits_chunk,
)
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.recipe.schema import Recipe


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(find_recipe(name), overrides)


def memory_events(run) -> list[int]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def peak_of(run) -> int:
    live = peak = 0
    for change in memory_events(run):
        live += change
        peak = max(peak, live)
    return peak


def left_by(run) -> int:
    return sum(memory_events(run))


SMALL = replace(QWEN2_5_VL.published["3b"], hidden=1024, intermediate=5504, heads=8, kv_heads=2)
"""Half the width of the 3B, in its proportions."""

SMALL_SHAPES = {
    "Qwen2_5_VL": SMALL,
    "Qwen3VL": replace(QWEN3_VL.published["4b"], hidden=1280, intermediate=4864, heads=16, kv_heads=4),
}
"""By the beginning of the names of transformers' classes."""
SECTIONS = {"Qwen2_5_VL": [16, 24, 24], "Qwen3VL": [24, 20, 20]}


@pytest.fixture(scope="module", params=SMALL_SHAPES)
def prefix(request):
    return request.param


@pytest.fixture(scope="module")
def text_layer(prefix):
    """run(tokens, mode): transformers' decoder layer with LoRA, bf16 under autocast, as the trainer runs it."""
    from peft import LoraConfig, inject_adapter_in_model

    shape = SMALL_SHAPES[prefix]
    config = class_of(prefix, "TextConfig")(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": SECTIONS[prefix]},
        attn_implementation="sdpa",
    )
    layer = class_of(prefix, "DecoderLayer", "TextDecoderLayer")(config, 0).bfloat16().requires_grad_(False)
    targets = [linear.name for linear in shape.language_linears()]
    layer = inject_adapter_in_model(LoraConfig(r=16, target_modules=targets), layer).train()
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def prepare(tokens, mode):
        hidden = torch.randn(1, tokens, shape.hidden).bfloat16().requires_grad_(mode != "forward")
        rotation = (torch.randn(1, tokens, shape.query_width // shape.heads).bfloat16(),) * 2
        return lambda: _pass(lambda: layer(hidden, position_embeddings=rotation), mode, [layer, hidden])

    return prepare


@pytest.fixture(scope="module")
def vision_block(prefix):
    """run(patches, mode): transformers' vision block, frozen, in windows of 64 patches."""
    shape = SMALL_SHAPES[prefix]
    config = class_of(prefix, "VisionConfig")(
        hidden_size=shape.vision_hidden, intermediate_size=shape.vision_intermediate, num_heads=16
    )
    config._attn_implementation = "sdpa"
    block = class_of(prefix, "VisionBlock")(config).bfloat16().requires_grad_(False).train()

    def prepare(patches, mode):
        hidden = torch.randn(patches, shape.vision_hidden).bfloat16().requires_grad_(mode != "forward")
        rotation = (torch.randn(patches, shape.vision_hidden // 16),) * 2
        windows = torch.arange(0, patches + 1, 64, dtype=torch.int32)
        return lambda: _pass(lambda: block(hidden, cu_seqlens=windows, position_embeddings=rotation), mode, [hidden])

    return prepare


def class_of(prefix, *names):
    """The first of transformers' classes that exists."""
    import importlib

    folder = {"Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}[prefix]
    modules = [
        importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}")
        for kind in ("configuration", "modeling")
    ]
    return next(getattr(m, prefix + name) for name in names for m in modules if hasattr(m, prefix + name))


def _pass(forward, mode, with_gradients):
    # Where a CPU has no bfloat16 arithmetic, oneDNN's products need room for float32 copies, which the forward pass's
    # low peak would show: without oneDNN, every CPU allocates the same.
    plain = torch.backends.mkldnn.flags(enabled=mode != "forward")
    with plain, torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(mode != "forward"):
        out = forward()
    if mode == "backward":
        out.backward(torch.ones_like(out))
        for owner in with_gradients:
            owner.grad = None
            if isinstance(owner, torch.nn.Module):
                owner.zero_grad(set_to_none=True)
    return out


@pytest.mark.parametrize(
    ("of", "mode", "values"),
    [
        ("text_layer", "forward", "layer_forward"),
        ("text_layer", "saved", "layer_saved"),
        ("text_layer", "backward", "layer_backward"),
        ("vision_block", "forward", "tower_forward"),
        ("vision_block", "saved", "tower_saved"),
        ("vision_block", "backward", "tower_backward"),
    ],
)
def test_activations_of_one_layer(prefix, of, mode, values, request):
    """Bytes per token, from two lengths, so that what does not grow with length drops out."""
    prepare = request.getfixturevalue(of)
    kept = []  # the output alive, so that its graph is
    measure = peak_of if mode != "saved" else lambda run: left_by(lambda: kept.append(run()))
    prepare(64, mode)()
    few, many = (measure(prepare(tokens, mode)) for tokens in (64, 128))
    assert 64 * 2 * getattr(SMALL_SHAPES[prefix], values) == pytest.approx(many - few, rel=0.05)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_logits_of_the_training_pass(entropy_coef, chunks):
    """The head alone, at the real vocabulary: the peak does not grow with the number of chunks."""
    from apo_lora.policy.scoring import LOGITS_BYTES as REAL_LOGITS_BYTES
    from apo_lora.policy.scoring import head_logps

    assert LOGITS_BYTES == REAL_LOGITS_BYTES
    shape, rows = QWEN2_5_VL.published["3b"], 4  # rows of a chunk, in place of 220
    budget = 4 * shape.vocabulary * rows
    head = torch.nn.Linear(32, shape.vocabulary, bias=False).bfloat16().requires_grad_(False)
    hidden = torch.randn(rows * chunks, 32).bfloat16().requires_grad_()
    targets = torch.randint(0, shape.vocabulary, (rows * chunks,))

    def run():
        logps, entropies = head_logps(hidden, head, targets, 1.0, budget, entropy_gradient=entropy_coef > 0)
        (logps.sum() - (entropy_coef * entropies.sum() if entropy_coef else 0)).backward()

    real_rows = LOGITS_BYTES // (4 * shape.vocabulary)
    recipe = recipe_of(
        "gpu_8gb", f"apo.entropy_coef={entropy_coef}", f"grpo.max_completion_length={real_rows * chunks}"
    )
    logits = 4 * shape.vocabulary * real_rows
    assert logits_chunk(shape, load_of(recipe, shape)) == logits
    expected = (3 if entropy_coef else 2.5) * logits
    run()
    assert expected / logits == pytest.approx(peak_of(run) / budget, rel=0.05)


def test_what_attention_behind_a_shared_prompt_keeps():
    """Copied keys and values, the mask, and the output, as parts and as one."""
    from apo_lora.policy.shared_prompt.attention import PromptGroup, PromptGroups, attend

    recipe = recipe_of(
        "single_gpu", "grpo.prompts_per_step=6", "grpo.num_generations=4", "grpo.completions_per_pass=4",
        "data.max_prompt_tokens=512", "data.max_pixels=null",
        "grpo.max_completion_length=128", "model.dtype=bfloat16",
    )  # fmt: skip
    load, heads, width = load_of(recipe, SMALL), SMALL.heads, SMALL.hidden // SMALL.heads
    query, key, value = (
        torch.randn(1, n, load.pass_tokens, width).bfloat16().requires_grad_() for n in (heads, SMALL.kv_heads, 2)
    )
    groups, kept = PromptGroups(PromptGroup(512, (128,) * 4)), []
    measured = left_by(lambda: kept.append(attend(query, key, value, groups, None)))
    masks = attention_mask(recipe, load).bytes
    outputs = 2 * load.pass_tokens * SMALL.hidden * 2
    assert copied_keys(SMALL, recipe, load, 4) + masks + outputs == pytest.approx(measured, rel=0.05)
