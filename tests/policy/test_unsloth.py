"""Our model, trainer and loss on Unsloth's real code, on a CPU: loading, two steps, and the same gradients three ways.

Each section reads the facts that one run of unsloth_facts.py in a fresh interpreter left behind.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from unsloth_on_cpu import ENVIRONMENT, run_script, start

from apo_lora.errors import ModelError
from apo_lora.policy.loading import _load_with_unsloth
from apo_lora.recipe.schema import LoraSection, ModelSection

SCRIPT = Path(__file__).parents[1] / "support" / "unsloth_facts.py"


def facts_of(folder: Path, *options: str) -> dict:
    if torch.cuda.is_available():
        pytest.skip("Unsloth on a CPU is for hosts without a GPU: with one, its trainer would not be rewritten")
    run = run_script(SCRIPT, "facts.json", *options, folder=folder)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return facts_of(tmp_path_factory.mktemp("plain"), "tiny", "others")


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    return facts_of(tmp_path_factory.mktemp("nf4"), "tiny", "4bit")


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory, small_qwen3_vl):
    return facts_of(tmp_path_factory.mktemp("qwen3_vl"), small_qwen3_vl, "4bit")


QWEN3_VL = pytest.param("qwen3_vl", marks=pytest.mark.matrix)


@pytest.fixture(params=[*(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "nf4")), QWEN3_VL])
def facts(request):
    return request.getfixturevalue(request.param)


# --- loading ---------------------------------------------------------------------------------------------------------

LANGUAGE_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_adapters_sit_on_the_language_layers_alone(facts):
    assert "through unsloth on cpu, float32" in facts["summary"]
    counts = ("108,544 of 878,720", "104,448 of 992,640")
    assert any(f"{count} parameters train" in facts["summary"] for count in counts)  # the same in 4-bit
    names = facts["loaded"]["adapted"]
    assert all("language_model" in name for name in names)
    assert {name.split(".")[-1] for name in names} == LANGUAGE_LAYERS
    assert len(facts["loaded"]["trainable"]) == 2 * len(names)  # A and B, and nothing else
    assert all("lora_" in name for name in facts["loaded"]["trainable"])


def test_language_layers_are_quantised_if_asked_and_the_rest_never(request, facts):
    loaded = facts["loaded"]
    plain = request.node.callspec.params["facts"] == "plain"
    assert set(loaded["adapted"].values()) == {"Linear" if plain else "Linear4bit"}
    assert "Linear" in loaded["tower_types"] and "Linear4bit" not in loaded["tower_types"]
    assert loaded["head"] == "Linear" and loaded["dtypes"] == ["torch.float32"]


@pytest.mark.slow
def test_vision_adapters_are_opt_in_and_the_head_stays_out(plain):
    names = plain["vision"]["adapted"]
    assert any("visual" in name for name in names) and any("language_model" in name for name in names)
    assert not any("lm_head" in name for name in names)


@pytest.mark.slow
def test_float16_stays_float16(plain):
    assert plain["float16"]["dtypes"] == ["torch.float16"]


@pytest.mark.slow
def test_another_dtype_than_asked_for_is_refused(plain):
    """Unsloth takes a host without a GPU for one without bfloat16, and only prints a line."""
    assert "loads tiny as torch.float16 here, not as torch.bfloat16" in plain["bfloat16"]


def test_unsloth_is_asked_for_the_named_model_with_offloaded_checkpointing(monkeypatch):
    """Offloading needs a GPU, so no other test here gets to see it."""
    asked = {}

    class FastVisionModel:
        @staticmethod
        def from_pretrained(name, **options):
            asked.update(name=name, **options)
            raise OSError("enough")

    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastVisionModel=FastVisionModel))
    model = ModelSection(name="some/model", revision="abc", load_in_4bit=True, gradient_checkpointing=True)
    with pytest.raises(EnvironmentError, match="enough"):
        _load_with_unsloth(model, LoraSection(), None, torch.float16, 0)
    assert asked == {
        "name": "some/model", "revision": "abc", "use_exact_model_name": True, "load_in_4bit": True,
        "dtype": torch.float16, "use_gradient_checkpointing": "unsloth", "trust_remote_code": False,
    }  # fmt: skip


# --- configuration ---------------------------------------------------------------------------------------------------


def test_unsloths_config_changes_nothing_of_ours(facts):
    config = facts["config"]
    assert config["is_unsloth"]
    assert config["unsloth's defaults"] == ["adamw_8bit", 0.1, True]  # all three are wrong here
    assert config["our defaults"] != config["unsloth's defaults"] and config["our defaults"][2] is False
    assert config["changed"] == []


def test_float32_on_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match="model.dtype: on a GPU, Unsloth trains float32 weights in 16 bits"):
        _load_with_unsloth(ModelSection(name="tiny"), LoraSection(), None, torch.float32, 0)


# --- training --------------------------------------------------------------------------------------------------------


def test_the_trainer_is_ours_on_unsloths_rewritten_one(facts):
    ours, public, rewritten, *_ = facts["bases"]
    assert ours == "apo_lora.trainer.APOTrainer"
    assert public == "UnslothGRPOTrainer.UnslothGRPOTrainer"  # a module that Unsloth writes at import
    assert rewritten == "UnslothGRPOTrainer._UnslothGRPOTrainer"


def test_two_steps_on_images_of_different_sizes(facts):
    first, second = facts["trained"]["logs"]
    assert first["kl"] == 0 and second["kl"] > 1e-4
    for figures in (first, second):
        assert figures["accuracy"] == 0.25 and figures["grad_norm"] > 0 and figures["entropy"] > 0
        assert figures["loss"] == pytest.approx(figures["policy_loss"] + 0.1 * figures["kl_loss"], rel=1e-5)
        assert figures["dads_weight_positives"] == pytest.approx(1 - 2.718281828459045 ** (-2.718281828459045 / 4))
        assert figures["skipped_nonfinite_steps"] == 0
    assert any(len({tuple(grid) for grid in grids}) > 1 for grids in facts["trained"]["image_grids"])


def test_the_adapter_moves_and_the_reference_stays_the_base(facts):
    trained = facts["trained"]
    assert trained["moved"] > 1e-4 and trained["policy_minus_base"] > 1e-3
    assert trained["reference_minus_base"] == 0


def test_checkpointing_is_on_in_training_and_off_in_generation(facts):
    layers = facts["trained"]["layers"]  # "generating" are the passes that had a key-value cache
    assert "training: checkpointing on" in layers and "training: checkpointing off" not in layers
    assert "generating: checkpointing off" in layers and "generating: checkpointing on" not in layers


def test_a_prompt_is_read_once_for_its_completions(facts):
    """Unsloth's own generate(), with the static cache that it takes."""
    assert facts["trained"]["rows"] == {"reading": [4], "writing": [16]}  # prompts of a step, completions


