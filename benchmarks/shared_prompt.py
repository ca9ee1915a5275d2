"""What a shared prompt saves: FLOPs, time and memory of scoring and training on one group, on a CPU.

    python benchmarks/shared_prompt.py --out shared_prompt            (a quarter of an hour; writes .json and .png)
    python benchmarks/shared_prompt.py --out quick --shapes 300,64,8 --groups ""

Four ways over the same tokens, each in a process of its own: a reference pass without gradient, then forward and
backward of the loss, gradient checkpointing on, LoRA on the language model, the whole group in one pass.

    shared   apo_lora: one row for the group, the vision tower once for both passes
    plain    apo_lora: a row per completion, through the model's stock forward
    trl      stock TRL 1.15's pass: the whole model on a row per completion, pixels repeated. Its fused lm_head is a
             Triton kernel that no CPU runs; in its place stands an eager head on the completion positions
    unsloth  stock Unsloth's scoring pass and loss kernel on the model as it loads it (unsloth_pass.py; without a GPU
             only, and not in the plot): its FLOPs are those of a GPU, its seconds are not

The model is Qwen2.5-VL with random weights, 12.4 M parameters, about in the proportions of the 3B: vision tower and
language model cost about the same per image token, lm_head a quarter of the layers. FLOPs are FlopCounterMode's, which
takes attention for the full rectangle, whatever a kernel skips. Times are the best of the repeats: by the clock, and of
the CPU, which a busy machine lengthens less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apo_lora.apo import apo_loss
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.machine.memory import peak_resident_memory
from apo_lora.machine.versions import environment
from apo_lora.policy.loading import reference_mode
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.shared_prompt.vision_features import image_features
from apo_lora.recipe.schema import LoraSection

# As tests/support/unsloth_on_cpu.py wants it.
UNSLOTH_ON_A_CPU = {
    "UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
SHAPES = ((300, 64, 8), (1000, 128, 8), (1000, 512, 16))
"""Prompt tokens, completion tokens, completions."""
GROUPS = (2, 4, 8, 16, 32)
"""Completions of the plot, at the first shape's lengths."""
IMAGES = {300: (32, 32), 1000: (60, 60)}
"""Prompt tokens -> patches of the image, high and wide; four of them are one token."""
VOCABULARY, IMAGE_TOKEN = 8192, 8000

Batch = dict[str, Any]


