"""A GRPO script as TRL's documentation writes one; two names are changed, and it trains by APO."""

import json
import subprocess
import sys

import forks
import pytest
from conftest import PROJECT

from apo_lora.apo import NORMALIZATIONS
from apo_lora.config import LOSS_TYPES

NAMES = {"GRPOConfig": "APOConfig", "GRPOTrainer": "APOTrainer"}

HEAD = """
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

def reward_num_unique_chars(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(len(set(text))) for text in texts]
"""

ARGUMENTS = """
training_args = GRPOConfig(
    output_dir="out", num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    max_completion_length=12, max_steps=2, learning_rate=1e-2, logging_steps=1, use_cpu=True, bf16=False,
    report_to="none",
)
"""

PLAIN = """
dataset = Dataset.from_dict({"prompt": ["The sky is", "One and one make"] * 4})
trainer = GRPOTrainer(
    model=MODEL, reward_funcs=reward_num_unique_chars, args=training_args, train_dataset=dataset,
    peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
)
trainer.train()
"""

CHATS_WITH_IMAGES = """
from PIL import Image

chats = [[{"role": "user", "content": "How many?"}]] * 4
dataset = Dataset.from_dict({"prompt": chats, "image": [Image.new("RGB", (56, 56), c) for c in ("red", "blue") * 2]})
trainer = GRPOTrainer(
    model=MODEL, reward_funcs=[reward_num_unique_chars], args=training_args, train_dataset=dataset,
    eval_dataset=dataset.select([0]), peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
assert trainer.evaluate()["eval_loss"] is not None
"""

REPORT = """
logs = [log for log in trainer.state.log_history if "policy_loss" in log]
assert type(trainer).__name__ == "APOTrainer" and len(logs) == 2, trainer.state.log_history
assert logs[0]["kl"] == 0.0, "the reference is the base, and a fresh adapter is the base"
assert logs[1]["kl"] > 0
assert "completions/mean_length" in logs[0], "TRL's own figures are there too"
assert list(trainer.model.peft_config) == ["default"], "no copy of the adapter was made"
assert trainer.args.beta == 1e-3
"""


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A causal language model of another family, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from apo_lora.tiny import BASE_DIR

    folder = tmp_path_factory.mktemp("text-model")
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told.pop("processor_class", None)  # of the embedded model, which sees
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def with_our_names(script: str) -> str:
    script = script.replace("from trl import GRPOConfig, GRPOTrainer", "from apo_lora import APOConfig, APOTrainer")
    for theirs, ours in NAMES.items():
        script = script.replace(theirs, ours)
    return script