def test_each_image_is_processed_and_kept_once(facts):
    assert facts["trained"]["images_processed"] == [4, 4]  # of two rollouts with 4 prompts
    assert facts["trained"]["pixels_kept"] == [2] * 4  # of micro-batches with two prompts


def test_checkpointing_survives_our_sampling(facts):
    """compat.kept_checkpointing can go when the last one is True."""
    assert facts["checkpointing"] == {
        "loaded": True, "inside": False, "sampled by us": True, "sampled by Unsloth": False,
    }  # fmt: skip


# --- the same loss, three ways ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["on_policy", "off_policy"])
def test_gradients_equal_the_naive_loss_and_unsloths_kernel(facts, kind):
    """Float32 against a float64 loss on full logits, and against Unsloth's kernel: [loss, LoRA gradient]."""
    agreement = facts["agreement"]
    assert agreement["dads_weight"] < 0.9 and agreement["stcr_multiplier"] > 1.1  # the algorithm is at work,
    assert len(set(agreement["completion_lengths"])) > 1  # the two normalisations differ,
    assert agreement["clip_fraction"] > 0.05  # the off-policy ratio is clipped,
    assert agreement["largest_log_ratio"] < 5  # and no k3 reaches 10, where Unsloth clamps it
    differences = agreement[kind]
    assert differences["unsloth without w"][1] > 1e-3
    for witness in ("naive", "unsloth"):
        loss, gradient = differences[witness]
        assert loss < 1e-5 and gradient < 1e-5, witness


# --- a shared prompt -------------------------------------------------------------------------------------------------


def test_shared_prompts_equal_prompts_alone_under_unsloth(facts):
    """On the rollout that its trainer made, through its patched layers, with checkpointing on."""
    found = facts["agreement"]["shared_prompt"]
    assert found["obstacle"] is None and found["shared"] == [2, 2]  # groups in each pass
    assert found["layers"] == ["training: checkpointing on"]
    assert found["logps"] < 1e-5 and found["gradient"] < 1e-5
    assert min(found["completions see each other"]) > 1e-3
    same, figures = found["check"]
    assert same, figures


# --- the fixture itself ----------------------------------------------------------------------------------------------


def test_the_fixture_refuses_a_host_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="for hosts without a GPU"):
        start()


def test_the_fixture_refuses_to_come_late(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "trl", sys)
    with pytest.raises(RuntimeError, match="trl is imported already"):
        start()


def test_the_fixture_wants_its_environment():
    assert ENVIRONMENT["UNSLOTH_ALLOW_CPU"] == "1"
    command = [sys.executable, "-c", "from unsloth_on_cpu import start; start()"]
    run = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert "UNSLOTH_ALLOW_CPU" in run.stderr and "use run_script" in run.stderr
