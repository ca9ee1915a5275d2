"""The memory plan as a whole: shared prompts, rollouts, the largest group, and the command."""

import json
import subprocess
import sys

import pytest
import torch

from apo_lora.commands.main import main
from apo_lora.family.lookup import find_shape
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.preflight.memory_plan import (
    MOMENTS,
    OVERHEAD,
    GiB,
    largest_group,
    load_of,
    plan,
    prompts_per_pass,
    server_needs,
    tower_has_gradient,
    with_rollout,
)
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.recipe.schema import Recipe

GPU_RECIPES = ("single_gpu", "colab_t4", "gpu_8gb")


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(find_recipe(name), overrides)


# --- shared prompts --------------------------------------------------------------------------------------------------


def shared(*overrides):
    return recipe_of("single_gpu", "grpo.prompts_per_step=6", "grpo.num_generations=4", *overrides)


@pytest.mark.parametrize(("rows", "prompts"), [(1, 1), (2, 1), (4, 1), (3, 2), (6, 2), (8, 2), (12, 3), (24, 6)])
def test_prompts_of_the_fullest_pass(rows, prompts):
    recipe = shared(f"grpo.completions_per_pass={rows}")
    groups = [completion // 4 for completion in range(recipe.completions_per_step)]
    assert max(len(set(groups[start : start + rows])) for start in range(0, 24, rows)) == prompts
    assert prompts_per_pass(recipe) == prompts
    load = load_of(recipe, QWEN2_5_VL.published["3b"])
    assert load.pass_tokens == prompts * load.prompt + rows * load.completion
    alone = load_of(shared(f"grpo.completions_per_pass={rows}", "grpo.shared_prompt=false"), QWEN2_5_VL.published["3b"])
    assert alone.pass_tokens == rows * alone.length


def test_tokens_of_a_real_pass(tiny_policy, make_batch):
    """The row that scoring packs is as long as the plan says."""
    from apo_lora.policy.shared_prompt.rows import pack

    batch = make_batch(tiny_policy, sizes=((84, 84),) * 4, lengths=(9,) * 4)
    batch["group"] = torch.zeros(4, dtype=torch.long)
    row = pack(tiny_policy.model.get_base_model().model, batch)
    prompt = int(batch["prompt_mask"][0].sum())
    recipe = shared("grpo.completions_per_pass=4", f"data.max_prompt_tokens={prompt}", "grpo.max_completion_length=9")
    assert len(row.input_ids_L) == load_of(recipe, find_shape("tiny")).pass_tokens


def test_sharing_prompts_needs_less_where_prompts_are_long():
    options = ("grpo.completions_per_pass=8", "grpo.max_completion_length=256")

    def above_what_is_held(moment, sharing):
        rows = plan(QWEN2_5_VL.published["3b"], recipe_of("single_gpu", *options, f"grpo.shared_prompt={sharing}")).rows
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
    from apo_lora.rollout.training_arguments import config_values

    recipe = recipe_of("tiny_cpu", "grpo.prompts_per_rollout=16", "train.save_steps=10")
    values = config_values(recipe, tiny_policy, tmp_path, 1)
    at_once = values["per_device_train_batch_size"] * values["steps_per_generation"]
    assert load_of(recipe, find_shape("tiny")).rollout == at_once == 128


@pytest.mark.parametrize("name", GPU_RECIPES)
def test_peaks_are_sums_of_rows(name):
    made = plan(QWEN2_5_VL.published["3b"], recipe_of(name))
    held = sum(row.bytes for row in made.rows if row.moments == MOMENTS)
    assert all(peak > held > 2.9 * GiB for peak in made.peaks.values())
    assert made.total == max(made.peaks.values()) + OVERHEAD


@pytest.mark.parametrize(
    ("override", "moments"),
    [
        ("grpo.num_generations=16", ("decode",)),  # a prompt is read once for all of them
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
    before = plan(QWEN2_5_VL.published["3b"], recipe_of("single_gpu")).peaks
    after = plan(QWEN2_5_VL.published["3b"], recipe_of("single_gpu", override)).peaks
    assert all(after[moment] > before[moment] for moment in moments)


@pytest.mark.parametrize("completion", [256, 1024])
def test_the_largest_group_fits_and_one_more_does_not(completion):
    shape, recipe, card = QWEN2_5_VL.published["3b"], recipe_of("gpu_8gb"), 7 * GiB
    largest = largest_group(shape, recipe, card, prompts=4, completion=completion)

    def total(generations):
        changed = with_rollout(recipe, prompts=4, generations=generations, completion=completion)
        return plan(shape, changed).total

    assert 2 <= largest < 64 and total(largest) <= card < total(largest + 1)
    assert largest_group(shape, recipe, 3 * GiB, prompts=4, completion=completion) == 0


def test_the_plan_needs_no_torch():
    code = (
        "import sys, apo_lora.preflight.plan_table; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["single_gpu", "--vram", "24"], 0, "Fits a GPU with 24"),
        (["single_gpu", "--vram", "8"], 1, "Does not fit a GPU with 8"),
        (["gpu_8gb", "--vram", "8"], 0, "Fits a GPU with 8"),
        (["qwen3_vl_2b_8gb", "--vram", "8"], 0, "Fits a GPU with 8"),
        (["qwen3_vl_4b", "--vram", "24"], 0, "Fits a GPU with 24"),
        (["qwen3_vl_4b", "grpo.prompts_per_step=8", "--vram", "24"], 1, "Does not fit a GPU with 24"),
        (["colab_t4", "--vram", "15"], 0, "Fits a GPU with 15"),
        (["tiny_cpu", "data.max_pixels=7056", "data.max_prompt_tokens=64", "--vram", "2"], 0, "Fits a GPU with 2"),
    ],
)
def test_plan_says_whether_it_fits(arguments, code, words, capsys):
    assert main(["plan", "--recipe", *arguments]) == code
    shown = capsys.readouterr().out
    assert words in shown and "not yet compared with a measured GPU run" in shown and "KV cache" in shown
    assert max(map(len, shown.splitlines())) <= 160


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["--vram", "24"], 0, ["In 12.00 it computes 64 of the rollout's 64", "of which vLLM leaves 12.00"]),
        (["--vram", "8"], 1, ["it computes 1 of", "of which vLLM leaves 4.00"]),
        (["rollout.vllm_gpu_memory_utilization=0.1", "--vram", "24"], 1, ["it computes 0 of", "it would not start"]),
        (["rollout.servers=[http://other:8000]", "--vram", "16"], 0, ["have memory of their own"]),
    ],
)
def test_a_server_takes_its_share(changes, code, words, capsys):
    assert main(["plan", "--recipe", "single_gpu", "rollout.engine=vllm", *changes]) == code
    shown = capsys.readouterr().out
    assert all(word in shown for word in words) and "KV cache" not in shown
    assert max(map(len, shown.splitlines())) <= 160


