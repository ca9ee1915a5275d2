"""Recipes: shipped ones load, and slips are named, all at once; more slips are in bad_input_cases.py."""

import pytest
import yaml

from apo_lora.errors import RecipeError
from apo_lora.recipe.files import describe_keys, find_recipe, load_recipe, shipped_recipes
from apo_lora.recipe.schema import Recipe

MINIMAL = "data:\n  train: boards\n"


def recipe_file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def problems(tmp_path, text, *overrides):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file(tmp_path, text), overrides)
    return error.value.problems


def test_every_expected_recipe_is_shipped():
    assert set(shipped_recipes()) >= {
        "tiny_cpu", "single_gpu", "colab_t4", "gpu_8gb", "grpo_baseline", "dads_only", "stcr_only",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_loads_and_tells_what_it_is_for(name):
    path = find_recipe(f"{name}.yaml")
    load_recipe(path)
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("# ") and "# Hardware" in header and f"--recipe {name}.yaml" in header


@pytest.mark.parametrize(
    ("name", "without"),
    [("grpo_baseline", {"dads", "stcr"}), ("dads_only", {"stcr"}), ("stcr_only", {"dads"})],
)
def test_variants_are_tiny_cpu_minus_their_keys(name, without):
    whole, variant = (yaml.safe_load(find_recipe(each).read_text()) for each in ("tiny_cpu", name))
    apo = whole.pop("apo")
    assert apo == {key: apo[key] for key in without} | variant.pop("apo", {})
    assert variant == whole


def test_without_apo_keys_it_is_plain_grpo(tmp_path):
    recipe = load_recipe(recipe_file(tmp_path, MINIMAL))
    assert recipe.apo.dads is None and recipe.apo.stcr is None


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = load_recipe(find_recipe("single_gpu"))
    assert load_recipe(recipe_file(tmp_path, recipe.to_yaml())) == recipe


def test_numbers_that_yaml_reads_as_text(tmp_path):
    assert isinstance(yaml.safe_load("1e-5"), str)  # PyYAML's reading of YAML 1.1
    recipe = load_recipe(recipe_file(tmp_path, MINIMAL + "train: {learning_rate: 1e-5}\n"), ["grpo.beta=1e-3"])
    assert recipe.train.learning_rate == 1e-5 and recipe.grpo.beta == 1e-3


def test_overrides_are_typed(tmp_path):
    overrides = ["grpo.num_generations=4", "model.load_in_4bit=true", "rewards.functions=[accuracy]", "apo.stcr=null"]
    recipe = load_recipe(recipe_file(tmp_path, MINIMAL + "apo: {stcr: 1.1}\n"), overrides)
    assert recipe.grpo.num_generations == 4 and recipe.model.load_in_4bit is True
    assert recipe.rewards.functions == ("accuracy",) and recipe.apo.stcr is None
    recipe = load_recipe(recipe_file(tmp_path, MINIMAL), ["rewards.functions=accuracy"])
    assert recipe.rewards.functions == ("accuracy",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grpo: {num_generations: true}", "grpo.num_generations: True"),
        ("grpo: {beta: -0.1}", "grpo.beta: -0.1"),
        ("grpo: {beta: .nan}", "grpo.beta: nan"),
        ("grpo: {temperature: 0}", "grpo.temperature: 0"),
        ("model: {load_in_4bit: 'yes'}", "model.load_in_4bit: 'yes'"),
        ("grpo: {prompts_per_rollout: 12}", "must be a multiple of grpo.prompts_per_step"),
        ("{grpo: {prompts_per_rollout: 24}, train: {save_steps: 4}}", "must be a multiple of 3, the steps per rollout"),
        ("grpo: {epsilon_high: 0}", "grpo.epsilon_high: 0"),
        ("grpo: {normalization: token}", "'tokens', 'sequences' or 'constant'"),
        ("grpo: {scale_rewards: false}", "'group', 'batch' or 'none'"),
        ("grpo: {ratio: word}", "'token' or 'sequence'"),
        ("rewards: {functions: [overlong], correct_by: overlong}", "'overlong' is at most 0 and never reaches"),
        ("rewards: {functions: [format], correct_by: format}", "'format' is at most 0.5 and never reaches"),
        (
            "{rewards: {functions: [accuracy, overlong], overlong_tokens: 2000}, grpo: {max_completion_length: 1000}}",
            "rewards.overlong_tokens: 2000 must not exceed grpo.max_completion_length = 1000",
        ),
        ("rewards: {boxes: percent}", "'pixels' or 'thousandths'"),
        (
            "data: {train: x, columns: {anwser: y}}",
            "data.columns.anwser: unknown key; did you mean data.columns.answer?",
        ),
        ("data: {train: x, columns: y}", "data.columns: must be a mapping of keys, not 'y'"),
        ("data: {train: x, columns: {image: 5}}", "data.columns.image: must be a list such as [a, b], not 5"),
        ("data: {train: x, answer_as: place}", "'from_0'"),
        ("data: {train: x, instruction: 'See <|image_pad|>.'}", "data.instruction: contains <|image_pad|>"),
        ("data: {train: x, system_prompt: 'Hi <|im_end|>'}", "data.system_prompt: contains <|im_end|>"),
    ],
)
def test_a_slip_is_named_with_its_remedy(tmp_path, text, words):
    tree = {"data": {"train": "boards"}, **yaml.safe_load(text)}
    found = problems(tmp_path, yaml.safe_dump(tree))
    assert len(found) == 1 and words in found[0] and found[0].startswith("mine.yaml: ")


