"""Stock TRL, stock Unsloth and ours on the same work: one prompt, a group of completions of fixed length, one step.

Everybody gets the same weights (NF4 language model, 16-bit vision tower), the same LoRA, prompts, pictures, reward and
optimizer, a reference policy to score, and a card of one size. A setting of a peer is how many rows of the group it
takes through the model at once: all of them, or one.
"""

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import GRPOConfig, GRPOTrainer

from apo_lora.data.examples import load_examples
from apo_lora.data.items import prompt_dataset
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.policy.loading import choose_dtype, limit_image_size, load_policy
from apo_lora.recipe.schema import Recipe
from apo_lora.rewards.functions import reward_functions
from apo_lora.rollout.training_arguments import training_arguments
from apo_lora.run.directory import RunDir
from apo_lora.trainer import APOTrainer
from benchmarks.gpu.card import pretend_card
from benchmarks.gpu.measurements import PEERS_CARD, Setting
from benchmarks.gpu.phase_clock import PhaseClock
from benchmarks.gpu.record import Finding, Record
from benchmarks.gpu.watch import bases, is_rewritten
from benchmarks.gpu.work import alternating, full_length_only, recipe_on_random_model

GROUP = 8


def measure(record: Record, setting: Setting, engine: str, whole_group: bool, overrides: Sequence[str] = ()) -> None:
    cap = pretend_card(PEERS_CARD)
    run = f"peer-{engine}-{'group' if whole_group else 'row'}"
    shutil.rmtree(setting.folder / run, ignore_errors=True)
    recipe = peer_recipe(setting, run, GROUP if whole_group else 1, overrides)
    rows = recipe.grpo.completions_per_pass
    record.put(engine=engine, rows_at_once=rows, card_gib=PEERS_CARD, cap_bytes=cap)
    trainer = BUILD[engine](recipe)
    full_length_only(trainer)
    check_peer(record, trainer, engine, recipe)
    clock = PhaseClock(trainer, lambda steps: record.put(steps=steps))
    trainer.train()
    summary = clock.summary()
    record.put(**summary)
    wanted = GROUP * recipe.grpo.max_completion_length
    found = summary["tokens"]["completion"]
    record.check("every completion had its full length", lambda: (found == wanted, f"{found:,} tokens in a step"))
    if engine == "ours":
        record.check("no pass was made smaller", lambda: (trainer.pass_size.rows == rows, trainer.pass_size.rows))


def peer_recipe(setting: Setting, run: str, rows: int, overrides: Sequence[str] = ()) -> Recipe:
    return recipe_on_random_model(
        "single_gpu",
        setting,
        run,
        "data.max_pixels=401408",
        "data.max_prompt_tokens=768",
        "grpo.max_completion_length=512",
        f"grpo.num_generations={GROUP}",
        "grpo.prompts_per_step=1",
        f"grpo.completions_per_pass={rows}",
        f"train.max_steps={1 + setting.steps}",
        *overrides,
    )


def check_peer(record: Record, trainer: Any, engine: str, recipe: Recipe) -> None:
    rewritten = engine != "trl"
    record.check(
        f"the trainer is {'' if rewritten else 'not '}rewritten by Unsloth",
        lambda: (is_rewritten(trainer) == rewritten, bases(trainer)),
    )
    record.check("the language model is 4-bit, the vision tower is not", lambda: quantised(trainer))
    rows, passes = recipe.grpo.completions_per_pass, GROUP // recipe.grpo.completions_per_pass
    found = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    record.check("rows per pass and passes per step are as asked for", lambda: (found == (rows, passes), list(found)))


def quantised(trainer: Any) -> Finding:
    in_4bit = [name for name, module in trainer.model.named_modules() if isinstance(module, Linear4bit)]
    return bool(in_4bit) and not any("visual" in name for name in in_4bit), f"{len(in_4bit)} layers in 4-bit"


# --- one function per peer -------------------------------------------------------------------------------------------