def run(script, model, folder, *, forked):
    path = folder / "script.py"
    path.write_text(f"MODEL = {str(model)!r}\n" + with_our_names(script) + REPORT)
    environment = {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    if forked:
        finished = forks.run([path], cwd=folder, env=environment)
    else:
        command = [sys.executable, str(path)]
        finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


@pytest.mark.slow
def test_plain_prompts_on_a_text_model(text_model, tmp_path):
    run(HEAD + ARGUMENTS + PLAIN, text_model, tmp_path, forked=False)
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_chats_with_images_and_an_evaluation(tmp_path):
    from apo_lora.tiny import BASE_DIR

    run(HEAD + ARGUMENTS + CHATS_WITH_IMAGES, BASE_DIR, tmp_path, forked=True)


@pytest.mark.slow
def test_an_unsloth_notebook_with_images(tmp_path):
    """Unsloth's rewritten trainer below ours, with its notebooks' other loss."""
    import torch
    from unsloth_on_cpu import run_script

    from apo_lora.tiny import BASE_DIR

    if torch.cuda.is_available():
        pytest.skip("Unsloth on a CPU is for hosts without a GPU")
    finished = run_script(PROJECT / "tests" / "support" / "unsloth_drop_in.py", str(BASE_DIR), folder=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "APO has its own loss" not in finished.stderr


def test_the_first_rollout_copies_no_keys_whoever_loaded_the_model(text_model, tmp_path, monkeypatch):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from apo_lora import APOTrainer

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", sdpa_attention_forward)
    lora, data = LoraConfig(task_type="CAUSAL_LM"), Dataset.from_dict({"prompt": ["a"]})
    APOTrainer(str(text_model), lambda **c: [0.0], config(tmp_path), train_dataset=data, peft_config=lora)
    # tests/policy/test_grouped_attention.py watches what it does.
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is sdpa_attention_forward


@pytest.mark.parametrize("trained", ["nothing", "lm_head"])
def test_a_model_without_an_adapter_or_with_a_trained_head_is_refused(tiny_policy, tmp_path, trained):
    from datasets import Dataset

    from apo_lora import APOConfig, APOTrainer

    model, problem = tiny_policy.model.get_base_model(), "the model has no adapter; give peft_config"
    if trained == "lm_head":
        model.lm_head.weight.requires_grad_(True)
        model, problem = tiny_policy.model, "lm_head must be frozen; leave it out of target_modules"
    data = Dataset.from_dict({"prompt": ["a"]})
    with pytest.raises(ValueError, match=problem):
        APOTrainer(
            model, lambda **c: [0.0], APOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=data, processing_class=tiny_policy.processor,
        )  # fmt: skip


def config(tmp_path, **changes):
    from apo_lora import APOConfig

    return APOConfig(str(tmp_path), **{"use_cpu": True, "bf16": False, "report_to": "none", **changes})


def test_what_only_trls_loss_knows_is_named_and_replaced(tmp_path):
    with pytest.warns(UserWarning, match=r"delta=2.0, loss_type='cispo': ignored, because"):
        made = config(tmp_path, loss_type="cispo", delta=2.0)
    assert made.loss_type == "dapo" and made.delta is None


@pytest.mark.filterwarnings("error:APOConfig")
def test_trls_names_choose_the_loss(tmp_path):
    released = config(tmp_path)
    assert (released.normalization, released.scale_rewards, released.epsilon_high) == ("tokens", "group", None)
    chosen = {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.28}
    made = config(tmp_path, scale_rewards=False, **chosen)
    assert made.normalization == "constant" and made.scale_rewards == "none"
    assert {name: getattr(made, name) for name in chosen} == chosen
    assert config(tmp_path, loss_type="grpo").normalization == "sequences"
    assert set(LOSS_TYPES.values()) == set(NORMALIZATIONS)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dads": "linear"}, "dads='linear' must be one of complement_exp"),
        ({"stcr": 1.0}, "stcr=1.0 must be above 1"),
        ({"zero_variance_groups": "drop"}, "zero_variance_groups='drop'"),
        ({"scale_rewards": "std"}, "scale_rewards='std' must be one of group, batch, none"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word' must be one of token, sequence"),
        ({"epsilon_high": 0.0}, "epsilon_high=0.0 must be above 0"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "'dr_grpo' divides by max_completion_length"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "must be a multiple of"),
    ],
)
def test_impossible_values_are_refused(tmp_path, changes, problem):
    with pytest.raises(ValueError, match=problem):
        config(tmp_path, **changes)


def test_every_default_that_is_not_trls_stands_in_the_docstring():
    from dataclasses import fields

    from trl import GRPOConfig

    from apo_lora import APOConfig

    theirs = {field.name: field.default for field in fields(GRPOConfig)}
    ours = {field.name: field.default for field in fields(APOConfig)}
    changed = {name for name in theirs if theirs[name] != ours[name]}
    assert changed and all(f"| {name} " in APOConfig.__doc__ for name in changed)
    assert all(name in APOConfig.__doc__ for name in ours.keys() - theirs.keys())


def test_the_public_names():
    import apo_lora

    assert set(apo_lora.__all__) == {
        "APOTrainer", "APOConfig", "APOCallback", "assign_credit", "apo_loss", "accuracy_reward", "format_reward",
    }  # fmt: skip
    assert all(getattr(apo_lora, name).__doc__ for name in apo_lora.__all__)
    from apo_lora.rewards import accuracy_reward, format_reward

    assert accuracy_reward(r"so it is \boxed{4}", "4") == 1.0 and format_reward("4") == 0.0
    with pytest.raises(AttributeError, match="no attribute 'GRPOTrainer'"):
        apo_lora.GRPOTrainer  # noqa: B018


def test_the_top_level_import_is_light():
    code = "import sys, apo_lora; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=PROJECT).strip() == "[]"
