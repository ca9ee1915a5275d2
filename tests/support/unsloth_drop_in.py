"""A GRPO script as Unsloth's vision notebooks write one, with two names changed, on a host without a GPU."""

import sys

from unsloth_on_cpu import start

start()

from unsloth import FastVisionModel  # noqa: E402

model, processor = FastVisionModel.from_pretrained(
    sys.argv[1], load_in_4bit=False, dtype=None, use_gradient_checkpointing=True, use_exact_model_name=True
)
model = FastVisionModel.get_peft_model(
    model, finetune_vision_layers=False, r=4, lora_alpha=8, random_state=3407, use_gradient_checkpointing=True
)

from datasets import Dataset  # noqa: E402
from PIL import Image  # noqa: E402

from apo_lora import APOConfig, APOTrainer  # noqa: E402


def unique_characters(completions, **columns):
    return [float(len(set(text if isinstance(text, str) else text[-1]["content"]))) for text in completions]


images = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]] * 2
training_args = APOConfig(
    learning_rate=1e-2, optim="adamw_torch", logging_steps=1, per_device_train_batch_size=4,
    gradient_accumulation_steps=2, num_generations=4, max_completion_length=12, max_steps=2, report_to="none",
    output_dir="out", importance_sampling_level="sequence", loss_type="dr_grpo", mask_truncated_completions=False,
    use_cpu=True, bf16=False,
)  # fmt: skip
trainer = APOTrainer(
    model=model, args=training_args, processing_class=processor, reward_funcs=[unique_characters],
    train_dataset=Dataset.from_dict({"prompt": chats, "image": images}),
)  # fmt: skip
trainer.train()

logs = [log for log in trainer.state.log_history if "policy_loss" in log]
assert APOTrainer.__mro__[1].__name__ == "UnslothGRPOTrainer", APOTrainer.__mro__
assert trainer.args.normalization == "constant" and trainer.args.importance_sampling_level == "sequence"
assert trainer.args.epsilon_high is None and trainer.args.beta == 1e-3
assert len(logs) == 2 and logs[0]["kl"] == 0.0 < logs[1]["kl"], logs
assert list(trainer.model.peft_config) == ["default"]
