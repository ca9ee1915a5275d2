"""Sizes of models: against the real configuration and the published ones."""

import re

import pytest

from apo_lora.errors import ModelError
from apo_lora.family.lookup import find_shape, shape_from_config
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.family.qwen3_vl import QWEN3_VL

GROUPS = {
    "attention": r"language_model.*_proj\.weight$(?<=[qkvo]_proj\.weight)",
    "mlp": r"language_model.*(gate|up|down)_proj\.weight$",
    "embedding": r"embed_tokens",
    "lm_head": r"^lm_head",
    "vision_blocks": r"visual\.blocks",
    "vision_ends": r"visual\.(patch_embed|pos_embed|merger|deepstack_merger_list)",
    "biases_and_norms": r"language_model.*(bias|norm)",
}


def counted(model) -> dict[str, int]:
    count = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        group = next(group for group, pattern in GROUPS.items() if re.search(pattern, name))
        count[group] += parameter.numel()
    return count


def test_published_sizes_are_those_of_the_real_config(shared_data):
    assert find_shape(str(shared_data / "qwen2.5-vl-3b-processor")) == QWEN2_5_VL.published["3b"]


def test_parameters_of_the_real_3b(real_3b):
    assert QWEN2_5_VL.published["3b"].parameters() == counted(real_3b)
    assert sum(QWEN2_5_VL.published["3b"].parameters().values()) == 3_754_622_976


def test_parameters_of_the_7b():
    assert sum(QWEN2_5_VL.published["7b"].parameters().values()) == 8_292_166_656  # published as 8.29 B


def test_parameters_of_a_small_model(load_each):
    policy = load_each()
    assert find_shape(policy.base_name).parameters() == counted(policy.model.unload())


@pytest.mark.parametrize(("size", "published"), [("2b", 2_127_532_032), ("4b", 4_437_815_808)])
def test_parameters_of_qwen3_vl(size, published):
    assert sum(QWEN3_VL.published[size].parameters().values()) == published


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("unsloth/Qwen2.5-VL-3B-Instruct-bnb-4bit", QWEN2_5_VL.published["3b"]),
        ("Qwen/Qwen2.5-VL-3B-Instruct", QWEN2_5_VL.published["3b"]),
        ("unsloth/Qwen2.5-VL-7B-Instruct-unsloth-bnb-4bit", QWEN2_5_VL.published["7b"]),
        ("Qwen/Qwen3-VL-2B-Instruct", QWEN3_VL.published["2b"]),
        ("unsloth/Qwen3-VL-4B-Thinking-unsloth-bnb-4bit", QWEN3_VL.published["4b"]),
    ],
)
def test_published_models_need_no_network(name, shape):
    assert find_shape(name) is shape


def test_both_layouts_of_a_config_give_the_same(real_3b):
    assert shape_from_config(real_3b.config.to_dict(), "3b") == QWEN2_5_VL.published["3b"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "cannot|can be read"),
        ("[]", "must be a mapping"),
        ('{"model_type": "llama"}', "unsupported model type llama"),
        ('{"model_type": "qwen2_5_vl"}', "hidden_size: None"),
        ('{"model_type": "qwen2_5_vl", "hidden_size": -3}', "hidden_size: -3"),
        ('{"model_type": "qwen3_vl", "vision_config": []}', "hidden_size: None"),
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
