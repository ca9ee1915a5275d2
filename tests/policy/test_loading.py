"""Loading a policy: choices of engine and dtype, adapters where they belong, NF4, and refusals in one line."""

import pytest
import torch

from apo_lora.errors import ModelError
from apo_lora.policy.loading import choose_dtype, choose_engine, is_4bit, load_processor, needs_gpu
from apo_lora.policy.scoring import token_logps
from apo_lora.recipe.schema import DataSection, ModelSection


@pytest.mark.parametrize(
    ("requested", "has_gpu", "expected"),
    [
        ("auto", True, "unsloth"),
        ("auto", False, "transformers"),
        ("transformers", True, "transformers"),
        ("transformers", False, "transformers"),
        ("unsloth", True, "unsloth"),
    ],
)
def test_engine(requested, has_gpu, expected):
    assert choose_engine(requested, has_gpu) == expected


def test_unsloth_without_a_gpu_is_refused():
    with pytest.raises(ModelError, match="needs a CUDA GPU"):
        choose_engine("unsloth", has_gpu=False)


@pytest.mark.parametrize(
    ("requested", "has_gpu", "bf16", "expected"),
    [
        ("auto", True, True, torch.bfloat16),
        ("auto", True, False, torch.float16),
        ("auto", False, False, torch.float32),
        ("float32", False, False, torch.float32),
        ("bfloat16", True, True, torch.bfloat16),
        ("float16", True, True, torch.float16),
    ],
)
def test_dtype(requested, has_gpu, bf16, expected):
    assert choose_dtype(requested, has_gpu, bf16) == expected


@pytest.mark.parametrize(("requested", "has_gpu"), [("bfloat16", True), ("float16", False)])
def test_impossible_dtypes_are_refused(requested, has_gpu):
    with pytest.raises(ModelError, match="model.dtype"):
        choose_dtype(requested, has_gpu, bf16_is_native=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without a GPU")
def test_a_big_model_without_a_gpu_is_named_with_a_way_out():
    assert "tiny_cpu" in needs_gpu(ModelSection(name="unsloth/Qwen2.5-VL-3B-Instruct-bnb-4bit"))
    assert needs_gpu(ModelSection(name="tiny")) is None


def test_only_language_adapters_train_by_default(tiny_policy):
    trainable = [name for name, p in tiny_policy.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name and "language_model" in name for name in trainable)
    assert {name.split(".")[-4] for name in trainable} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_vision_adapters_are_opt_in(load_tiny):
    policy = load_tiny(lora={"vision": True})
    assert any("visual" in name for name, p in policy.model.named_parameters() if p.requires_grad)


def test_the_seed_decides_the_fresh_adapter(load_tiny):
    def first_weight(seed):
        model = load_tiny(seed=seed).model
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_weight(3), first_weight(3))
    assert not torch.equal(first_weight(3), first_weight(4))


def test_nf4_on_the_cpu(load_tiny, make_batch):
    plain, quantised = load_tiny(), load_tiny(load_in_4bit=True)
    assert is_4bit(quantised.model) and not is_4bit(plain.model)
    layers = {name: type(m).__name__ for name, m in quantised.model.named_modules() if hasattr(m, "base_layer")}
    assert layers
    for name, module in quantised.model.named_modules():
        if hasattr(module, "base_layer"):
            assert type(module.base_layer).__name__ == "Linear4bit", name
        assert not ("visual" in name and type(module).__name__ == "Linear4bit"), name  # the tower stays as it is
    batch = make_batch(plain)
    with torch.no_grad():
        difference = (token_logps(plain.model, batch)[0] - token_logps(quantised.model, batch)[0]).abs()
    difference = difference[batch["completion_mask"].bool()].mean()
    assert 1e-4 < difference < 1  # nats per token: four bits are not nothing, and not garbage
    token_logps(quantised.model, batch)[0].sum().backward()
    assert all(p.grad is not None for p in quantised.model.parameters() if p.requires_grad)


def test_image_size_limits_keep_the_aspect_ratio():
    from PIL import Image

    data = DataSection(train="boards", max_pixels=448 * 448)
    processor = load_processor(ModelSection(name="tiny"), data)
    grid = processor.image_processor(images=[Image.new("RGB", (1600, 400))], return_tensors="pt")["image_grid_thw"][0]
    height, width = (grid[1:] * 14).tolist()
    assert height * width <= 448 * 448
    assert width / height == pytest.approx(4, rel=0.1)  # as near as multiples of 28 come


def test_vision_tokens_are_known(tiny_policy):
    ids = tiny_policy.never_sampled
    assert len(ids) == 5 and tiny_policy.model.config.image_token_id in ids


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder"])
def test_a_model_that_is_not_there_is_one_line(name):
    with pytest.raises(ModelError) as error:
        load_processor(ModelSection(name=name), DataSection(train="boards"))
    assert len(error.value.problems) == 1 and "\n" not in str(error.value) and name in str(error.value)


def test_an_adapter_names_its_base_by_the_full_path(tmp_path, monkeypatch):
    """PEFT writes the name that a base was loaded by, and reads it wherever the adapter is used."""
    from apo_lora.policy.loading import base_path

    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_path("models/mine") == str(tmp_path / "models" / "mine")
    assert base_path("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
