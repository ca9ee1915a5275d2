"""The memory plan against real objects: parameters, NF4 tensors, LoRA, Adam states, a filled cache, an allocator."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from apo_lora.cli import main
from apo_lora.errors import ModelError
from apo_lora.memory.model_shape import PUBLISHED, Linear, find_shape, nf4_bytes, shape_from_config
from apo_lora.memory.plan import (
    LOGITS_BYTES,
    MOMENTS,
    OVERHEAD,
    GiB,
    adam_bytes,
    attention_mask,
    copied_keys,
    kv_bytes_per_token,
    largest_group,
    layer_backward,
    layer_forward,
    layer_saved,
    load_of,
    logits_chunk,
    lora_parameters,
    lora_tensors,
    plan,
    prompts_per_pass,
    tower_backward,
    tower_forward,
    tower_has_gradient,
    tower_saved,
    with_rollout,
)
from apo_lora.recipe import Recipe
from apo_lora.recipe_file import find_recipe, load_recipe

GPU_RECIPES = ("single_gpu", "colab_t4", "gpu_8gb")


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(find_recipe(name), overrides)


@pytest.fixture(scope="module")
def real_3b():
    """The real configuration on the meta device: every parameter, no memory."""
    from conftest import SHARED_DATA
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    folder = SHARED_DATA / "qwen2.5-vl-3b-processor"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))


GROUPS = {
    "attention": r"language_model.*_proj\.weight$(?<=[qkvo]_proj\.weight)",
    "mlp": r"language_model.*(gate|up|down)_proj\.weight$",
    "embedding": r"embed_tokens",
    "lm_head": r"^lm_head",
    "vision_blocks": r"visual\.blocks",
    "vision_ends": r"visual\.(patch_embed|merger)",
    "biases_and_norms": r"language_model.*(bias|norm)",
}


def counted(model) -> dict[str, int]:
    count = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        group = next(group for group, pattern in GROUPS.items() if re.search(pattern, name))
        count[group] += parameter.numel()
    return count


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_published_sizes_are_those_of_the_real_config(shared_data):
    assert find_shape(str(shared_data / "qwen2.5-vl-3b-processor")) == PUBLISHED["3b"]


def test_parameters_of_the_real_3b(real_3b):
    assert PUBLISHED["3b"].parameters() == counted(real_3b)
    assert sum(PUBLISHED["3b"].parameters().values()) == 3_754_622_976


def test_parameters_of_the_7b():
    assert sum(PUBLISHED["7b"].parameters().values()) == 8_292_166_656  # published as 8.29 B


def test_parameters_of_tiny(tiny_policy):
    base = tiny_policy.model.unload()
    assert find_shape("tiny").parameters() == counted(base)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("unsloth/Qwen2.5-VL-3B-Instruct-bnb-4bit", "3b"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "3b"),
        ("unsloth/Qwen2.5-VL-7B-Instruct-unsloth-bnb-4bit", "7b"),
    ],
)
def test_published_models_need_no_network(name, size):
    assert find_shape(name) is PUBLISHED[size]


def test_both_layouts_of_a_config_give_the_same(real_3b):
    assert shape_from_config(real_3b.config.to_dict(), "3b") == PUBLISHED["3b"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "cannot|can be read"),
        ("[]", "no mapping"),
        ('{"model_type": "llama"}', "is a llama"),
        ('{"model_type": "qwen2_5_vl"}', "hidden_size: None"),
        ('{"model_type": "qwen2_5_vl", "hidden_size": -3}', "hidden_size: -3"),
    ],
)
def test_a_config_that_is_no_use_is_named(config, words, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=words) as caught:
        find_shape(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_model_without_network_is_one_line():
    with pytest.raises(ModelError, match="config.json") as caught:
        find_shape("nobody/Qwen2.5-VL-72B-Instruct")
    assert len(str(caught.value).splitlines()) == 1


# --- exact bytes -----------------------------------------------------------------------------------------------------


def stored(quant_state) -> int:
    nested = quant_state.state2
    tensors = (quant_state.absmax, quant_state.code, quant_state.offset, nested.absmax, nested.code)
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("size", [(96, 256), (96, 33), (2048, 256)])
def test_nf4_bytes_of_a_quantised_layer(size):
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(*size, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    weight = layer.weight
    assert weight.nbytes + stored(weight.quant_state) == nf4_bytes(Linear("any", *size, bias=False, copies=1))


def test_weights_of_tiny_in_4bit(load_tiny):
    """Through transformers, whose preparation lifts what is not quantised to float32."""
    policy = load_tiny(load_in_4bit=True, dtype="bfloat16")
    held = 0
    for name, parameter in policy.model.named_parameters():
        if "lora_" not in name:
            held += parameter.nbytes
            held += stored(parameter.quant_state) if hasattr(parameter, "quant_state") else 0
    overrides = ("model.load_in_4bit=true", "model.dtype=bfloat16", "model.engine=transformers")
    rows = plan(find_shape("tiny"), recipe_of("tiny_cpu", *overrides)).rows
    assert sum(row.bytes for row in rows if row.part.endswith(("NF4", "-bit"))) == held


@pytest.mark.parametrize("vision", [False, True])
def test_lora_of_tiny(load_tiny, vision):
    policy = load_tiny(lora={"vision": vision})
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    recipe = recipe_of("tiny_cpu", f"lora.vision={str(vision).lower()}")
    assert lora_parameters(find_shape("tiny"), recipe) == sum(p.numel() for p in trained)
    assert sum(copies for _, copies in lora_tensors(find_shape("tiny"), recipe)) == len(trained)


@pytest.mark.parametrize("recipe_name", ["single_gpu", "gpu_8gb"])
def test_lora_of_the_real_3b(real_3b, recipe_name):
    from peft import LoraConfig, get_peft_model

    from apo_lora.model import lora_targets

    recipe = recipe_of(recipe_name)
    peft_model = get_peft_model(real_3b, LoraConfig(r=recipe.lora.r, target_modules=lora_targets(recipe.lora)))
    trained = sum(p.numel() for name, p in peft_model.named_parameters() if "lora_" in name)
    peft_model.unload()
    assert lora_parameters(PUBLISHED["3b"], recipe) == trained


@pytest.mark.parametrize("shape", [(16, 255), (16, 256), (8, 2048), (3, 2001)])
def test_states_of_8bit_adam(shape):
    from bitsandbytes.optim import AdamW8bit

    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimizer = AdamW8bit([parameter])
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    states = {k: v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v) and not k.startswith("qmap")}
    assert adam_bytes(parameter.numel(), in_8bit=True) == sum(state.nbytes for state in states.values())


def test_a_filled_cache(tiny_policy, make_batch):
    batch = make_batch(tiny_policy)
    output = tiny_policy.model.generate(
        input_ids=batch["prompt_ids"],
        attention_mask=batch["prompt_mask"],
        **{key: batch[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids")},
        min_new_tokens=6,
        max_new_tokens=6,
        return_dict_in_generate=True,
    )
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    rows, length = output.sequences.shape
    # The last token is sampled, never read.
    assert held == rows * (length - 1) * kv_bytes_per_token(find_shape("tiny"), bytes_per_value=4)


def test_cache_of_the_3b():
    assert kv_bytes_per_token(PUBLISHED["3b"]) * 1024 == 36 * 2**20


# --- activations: formulas against the allocator of a CPU ------------------------------------------------------------


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


SMALL = replace(PUBLISHED["3b"], hidden=1024, intermediate=5504, heads=8, kv_heads=2)
"""Half the width of the 3B, in its proportions."""


@pytest.fixture(scope="module")
def text_layer():
    """run(tokens, mode): transformers' decoder layer with LoRA, bf16 under autocast, as the trainer runs it."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

    config = Qwen2_5_VLTextConfig(
        hidden_size=SMALL.hidden,
        intermediate_size=SMALL.intermediate,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=SMALL.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        attn_implementation="sdpa",
    )
    layer = Qwen2_5_VLDecoderLayer(config, 0).bfloat16().requires_grad_(False)
    targets = [linear.name for linear in SMALL.language_linears()]
    layer = inject_adapter_in_model(LoraConfig(r=16, target_modules=targets), layer).train()
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def prepare(tokens, mode):
        hidden = torch.randn(1, tokens, SMALL.hidden).bfloat16().requires_grad_(mode != "forward")
        rotation = (torch.randn(1, tokens, SMALL.hidden // SMALL.heads).bfloat16(),) * 2
        return lambda: _pass(lambda: layer(hidden, position_embeddings=rotation), mode, [layer, hidden])

    return prepare


@pytest.fixture(scope="module")
def vision_block():
    """run(patches, mode): transformers' vision block, frozen, in windows of 64 patches."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionBlock

    config = Qwen2_5_VLVisionConfig(
        hidden_size=SMALL.vision_hidden, intermediate_size=SMALL.vision_intermediate, num_heads=16
    )
    config._attn_implementation = "sdpa"
    block = Qwen2_5_VLVisionBlock(config).bfloat16().requires_grad_(False).train()

    def prepare(patches, mode):
        hidden = torch.randn(patches, SMALL.vision_hidden).bfloat16().requires_grad_(mode != "forward")
        rotation = (torch.randn(patches, SMALL.vision_hidden // 16),) * 2
        windows = torch.arange(0, patches + 1, 64, dtype=torch.int32)
        return lambda: _pass(lambda: block(hidden, cu_seqlens=windows, position_embeddings=rotation), mode, [hidden])

    return prepare


def _pass(forward, mode, with_gradients):
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(mode != "forward"):
        out = forward()
    if mode == "backward":
        out.backward(torch.ones_like(out))
        for owner in with_gradients:
            owner.grad = None
            if isinstance(owner, torch.nn.Module):
                owner.zero_grad(set_to_none=True)
    return out


@pytest.mark.parametrize(
    ("of", "mode", "formula"),
    [
        ("text_layer", "forward", layer_forward),
        ("text_layer", "saved", layer_saved),
        ("text_layer", "backward", layer_backward),
        ("vision_block", "forward", tower_forward),
        ("vision_block", "saved", tower_saved),
        ("vision_block", "backward", tower_backward),
    ],
)
def test_activations_of_one_layer(of, mode, formula, request):
    """Bytes per token, from two lengths, so that what does not grow with length drops out."""
    prepare = request.getfixturevalue(of)
    kept = []  # the output alive, so that its graph is
    measure = peak_of if mode != "saved" else lambda run: left_by(lambda: kept.append(run()))
    prepare(64, mode)()
    few, many = (measure(prepare(tokens, mode)) for tokens in (128, 320))
    assert formula(SMALL, 192, 2) == pytest.approx(many - few, rel=0.05)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_logits_of_the_training_pass(entropy_coef, chunks):
    """The head alone, at the real vocabulary: the peak does not grow with the number of chunks."""
    from apo_lora.scoring import LOGITS_BYTES as REAL_LOGITS_BYTES
    from apo_lora.scoring import _head_logps

    assert LOGITS_BYTES == REAL_LOGITS_BYTES
    shape, rows = PUBLISHED["3b"], 4  # rows of a chunk, in place of 441
    budget = 4 * shape.vocabulary * rows
    head = torch.nn.Linear(32, shape.vocabulary, bias=False).bfloat16().requires_grad_(False)
    hidden = torch.randn(rows * chunks, 32).bfloat16().requires_grad_()
    targets = torch.randint(0, shape.vocabulary, (rows * chunks,))

    def run():
        logps, entropies = _head_logps(hidden, head, targets, 1.0, budget, entropy_coef > 0)
        (logps.sum() - (entropy_coef * entropies.sum() if entropy_coef else 0)).backward()

    real_rows = LOGITS_BYTES // (4 * shape.vocabulary)
    recipe = recipe_of(
        "gpu_8gb", f"apo.entropy_coef={entropy_coef}", f"grpo.max_completion_length={real_rows * chunks}"
    )
    logits = 4 * shape.vocabulary * real_rows
    assert logits_chunk(shape, load_of(recipe, shape)) == logits
    expected = (5 if entropy_coef else 3) * logits
    run()
    assert expected / logits == pytest.approx(peak_of(run) / budget, rel=0.05)


# --- shared prompts --------------------------------------------------------------------------------------------------


def shared(*overrides):
    return recipe_of("single_gpu", "grpo.prompts_per_step=6", "grpo.num_generations=4", *overrides)


@pytest.mark.parametrize(("rows", "prompts"), [(1, 1), (2, 1), (4, 1), (3, 2), (6, 2), (8, 2), (12, 3), (24, 6)])
def test_prompts_of_the_fullest_pass(rows, prompts):
    recipe = shared(f"grpo.completions_per_pass={rows}")
    groups = [completion // 4 for completion in range(recipe.completions_per_step)]
    assert max(len(set(groups[start : start + rows])) for start in range(0, 24, rows)) == prompts
    assert prompts_per_pass(recipe) == prompts
    load = load_of(recipe, PUBLISHED["3b"])
    assert load.pass_tokens == prompts * load.prompt + rows * load.completion
    alone = load_of(shared(f"grpo.completions_per_pass={rows}", "grpo.shared_prompt=false"), PUBLISHED["3b"])
    assert alone.pass_tokens == rows * alone.length


def test_tokens_of_a_real_pass(tiny_policy, make_batch):
    """The row that scoring packs is as long as the plan says."""
    from apo_lora.shared_prompt.rows import pack

    batch = make_batch(tiny_policy, sizes=((84, 84),) * 4, lengths=(9,) * 4)
    batch["group"] = torch.zeros(4, dtype=torch.long)
    row = pack(tiny_policy.model.get_base_model().model, batch)
    prompt = int(batch["prompt_mask"][0].sum())
    recipe = shared("grpo.completions_per_pass=4", f"data.max_prompt_tokens={prompt}", "grpo.max_completion_length=9")
    assert len(row.input_ids_L) == load_of(recipe, find_shape("tiny")).pass_tokens


def test_what_attention_behind_a_shared_prompt_keeps():
    """Copied keys and values, a 16-bit mask per completion, and the output, as parts and as one."""
    from apo_lora.shared_prompt.attention import Families, attend, family

    recipe = shared(
        "grpo.completions_per_pass=4", "data.max_prompt_tokens=512", "data.max_pixels=null",
        "grpo.max_completion_length=128", "model.dtype=bfloat16",
    )  # fmt: skip
    load, heads, width = load_of(recipe, SMALL), SMALL.heads, SMALL.hidden // SMALL.heads
    query, key, value = (
        torch.randn(1, n, load.pass_tokens, width).bfloat16().requires_grad_() for n in (heads, SMALL.kv_heads, 2)
    )
    families, kept = Families(family(512, (128,) * 4)), []
    measured = left_by(lambda: kept.append(attend(query, key, value, families, None)))
    masks = attention_mask(recipe, load).bytes - families.members[0].visible.nbytes
    outputs = 2 * load.pass_tokens * SMALL.hidden * 2
    assert copied_keys(SMALL, recipe, load, 4) + masks + outputs == pytest.approx(measured, rel=0.05)


def test_sharing_prompts_needs_less_where_prompts_are_long():
    options = ("grpo.completions_per_pass=8", "grpo.max_completion_length=256")

    def above_what_is_held(moment, sharing):
        rows = plan(PUBLISHED["3b"], recipe_of("single_gpu", *options, f"grpo.shared_prompt={sharing}")).rows
        return sum(row.bytes for row in rows if moment in row.moments and row.moments != MOMENTS)

    assert above_what_is_held("score", "true") < 0.8 * above_what_is_held("score", "false")
    assert above_what_is_held("train", "true") < 0.5 * above_what_is_held("train", "false")


@pytest.mark.parametrize(
    ("overrides", "gradient"),
    [
        ((), False),
        (("grpo.shared_prompt=false",), True),
        (("lora.vision=true",), True),
        (("grpo.shared_prompt=false", "model.gradient_checkpointing=false"), False),
    ],
)
def test_when_the_tower_has_a_gradient(overrides, gradient):
    assert tower_has_gradient(recipe_of("single_gpu", *overrides)) is gradient


# --- the plan as a whole ---------------------------------------------------------------------------------------------


def test_the_rollout_is_what_trl_samples_at_once(tiny_policy, tmp_path):
    from apo_lora.trainer_config import config_values

    recipe = recipe_of("tiny_cpu", "grpo.prompts_per_rollout=16", "train.save_steps=10")
    values = config_values(recipe, tiny_policy, tmp_path, 1)
    at_once = values["per_device_train_batch_size"] * values["steps_per_generation"]
    assert load_of(recipe, find_shape("tiny")).rollout == at_once == 128


@pytest.mark.parametrize("name", GPU_RECIPES)
def test_peaks_are_sums_of_rows(name):
    made = plan(PUBLISHED["3b"], recipe_of(name))
    held = sum(row.bytes for row in made.rows if row.moments == MOMENTS)
    assert all(peak > held > 2.9 * GiB for peak in made.peaks.values())
    assert made.total == max(made.peaks.values()) + OVERHEAD


@pytest.mark.parametrize(
    ("override", "moments"),
    [
        ("grpo.num_generations=16", ("prefill", "decode")),
        ("grpo.max_completion_length=4096", ("decode", "score", "train")),
        ("grpo.completions_per_pass=8", ("score", "train")),
        ("data.max_pixels=1204224", ("prefill", "decode")),
        ("lora.r=64", MOMENTS),
        ("model.load_in_4bit=false", MOMENTS),
        ("model.engine=transformers", ("train",)),
        ("model.gradient_checkpointing=false", ("train",)),
        ("grpo.shared_prompt=false", ("prefill", "score", "train")),
        ("train.optimizer=adamw_torch", MOMENTS),
    ],
)
def test_more_needs_more(override, moments):
    before = plan(PUBLISHED["3b"], recipe_of("single_gpu")).peaks
    after = plan(PUBLISHED["3b"], recipe_of("single_gpu", override)).peaks
    assert all(after[moment] > before[moment] for moment in moments)


@pytest.mark.parametrize("completion", [256, 1024])
def test_the_largest_group_fits_and_one_more_does_not(completion):
    shape, recipe, card = PUBLISHED["3b"], recipe_of("gpu_8gb"), 7 * GiB
    largest = largest_group(shape, recipe, card, prompts=4, completion=completion)

    def total(generations):
        changed = with_rollout(recipe, prompts=4, generations=generations, completion=completion)
        return plan(shape, changed).total

    assert 2 <= largest < 64 and total(largest) <= card < total(largest + 1)
    assert largest_group(shape, recipe, 3 * GiB, prompts=4, completion=completion) == 0


def test_the_plan_needs_no_torch():
    code = "import sys, apo_lora.memory.table; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["single_gpu", "--vram", "24"], 0, "Fits a card of 24"),
        (["single_gpu", "--vram", "8"], 1, "Does not fit a card of 8"),
        (["gpu_8gb", "--vram", "8"], 0, "Fits a card of 8"),
        (["colab_t4", "--vram", "15"], 0, "Fits a card of 15"),
        (["tiny_cpu", "data.max_pixels=7056", "data.max_prompt_tokens=64", "--vram", "2"], 0, "Fits a card of 2"),
    ],
)
def test_plan_says_whether_it_fits(arguments, code, words, capsys):
    assert main(["plan", "--recipe", *arguments]) == code
    shown = capsys.readouterr().out
    assert words in shown and "not yet compared with a measured GPU run" in shown and "KV cache" in shown
    assert max(map(len, shown.splitlines())) <= 160


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without a GPU")
def test_plan_without_a_card_gives_no_verdict(capsys):
    assert main(["plan", "--recipe", "single_gpu"]) == 0
    shown = capsys.readouterr().out
    assert "a card of" not in shown and "Largest num_generations" in shown


@pytest.mark.parametrize("vram", ["0", "-8", "eight", "nan", "inf"])
def test_a_card_that_cannot_be_is_one_line(vram, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--recipe", "single_gpu", f"--vram={vram}"])
    assert stopped.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_folder_with_another_model_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["plan", "--recipe", "single_gpu", f"model.name={tmp_path}"]) == 2
    assert "is a llama" in capsys.readouterr().err