def build_ours(recipe: Recipe) -> APOTrainer:
    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=recipe.train.seed)
    run_dir = RunDir(recipe.output.dir)
    run_dir.create()
    return APOTrainer(
        policy.model,
        reward_functions(recipe.rewards, verifier=None),  # `alternating`, by the name that the recipe gives it
        training_arguments(recipe, policy, run_dir.checkpoints, recipe.train.max_steps),
        processing_class=policy.processor,
        train_dataset=problems(recipe),
    )


def build_unsloth(recipe: Recipe) -> GRPOTrainer:
    """Model and LoRA come from load_policy, which calls FastVisionModel as Unsloth's own notebooks do."""
    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=recipe.train.seed)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__  # its own attention, not ours
    return GRPOTrainer(
        model=policy.model,
        processing_class=policy.processor,
        args=stock_config(recipe, policy.processor),
        train_dataset=problems(recipe),
        reward_funcs=[alternating],
    )


def build_trl(recipe: Recipe) -> GRPOTrainer:
    """TRL + PEFT + bitsandbytes. Left to itself, bitsandbytes would quantise the vision tower as well."""
    dtype, on_gpu = arithmetic(), torch.cuda.is_available()
    base = AutoModelForImageTextToText.from_pretrained(
        recipe.model.name,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=QWEN2_5_VL.kept_in_16_bits,
        ),
        device_map={"": 0 if on_gpu else "cpu"},
    )
    processor = AutoProcessor.from_pretrained(recipe.model.name, padding_side="left")
    limit_image_size(processor, recipe.data)
    trainer = GRPOTrainer(
        model=base,
        peft_config=LoraConfig(
            r=recipe.lora.r,
            lora_alpha=recipe.lora.alpha,
            target_modules=QWEN2_5_VL.lora_targets(recipe.lora.target_modules, vision=recipe.lora.vision),
            task_type="CAUSAL_LM",
        ),
        processing_class=processor,
        args=stock_config(recipe, processor),
        train_dataset=problems(recipe),
        reward_funcs=[alternating],
    )
    if dtype == torch.float16:  # TRL makes LoRA weights of a 4-bit model bfloat16, whose gradients no scaler takes
        for parameter in filter(lambda p: p.requires_grad, trainer.model.parameters()):
            parameter.data = parameter.data.float()
    return trainer


BUILD: dict[str, Callable[[Recipe], Any]] = {"ours": build_ours, "unsloth": build_unsloth, "trl": build_trl}


def problems(recipe: Recipe) -> Any:
    """One prompt per step, and one step more than there are: trainers look ahead."""
    examples = load_examples(recipe.data.train, recipe.data, split="train").examples
    return prompt_dataset(examples, recipe.data, [n % len(examples) for n in range(1 + recipe.train.max_steps)])


def arithmetic() -> torch.dtype:
    """Of this GPU: a T4 has no bfloat16."""
    on_gpu = torch.cuda.is_available()
    return choose_dtype("auto", on_gpu, on_gpu and torch.cuda.is_bf16_supported(including_emulation=False))


def stock_config(recipe: Recipe, processor: Any) -> GRPOConfig:
    """The recipe's work in TRL's terms, plain GRPO; what does not change the work is left at the peer's default."""
    on_gpu, grpo = torch.cuda.is_available(), recipe.grpo
    return GRPOConfig(
        output_dir=recipe.output.dir,
        num_generations=grpo.num_generations,
        per_device_train_batch_size=grpo.completions_per_pass,
        gradient_accumulation_steps=grpo.num_generations // grpo.completions_per_pass,
        max_completion_length=grpo.max_completion_length,
        temperature=grpo.temperature,
        generation_kwargs={"suppress_tokens": QWEN2_5_VL.vision_token_ids(processor)},
        beta=grpo.beta,
        loss_type="grpo",
        mask_truncated_completions=False,  # all of them are: masked, there would be nothing to train on
        max_steps=recipe.train.max_steps,
        learning_rate=recipe.train.learning_rate,
        lr_scheduler_type=recipe.train.lr_scheduler,
        warmup_steps=recipe.train.warmup_steps,
        optim="adamw_8bit" if on_gpu else "adamw_torch",
        gradient_checkpointing=True,
        bf16=arithmetic() == torch.bfloat16,
        fp16=arithmetic() == torch.float16,
        use_cpu=not on_gpu,
        seed=recipe.train.seed,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