def test_all_problems_come_at_once(tmp_path):
    text = "data: {trian: boards}\ngrpo: {num_generation: 8, beta: x, completions_per_pass: 7}\n"
    found = "\n".join(problems(tmp_path, text, "train.max_step=3", "nonsense"))
    for key in ("data.train: missing", "data.trian", "grpo.num_generation", "grpo.beta", "grpo.completions_per_pass",
                "train.max_step:", "'nonsense'"):  # fmt: skip
        assert key in found, key


def test_columns_by_name_and_by_their_older_keys(tmp_path):
    named = "data: {train: x, columns: {image: [left, right], answer: key, choices: none}}"
    older = "data: {train: x, answer_column: key, choices_column: none, problem_column: null}"
    recipe = load_recipe(recipe_file(tmp_path, named))
    assert recipe.data.columns.image == ("left", "right") and recipe.data.columns.choices == ("none",)
    assert load_recipe(recipe_file(tmp_path, older), ["data.columns.image=[left, right]"]) == recipe
    assert load_recipe(recipe_file(tmp_path, MINIMAL)) != load_recipe(
        recipe_file(tmp_path, MINIMAL + "train: {seed: 5}")
    )
    assert load_recipe(recipe_file(tmp_path, recipe.to_yaml())) == recipe
    changed = load_recipe(recipe_file(tmp_path, named), ["data.columns.answer=other", "data.columns.image=one"])
    assert (changed.data.columns.answer, changed.data.columns.image) == ("other", ("one",))


def test_recipes_are_frozen(tmp_path):
    recipe = load_recipe(recipe_file(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.grpo.beta = 1.0


def test_every_key_is_listed_for_reading():
    text = "\n".join(describe_keys())
    for section, field in Recipe.model_fields.items():
        assert f"{section}:" in text
        assert all(f"  {key}: " in text for key in field.annotation.model_fields)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.max_steps=7"], 7),
        (["train.epochs=1"], 12),  # 100 examples, 8 a step
        (["train.epochs=2.5"], 31),
        (["train.epochs=2", "grpo.prompts_per_rollout=16", "train.save_steps=2"], 24),
        (["train.epochs=0.01"], 1),
    ],
)
def test_total_steps(tmp_path, overrides, steps):
    assert load_recipe(recipe_file(tmp_path, MINIMAL), overrides).total_steps(num_examples=100) == steps
