"""What is exact in the memory plan: NF4 tensors, LoRA, Adam states, a filled cache, counted on real objects."""

import pytest
import torch

from apo_lora.family.lookup import find_shape
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.family.shape import Linear, nf4_bytes
from apo_lora.preflight.memory_plan import (
    adam_bytes,
    kv_bytes_per_token,
    lora_parameters,
    lora_tensors,
    plan,
)
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.recipe.schema import Recipe

GPU_RECIPES = ("single_gpu", "colab_t4", "gpu_8gb")


@pytest.fixture
def load_tiny(load_each):
    return load_each


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(find_recipe(name), overrides)


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
    rows = plan(find_shape(policy.base_name), recipe_of("tiny_cpu", *overrides)).rows
    assert sum(row.bytes for row in rows if row.part.endswith(("NF4", "-bit"))) == held


@pytest.mark.parametrize("vision", [False, True])
def test_lora_of_tiny(load_tiny, vision):
    policy = load_tiny(lora={"vision": vision})
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    recipe = recipe_of("tiny_cpu", f"lora.vision={str(vision).lower()}")
    shape = find_shape(policy.base_name)
    assert lora_parameters(shape, recipe) == sum(p.numel() for p in trained)
    assert sum(copies for _, copies in lora_tensors(shape, recipe)) == len(trained)


@pytest.mark.parametrize("recipe_name", ["single_gpu", "gpu_8gb"])
def test_lora_of_the_real_3b(real_3b, recipe_name):
    from peft import LoraConfig, get_peft_model

    recipe = recipe_of(recipe_name)
    targets = QWEN2_5_VL.lora_targets(recipe.lora.target_modules, vision=recipe.lora.vision)
    peft_model = get_peft_model(real_3b, LoraConfig(r=recipe.lora.r, target_modules=targets))
    trained = sum(p.numel() for name, p in peft_model.named_parameters() if "lora_" in name)
    peft_model.unload()
    assert lora_parameters(QWEN2_5_VL.published["3b"], recipe) == trained


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
    assert held == rows * (length - 1) * kv_bytes_per_token(find_shape(tiny_policy.base_name), bytes_per_value=4)


def test_cache_of_the_3b():
    assert kv_bytes_per_token(QWEN2_5_VL.published["3b"]) * 1024 == 36 * 2**20
