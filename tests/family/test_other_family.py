"""One more record is all that another family takes: loading, sampling, scoring, the plan and the data follow it."""

from dataclasses import replace

import pytest
import torch
from other_family import OTHER_VL, RENAMED_TOKENS, make_base

from apo_lora.data.columns import find_columns
from apo_lora.data.examples import load_examples
from apo_lora.data.formats import read_row
from apo_lora.data.images import image_refs
from apo_lora.data.text import BadRow
from apo_lora.errors import ModelError
from apo_lora.export.image_limits import image_token_limits
from apo_lora.family.lookup import FAMILIES, closest_family, family_of, family_of_base, find_shape
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.policy.loading import load_policy
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.shared_prompt.attention import obstacle
from apo_lora.policy.tuned import lora_config
from apo_lora.preflight.checks import check_shared_prompt, next_rung
from apo_lora.preflight.memory_plan import load_of
from apo_lora.recipe.schema import DataSection, LoraSection, ModelSection, Recipe
from apo_lora.rollout.sampling import generation_options
from apo_lora.run.adapter import find_adapter

DATA = DataSection(train="boards", max_pixels=64 * 1024)
RECIPE = Recipe(data=DATA, grpo={"max_completion_length": 8})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    make_base(folder)
    return str(folder)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(FAMILIES, OTHER_VL.model_type, OTHER_VL)


def load(base, *, vision=False, **model):
    return load_policy(ModelSection(name=base, **model), LoraSection(vision=vision), DATA, seed=0)


def trained(policy):
    return {name.partition(".lora_")[0] for name, p in policy.model.named_parameters() if p.requires_grad}


def test_without_its_record_the_names_of_another_family_find_nothing(base):
    with pytest.raises(ModelError, match="has no layer q_proj"):
        load(base)


def test_adapters_and_four_bits_go_where_the_record_says(base, registered):
    policy = load(base, vision=True, load_in_4bit=True)
    assert policy.family is OTHER_VL
    places = {name.removeprefix("base_model.model.model.").partition(".")[0] for name in trained(policy)}
    assert places == {"decoder", "eyes"}
    quantised = [name for name, module in policy.model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert quantised and all(".decoder." in name for name in quantised)
    assert all(".decoder." in name for name in trained(load(base)))


def test_its_vision_tokens_are_never_sampled(base, registered):
    policy = load(base)
    vocabulary = policy.processor.tokenizer.get_vocab()
    suppressed = generation_options(policy, RECIPE)["suppress_tokens"]
    assert {vocabulary[token] for token in RENAMED_TOKENS.values()} <= set(suppressed) and len(suppressed) == 5
    assert len(QWEN2_5_VL.vision_token_ids(policy.processor)) == 3


def test_a_shared_prompt_is_sampled_scored_and_differentiated_as_prompts_alone(base, registered, make_batch):
    policy = load(base)
    assert obstacle(policy.model) is None
    examples = load_examples("boards", DATA, split="train", limit=4).examples
    batch = make_batch(policy, sizes=((96, 64), (128, 96)), lengths=(7, 3))
    check, shares = check_shared_prompt(policy, batch, examples, RECIPE)
    assert shares and "LoRA gradients by" in check.found and "sampling with it" in check.found

    with torch.no_grad():
        alone, _ = token_logps(policy.model, batch)
        shared, _ = token_logps(policy.model, batch | {"group": torch.arange(2)})
        blank, _ = token_logps(policy.model, batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])})
    assert (blank - alone).abs().max() > 1e-3
    torch.testing.assert_close(shared, alone)


def test_the_plan_counts_its_tokens(base, registered):
    shape = find_shape(base)
    assert (shape.patch, shape.pixels_per_token, shape.layers) == (16, 1024, 4)
    assert load_of(RECIPE, shape).image == 64
    unlimited = RECIPE.model_copy(update={"data": DATA.model_copy(update={"max_pixels": None})})
    assert load_of(unlimited, shape).image == 1000
    assert find_shape("somebody/Other-VL-1B-Instruct") is OTHER_VL.published["1b"]