def build_base() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    rotation = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1376, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rotation,
        },
        vision_config={
            "depth": 4, "hidden_size": 192, "intermediate_size": 512, "num_heads": 3, "out_hidden_size": 256,
            "fullatt_block_indexes": [3],
        },
        image_token_id=IMAGE_TOKEN, video_token_id=IMAGE_TOKEN + 1, vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def build_model() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = QWEN2_5_VL.lora_targets(LoraSection().target_modules, vision=False)
    model = get_peft_model(build_base(), LoraConfig(r=16, target_modules=targets))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def build_batch(prompt: int, completion: int, group: int) -> Batch:
    """One group: a prompt with an image, and completions that are all of full length."""
    generator = torch.Generator().manual_seed(1)
    high, wide = IMAGES[prompt]
    text = torch.randint(10, 7000, (prompt - high * wide // 4,), generator=generator)
    ids = torch.cat([text[:10], torch.full((high * wide // 4,), IMAGE_TOKEN), text[10:]]).expand(group, -1)
    pixels = torch.randn(high * wide, 3 * 2 * 14 * 14, generator=generator)
    return {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": torch.randint(10, 7000, (group, completion), generator=generator),
        "completion_mask": torch.ones(group, completion, dtype=torch.long),
        "pixel_values": pixels.repeat(group, 1),
        "image_grid_thw": torch.tensor([[1, high, wide]] * group),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "num_images": [1] * group,
    }


def trl_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """As TRL's _get_per_token_logps_and_entropies, but for its Triton kernel."""
    base, width = model.get_base_model(), batch["completion_ids"].shape[1]
    hidden_BTH = base.base_model(
        input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        mm_token_type_ids=nn.functional.pad(batch["mm_token_type_ids"], (0, width)),
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        use_cache=False,
    ).last_hidden_state[:, -width - 1 : -1]
    log_softmax_BTV = torch.log_softmax(base.get_output_embeddings()(hidden_BTH).float(), dim=-1)
    with torch.no_grad():
        entropies_BT = -(log_softmax_BTV.exp() * log_softmax_BTV).sum(-1)
    return log_softmax_BTV.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1), entropies_BT


def shared_step(model: nn.Module, batch: Batch) -> float:
    batch = {**batch, "group": torch.zeros(len(batch["prompt_ids"]), dtype=torch.long)}
    batch["image_features"] = image_features(model.get_base_model().model, batch)
    return score_and_train(model, batch, token_logps)


def score_and_train(model: nn.Module, batch: Batch, score: Callable) -> float:
    """The loss of one optimizer step on this group."""
    mask_BT, group = batch["completion_mask"], len(batch["completion_mask"])
    model.zero_grad()
    with reference_mode(model):
        ref_BT, _ = score(model, batch)
    logps_BT, _ = score(model, batch)
    advantages_B = torch.linspace(-1, 1.5, group)
    loss, _ = apo_loss(
        logps_BT, logps_BT.detach(), ref_BT, mask_BT, advantages_B, torch.ones(group),
        beta=0.1, epsilon=0.2, num_tokens=mask_BT.sum().item(), num_sequences=group,
    )  # fmt: skip
    loss.backward()
    return loss.item()


WAYS: dict[str, Callable[[nn.Module, Batch], float]] = {
    "shared": shared_step,
    "plain": lambda model, batch: score_and_train(model, batch, token_logps),
    "trl": lambda model, batch: score_and_train(model, batch, trl_logps),
}


def matmuls_of_attention(query: torch.Size, key: torch.Size) -> int:
    """FLOPs of one of its matrix products, from shapes (rows, heads, tokens, width of a head)."""
    return 2 * query.numel() * key[2]


# FlopCounterMode does not know the CPU's own attention kernel. As for the GPU's, two products forward, five backward.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, *others, **options: 2 * matmuls_of_attention(query, key)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, *others, **options: 5 * matmuls_of_attention(query, key)
    ),
}


def measure(way: str, prompt: int, completion: int, group: int, repeats: int, *, count: bool) -> dict[str, float]:
    model, batch = build_model(), build_batch(prompt, completion, group)
    return figures_of(lambda: WAYS[way](model, batch), model, repeats, count=count)


def figures_of(step: Callable[[], float], model: nn.Module, repeats: int, *, count: bool) -> dict[str, float]:
    flops = 0
    if count:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            step()
        flops = counter.get_total_flops()
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = step()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {
        "flops": flops,
        "seconds": min(seconds),
        "cpu_seconds": min(cpu_seconds),
        "loss": loss,
        "gradient_norm": gradient.double().norm().item(),
        "peak_resident_bytes": peak_resident_memory(),
    }


def measure_apart(way: str, *numbers: int, count: bool = True) -> dict[str, float]:
    """In a process of its own, whose peak memory is nobody else's."""
    command = [sys.executable, __file__, "--one", way, "--numbers", ",".join(map(str, numbers))]
    done = subprocess.run([*command, *([] if count else ["--no-count"])], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_unsloth(*numbers: int) -> dict[str, float]:
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "benchmarks" / "unsloth_pass.py"), ",".join(map(str, numbers))]
    environment = {**os.environ, **UNSLOTH_ON_A_CPU, "PYTHONPATH": str(root)}
    with tempfile.TemporaryDirectory() as folder:  # where Unsloth writes its rewritten trainers
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: tuple[int, int, int], repeats: int, ways: list[str]) -> dict[str, Any]:
    found = {way: measure_apart(way, *shape, repeats) for way in ways if way in WAYS}
    if "unsloth" in ways and not torch.cuda.is_available():
        found["unsloth"] = measure_unsloth(*shape, repeats)
    prompt, completion, group = shape
    print(f"\nprompt {prompt}, completion {completion}, G = {group}")
    for way, figures in found.items():
        print(
            f"  {way:7} {figures['flops'] / 1e9:8.1f} GFLOP  {figures['seconds']:7.2f} s  "
            f"{figures['cpu_seconds']:7.2f} s of CPU  {figures['peak_resident_bytes'] / 2**20:6.0f} MiB  "
            f"loss {figures['loss']:.7f}  gradient {figures['gradient_norm']:.6f}"
        )
    compared = ("flops", "seconds", "cpu_seconds", "peak_resident_bytes")
    others = [way for way in found if way != "shared"]
    ratios = {other: {key: found[other][key] / found["shared"][key] for key in compared} for other in others}
    for other, ratio in ratios.items():
        print(
            f"  {other} / shared: {ratio['flops']:.2f} x FLOPs, {ratio['seconds']:.2f} x time, "
            f"{ratio['cpu_seconds']:.2f} x CPU time, {ratio['peak_resident_bytes']:.2f} x memory"
        )
    return {"prompt": prompt, "completion": completion, "group": group, "ways": found, "ratios": ratios}


def plot(lengths: tuple[int, int], groups: list[int], repeats: int, target: Path) -> dict[str, list[float]]:
    """Seconds of CPU per step over G."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds = {
        way: [measure_apart(way, *lengths, group, repeats, count=False)["cpu_seconds"] for group in groups]
        for way in WAYS
    }
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for way, values in seconds.items():
        axes.plot(groups, values, marker="o", label=way)
    axes.set(
        xlabel="completions per prompt, G",
        ylabel="seconds of CPU for score + train",
        title=f"{lengths[0]} prompt tokens, {lengths[1]} completion tokens, CPU",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    print("\nseconds of CPU over G =", groups)
    for way, values in seconds.items():
        print(f"  {way:6}", "  ".join(f"{value:.2f}" for value in values))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="FLOPs, time and memory of a shared prompt, on a CPU.")
    parser.add_argument("--out", type=Path, default=Path("shared_prompt"), help="results go to OUT.json and OUT.png")
    parser.add_argument("--shapes", default=" ".join(",".join(map(str, shape)) for shape in SHAPES))
    parser.add_argument("--groups", default=",".join(map(str, GROUPS)), help="of the plot; empty for none")
    parser.add_argument("--ways", default=",".join([*WAYS, "unsloth"]), help="what is compared with `shared`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--numbers", help=argparse.SUPPRESS)
    parser.add_argument("--no-count", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, *map(int, given.numbers.split(",")), count=not given.no_count)))
        return
    shapes = [tuple(map(int, shape.split(","))) for shape in given.shapes.split()]
    results: dict[str, Any] = {
        "environment": environment(),
        "date": time.strftime("%Y-%m-%d"),
        "repeats": given.repeats,
        "shapes": [],
    }

    def keep() -> None:  # after every part: the whole takes a quarter of an hour
        given.out.with_suffix(".json").write_text(json.dumps(results, indent=1))

    for shape in shapes:
        results["shapes"].append(compare(shape, given.repeats, given.ways.split(",")))
        keep()
    groups = [int(group) for group in given.groups.split(",") if group]
    if groups:
        seconds = plot(SHAPES[0][:2], groups, given.repeats, given.out.with_suffix(".png"))
        results["over_groups"] = {"lengths": SHAPES[0][:2], "groups": groups, "seconds": seconds}
        keep()


if __name__ == "__main__":
    main()
