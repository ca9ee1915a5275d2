"""The card in a run's own folder."""

import pytest
import torch
import yaml

from apo_lora.machine.versions import environment
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.model_card import model_card


@pytest.fixture
def tiny_recipe():
    return load_recipe(find_recipe("tiny_cpu"))


def test_its_lines_load_the_adapter(tiny_policy, stir_adapter, tiny_recipe, tmp_path, monkeypatch):
    stir_adapter(tiny_policy.model)
    tiny_policy.model.save_pretrained(tmp_path / "adapter")
    card = model_card(tiny_recipe, tiny_policy.base_name, {}, 1, environment())
    assert tiny_policy.base_name not in card  # a path of the machine it was trained on

    monkeypatch.chdir(tmp_path)
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    loaded = {name: p for name, p in names["model"].named_parameters() if "lora_B" in name}
    trained = {name: p for name, p in tiny_policy.model.named_parameters() if "lora_B" in name}
    assert loaded.keys() == trained.keys() and all(p.any() for p in trained.values())
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)


def test_what_was_not_measured_is_said(tiny_recipe):
    assert "Not measured" in model_card(tiny_recipe, "x/y", {}, 1, environment())


@pytest.mark.parametrize(
    ("onto", "says"),
    [("trained", "this model is the one that was trained and measured"), ("original", "differs from the trained and")],
)
def test_what_was_merged_into_is_said(onto, says, tiny_recipe):
    texts = {
        chosen: model_card(tiny_recipe, "x/y", {}, 1, environment(), what="merged", onto=chosen)
        for chosen in (onto, None)
    }
    assert says in " ".join(texts[onto].split()) and f"--onto {onto}" in " ".join(texts[onto].split())
    assert "--onto" not in texts[None]


@pytest.mark.parametrize("name", ["data/puzzles", "elsewhere/puzzles.jsonl", "./puzzles", "../puzzles"])
def test_what_lies_here_is_no_hub_id(name, tiny_recipe, tmp_path, monkeypatch):
    """Though it has the form of one."""

    def front_matter(data):
        recipe = tiny_recipe.model_copy(update={"data": tiny_recipe.data.model_copy(update={"train": data})})
        return yaml.safe_load(model_card(recipe, data, {}, 1, environment()).split("---\n")[1])

    (tmp_path / "data" / "puzzles").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not {"datasets", "base_model"} & front_matter(name).keys()
    assert front_matter("owner/puzzles")["datasets"] == ["owner/puzzles"]
    assert front_matter("owner/puzzles")["base_model"] == "owner/puzzles"