def test_image_limits_are_in_its_tokens(registered):
    assert image_token_limits(DATA, OTHER_VL) == {"--image-max-tokens": 64}
    one_per_pass = RECIPE.model_copy(update={"grpo": RECIPE.grpo.model_copy(update={"completions_per_pass": 1})})
    assert next_rung(one_per_pass, OTHER_VL).data.max_pixels is DATA.max_pixels  # 64 tokens are the least
    assert next_rung(one_per_pass, QWEN2_5_VL).data.max_pixels < DATA.max_pixels


def test_an_adapter_alone_has_the_layers_that_it_was_saved_with(base, registered, tmp_path):
    for vision in (True, False):
        load(base, vision=vision).model.save_pretrained(tmp_path / str(vision))
        layers = lora_config(find_adapter(tmp_path / str(vision))).target_modules
        assert "decoder" in layers and ("eyes" in layers) is vision


def test_an_older_name_of_a_layer_is_translated():
    now = "model.decoder.layers.0.mlp.up_proj"
    for name in (now, "model.layers.0.mlp.up_proj"):
        assert OTHER_VL.module_name(name) == now
    for name in ("model.eyes.blocks.0.attn.qkv", "eyes.blocks.0.attn.qkv"):
        assert OTHER_VL.module_name(name) == "model.eyes.blocks.0.attn.qkv"
    assert OTHER_VL.module_name("lm_head") == "lm_head"
    assert replace(OTHER_VL, language="").module_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"


def test_weights_have_one_name_whatever_the_prefix():
    for name in ("model.decoder.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"):
        assert OTHER_VL.weight_name(name) == "layers.0.mlp.up_proj"
    assert OTHER_VL.weight_name("model.eyes.blocks.0.attn.qkv") == "eyes.blocks.0.attn.qkv"


def test_data_keeps_to_every_family(monkeypatch):
    from data_sets import png

    row = {"problem": "What is in <|picture_start|>?", "answer": "4", "image": png("red", size=(300, 10))}
    columns = find_columns([row], DATA, "a set")
    read_row(row, columns)
    image_refs([row["image"]], folders=(), row=0)
    monkeypatch.setitem(FAMILIES, OTHER_VL.model_type, OTHER_VL)
    with pytest.raises(BadRow, match=r"the text contains <\|picture_start\|>"):
        read_row(row, columns)
    with pytest.raises(BadRow, match="aspect ratio allowed is 20:1"):
        image_refs([row["image"]], folders=(), row=0)


# --- which family ----------------------------------------------------------------------------------------------------


def test_a_model_its_inner_model_and_its_config_are_of_one_family(tiny_policy):
    base = tiny_policy.model.get_base_model()
    for asked in (tiny_policy.model, base, base.model, base.config, base.config.to_dict()):
        assert family_of(asked) is QWEN2_5_VL


def test_an_unknown_type_is_one_line_or_falls_back(tiny_policy):
    with pytest.raises(ModelError) as caught:
        family_of({"model_type": "llava"}, "some/model")
    supported = ", ".join(FAMILIES)
    assert str(caught.value) == f"model.name: some/model has the unsupported model type llava; supported: {supported}"
    tiny_policy.model.get_base_model().config.model_type = "llava"
    family = closest_family(tiny_policy.model)
    assert family.model_type == "llava" and not family.shares_prompts
    assert "not implemented for llava" in obstacle(tiny_policy.model)
    assert tiny_policy.never_sampled == QWEN2_5_VL.vision_token_ids(tiny_policy.processor)


def test_a_text_model_is_its_own_language_model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_hidden_layers=1, **sizes))
    family = closest_family(model)
    assert family.language_of(family.inner_of(model)) is model.model and not family.shares_prompts


def test_a_base_is_known_by_its_config_here_or_by_its_name(base, registered):
    assert family_of_base(base) is OTHER_VL and family_of_base("tiny") is QWEN2_5_VL
    assert family_of_base("somebody/other-vl-1b") is OTHER_VL
    assert family_of_base("unsloth/Qwen2.5-VL-3B-Instruct-bnb-4bit") is QWEN2_5_VL
    assert family_of_base("/on/another/machine") is QWEN2_5_VL  # says nothing


def test_a_base_in_the_hubs_cache_is_known_by_its_config(base, registered, tmp_path, monkeypatch):
    import shutil

    from huggingface_hub import constants

    assert family_of_base("somebody/model") is QWEN2_5_VL
    repository = tmp_path / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert family_of_base("somebody/model") is OTHER_VL
