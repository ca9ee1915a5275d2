"""Every shim over upstream code, each with symptom, link and the condition for its removal.

tests/machine/test_compat.py shows that upstream still needs each of them, and that it works.
"""

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def fix_4bit_on_cpu(model: nn.Module) -> None:
    """Both of the shims that a 4-bit model on a CPU needs."""
    keep_4bit_layout_on_cpu(model)
    dequantize_blocks_across_rows_on_cpu()


def keep_4bit_layout_on_cpu(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking NF4 weights for AVX512-BF16 inference on a CPU.

    Symptom: on such CPUs the first generation rewrites the weights of every Linear4bit into another layout; for an
    input size that is not a multiple of 64 that raises "shape '[96, 1]' is invalid for input of size 144", and training
    needs the ordinary layout anyway.
    Link: https://github.com/bitsandbytes-foundation/bitsandbytes (nn/modules.py, Linear4bit.forward), seen in 0.50.2.
    Remove when: Linear4bit with 96 input features can generate and then train on a CPU with AVX512-BF16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantize_blocks_across_rows_on_cpu() -> None:
    """Makes bitsandbytes' CPU kernel dequantise NF4 weights correctly where a row is not a whole number of blocks.

    Symptom: quantisation runs blocks of 64 across row ends; the CPU kernel starts a new block with every row. With
    96 input features a weight is silently off by 28 % instead of 9 %, and the model answers much worse.
    Link: https://github.com/bitsandbytes-foundation/bitsandbytes (backends/cpu/ops.py, dequantize_4bit), in 0.50.2.
    Remove when: an NF4 round trip of a (96, 96) matrix on a CPU is as exact as that of a (144, 64) one.
    """
    from bitsandbytes.backends.cpu.ops import lib

    for dtype in ("fp32", "bf16", "fp16"):
        name = f"cdequantize_blockwise_cpu_nf4_{dtype}"
        if name not in vars(lib):  # the library looks its functions up by name; ours stands before that
            setattr(lib, name, _as_one_row(getattr(lib, name)))


def _as_one_row(kernel: Any) -> Any:
    def dequantize(weights, absmax, out, blocksize, rows, columns):
        if columns.value % blocksize.value:
            rows, columns = ctypes.c_longlong(1), ctypes.c_longlong(rows.value * columns.value)
        return kernel(weights, absmax, out, blocksize, rows, columns)

    return dequantize


def let_gloo_finish() -> None:
    """Call between the last collective operation and the end of a gloo process group.

    Symptom: a process sometimes hangs at its end. Taking the group down waits for gloo's worker thread with Python's
    lock held, and that thread needs the lock to drop the last tensor that was sent.
    Link: https://github.com/pytorch/pytorch/issues/190489, seen in 2.10.0.
    Remove when: tests/machine/test_compat.py takes groups down at once and none of the processes hangs.
    """
    time.sleep(0.5)  # releases the lock


def load_onto_numbered_cpus() -> None:
    """Lets torch.load put tensors onto "cpu:0", which is the same as "cpu".

    Symptom: a run of several CPU processes cannot be continued: "don't know how to restore data location of
    torch.storage.UntypedStorage (tagged with cpu:0)". accelerate numbers such devices, and Trainer loads the
    optimizer's state onto its own.
    Link: https://github.com/huggingface/accelerate (state.py, set_device), seen in 1.15.0 with torch 2.10.0.
    Remove when: torch.load accepts map_location=torch.device("cpu", 0).
    """
    torch.serialization.register_package(
        100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


@contextmanager
def kept_checkpointing(model: nn.Module) -> Iterator[None]:
    """On exit, every layer checkpoints its activations as it did before.

    Symptom: generate() of a model that Unsloth loaded switches gradient checkpointing off in every layer and leaves it
    off; train() does not bring it back. The next backward outside of Unsloth's trainer, such as preflight's on the
    largest example, keeps all activations, and its measured peak memory is that of no checkpointing.
    Link: https://github.com/unslothai/unsloth (models/vision.py, unsloth_base_fast_generate), seen in 2026.10.7.
    Remove when: tests/policy/test_unsloth.py finds checkpointing on after generate() and train().
    """
    checkpointing = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    before = [module.gradient_checkpointing for module in checkpointing]
    try:
        yield
    finally:
        for module, flag in zip(checkpointing, before, strict=True):
            module.gradient_checkpointing = flag


@contextmanager
def kept_compiler_stance() -> Iterator[None]:
    """On exit, torch.compile compiles as it did before. Inside, the stance starts as "default".

    Symptom: generate() of a model that Unsloth loaded leaves the process's stance at "eager_on_recompile", with which
    no new shape is compiled. Unsloth's for_training() puts it back, and so does a training pass through the whole
    model; ours calls the inner one. So preflight checks and measures layers that are not compiled, and training's are.
    Link: https://github.com/unslothai/unsloth-zoo (compiler.py, __DYNAMO__RECOMPILING__), seen in 2026.10.7.
    Remove when: tests/test_emulated_gpu.py finds the stance "default" after Unsloth's generate().
    """
    with torch.compiler.set_stance("default"):
        yield


@contextmanager
def kept_static_cache() -> Iterator[None]:
    """Inside, generate() of a model that Unsloth loaded has a static key-value cache wherever the free memory holds it.

    Symptom: where it would take over half of that memory, generate() takes a growing one instead, which copies all that
    it holds for every token, and at full length holds more: qwen3_vl_4b.yaml on 24 GB, qwen3_vl_2b_8gb.yaml on 8 GB.
    Link: https://github.com/unslothai/unsloth (models/vision.py, _static_cache_does_not_fit), seen in 2026.10.7.
    Remove when: tests/test_simulated_gpu.py finds the peaks of these recipes as planned without it.
    """
    vision = sys.modules.get("unsloth.models.vision")
    stock = getattr(vision, "_static_cache_does_not_fit", None)
    if stock is None:
        yield
        return

    def does_not_fit(model: nn.Module, input_ids: Any, options: Any) -> bool:
        if model.device.type != "cuda":
            return stock(model, input_ids, options)
        need = vision._static_cache_bytes(model, input_ids, options)
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return need is not None and need > 0.9 * (torch.cuda.mem_get_info()[0] + unused)

    vision._static_cache_does_not_fit = does_not_fit
    try:
        yield
    finally:
        vision._static_cache_does_not_fit = stock
