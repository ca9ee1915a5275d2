"""An export sees images as large as training did: in transformers, and by the options given to llama.cpp."""

import json

import pytest
from PIL import Image
from transformers import AutoProcessor

from apo_lora.commands.main import main
from apo_lora.export.image_limits import image_token_limits, write_image_limits
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.policy.loading import load_processor
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.recipe.schema import DataSection
from apo_lora.tiny import BASE_DIR


def test_the_merged_processor_sees_images_as_in_training(load_tiny, stir_adapter, tmp_path):
    """A large picture is shrunk to the recipe's limit, a small one enlarged; the base's own processor does neither."""
    run, size = tmp_path / "run", {"data.max_pixels": 50_000, "data.min_pixels": 20_000}
    policy = load_tiny()
    stir_adapter(policy.model, scale=0.05)
    policy.model.save_pretrained(run / "adapter")
    recipe = load_recipe(find_recipe("tiny_cpu"), [f"{key}={value}" for key, value in size.items()])
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["export", str(run), "--to", "merged"]) == 0

    def grids(processor):
        pictures = [Image.new("RGB", (900, 600)), Image.new("RGB", (60, 60)), Image.new("RGB", (200, 150))]
        inputs = processor.image_processor(pictures, return_tensors="pt")
        return inputs["image_grid_thw"].tolist()

    trained = grids(load_processor(recipe.model, recipe.data))
    assert trained != grids(AutoProcessor.from_pretrained(BASE_DIR))
    assert grids(AutoProcessor.from_pretrained(run / "merged")) == trained


def test_limits_go_into_an_older_processors_file_too(tmp_path):
    """As Qwen2.5-VL's has them; with one limit given, the other stays."""
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12845056, "merge_size": 2}))
    write_image_limits(tmp_path, DataSection(train="boards", max_pixels=400_000))
    sizes = {"min_pixels": 3136, "max_pixels": 400_000, "size": {"shortest_edge": 3136, "longest_edge": 400_000}}
    assert json.loads(path.read_text()) == {"merge_size": 2} | sizes


@pytest.mark.parametrize(
    ("limits", "options"),
    [
        ({}, {}),
        ({"max_pixels": 401_408}, {"--image-max-tokens": 512}),
        ({"max_pixels": 401_408 + 700, "min_pixels": 1_000}, {"--image-min-tokens": 2, "--image-max-tokens": 512}),
        ({"max_pixels": 100}, {"--image-max-tokens": 1}),
        ({"max_pixels": 3_000, "min_pixels": 8_000}, {"--image-min-tokens": 11, "--image-max-tokens": 11}),
    ],
)
def test_llama_cpp_counts_tokens(limits, options):
    assert image_token_limits(DataSection(train="boards", **limits), QWEN2_5_VL) == options
    assert image_token_limits(None, QWEN2_5_VL) == {}