def test_a_servers_weights_are_in_its_own_bits():
    shape = QWEN2_5_VL.published["3b"]
    (quantised, cache), (in_16_bits, same) = (
        server_needs(shape, recipe_of("single_gpu", "rollout.engine=vllm", f"rollout.quantization={bits}"))
        for bits in ("auto", "none")
    )
    assert in_16_bits == 2 * sum(shape.parameters().values()) and quantised < in_16_bits / 2
    assert cache == same == (1536 + 1024) * 2 * 36 * 256 * 2  # tokens, keys and values, layers, width, bytes


def test_where_a_server_samples_the_tower_runs_in_the_scoring():
    large = ("data.max_pixels=12845056", "data.max_prompt_tokens=17000", "grpo.completions_per_pass=1")
    own, theirs = (
        plan(QWEN2_5_VL.published["3b"], recipe_of("single_gpu", *large, f"rollout.engine={engine}")).peaks["score"]
        for engine in ("transformers", "vllm")
    )
    assert theirs > own + GiB / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without a GPU")
def test_plan_without_a_card_gives_no_verdict(capsys):
    assert main(["plan", "--recipe", "single_gpu"]) == 0
    shown = capsys.readouterr().out
    assert "a GPU with" not in shown and "Largest num_generations" in shown


@pytest.mark.parametrize("vram", ["0", "-8", "eight", "nan", "inf"])
def test_a_card_that_cannot_be_is_one_line(vram, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--recipe", "single_gpu", f"--vram={vram}"])
    assert stopped.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_folder_with_another_model_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["plan", "--recipe", "single_gpu", f"model.name={tmp_path}"]) == 2
    assert "unsupported model type llama" in capsys.readouterr().err
