"""Unsloth's own scoring and training pass on the work of shared_prompt.py, which starts this in a process of its own.

Unsloth wants a GPU; on a CPU its code runs by the tests' stand-in (unsloth_on_cpu.py), which refuses a host with
one. Triton kernels and compiled graphs are out of reach there, so its seconds say little, and its FLOPs what they are.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from unsloth_on_cpu import start

start()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from apo_lora.family.qwen2_5_vl import QWEN2_5_VL  # noqa: E402
from apo_lora.policy.loading import reference_mode  # noqa: E402
from apo_lora.recipe.schema import LoraSection  # noqa: E402
from apo_lora.tiny import BASE_DIR  # noqa: E402
from benchmarks import shared_prompt  # noqa: E402
from benchmarks.gpu.watch import is_rewritten  # noqa: E402


def load(folder: Path) -> tuple[nn.Module, Any]:
    """The benchmark's model, saved and read by FastVisionModel. The processor is there because Unsloth asks for one."""
    from transformers import AutoProcessor
    from unsloth import FastVisionModel

    shared_prompt.build_base().save_pretrained(folder)
    AutoProcessor.from_pretrained(BASE_DIR).save_pretrained(folder)
    model, processor = FastVisionModel.from_pretrained(
        str(folder), load_in_4bit=False, dtype=torch.float32, use_gradient_checkpointing=True, use_exact_model_name=True
    )
    model = FastVisionModel.get_peft_model(
        model,
        r=16,
        lora_alpha=8,
        target_modules=QWEN2_5_VL.lora_targets(LoraSection().target_modules, vision=False),
        use_gradient_checkpointing=True,
    )
    fresh = {name: p for name, p in shared_prompt.build_model().named_parameters() if "lora_" in name}
    _, unexpected = model.load_state_dict(fresh, strict=False)
    assert fresh and not unexpected  # the same adapter as everybody's
    return model, processor


def build_trainer(model: nn.Module, processor: Any, folder: Path, group: int) -> Any:
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=[lambda completions, **columns: [0.0] * len(completions)],
        train_dataset=datasets.Dataset.from_list([{"prompt": "How many?"}]),
        args=GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=group, num_generations=group, beta=0.1,
            loss_type="grpo", mask_truncated_completions=False, use_bias_correction_kl=False, use_cpu=True,
            bf16=False, optim="adamw_torch", report_to="none", gradient_checkpointing=True,
        ),
    )  # fmt: skip
    assert is_rewritten(trainer)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer: Any, batch: dict[str, Any]) -> float:
    """The loss of one optimizer step on this group, by Unsloth alone: reference pass, loss kernel, backward."""
    model, width, group = trainer.model, batch["completion_ids"].shape[1], len(batch["completion_ids"])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    images = {
        "pixel_values": batch["pixel_values"],
        "image_grid_thw": batch["image_grid_thw"],
        "num_images": batch["num_images"],
        "mm_token_type_ids": nn.functional.pad(batch["mm_token_type_ids"], (0, width)),
    }
    model.zero_grad()
    with reference_mode(model):
        reference = trainer._get_per_token_logps_and_entropies(model, ids, mask, width, batch_size=group, **images)[0]
    inputs = {
        **{name: batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")},
        **images,
        "ref_per_token_logps": reference,
        "advantages": torch.linspace(-1, 1.5, group),
        "num_items_in_batch": batch["completion_mask"].sum(),
    }
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return loss.item()


def main(prompt: int, completion: int, group: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(Path(folder) / "model")
        trainer = build_trainer(model, processor, Path(folder) / "run", group)
        model.train()
        batch = shared_prompt.build_batch(prompt, completion, group)
        print(json.dumps(shared_prompt.figures_of(lambda: step(trainer, batch), model, repeats, count=True)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1].split(",")))
