"""Our loss and its gradients on this GPU, against Unsloth's own kernel and against no checkpointing.

On the micro-batches of the last training step, changed so that everything which could be wrong shows: completions of
different lengths, since the loss has two normalisations; a stirred adapter, since a fresh one has no KL; KL weights far
apart and small advantages, so that the weights decide much of the gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from apo_lora.machine.memory import peak_memory, reset_peak_memory
from apo_lora.trainer import APOTrainer
from benchmarks.gpu.record import Finding, Record
from benchmarks.gpu.witness import Batch, differences, loss_and_gradient, our_backward, stir, unsloth_backward

AGREEMENT = 0.02
"""Relative difference of gradients up to which 16-bit arithmetic in another order is an explanation: assumed."""


def check(record: Record, trainer: APOTrainer) -> None:
    from unsloth import FastVisionModel

    FastVisionModel.for_training(trainer.model)  # Unsloth leaves a model that has been trained ready for inference
    stir(trainer.model, scale=0.02)
    batches = trainer._buffered_inputs = [telling(batch) for batch in trainer._buffered_inputs]
    record.check("our loss has the gradient of Unsloth's kernel", lambda: agrees_with_unsloth(trainer, batches))
    record.check("checkpointing changes no gradient", lambda: checkpointing_is_exact(trainer, batches))
    record.check("checkpointing offloads to the host's memory", offloads)


def telling(batch: Batch) -> Batch:
    mask_BT = batch["completion_mask"]
    rows, width = mask_BT.shape
    lengths_B = torch.arange(1, rows + 1, device=mask_BT.device) * width // rows
    kept_BT = torch.arange(width, device=mask_BT.device) < lengths_B.unsqueeze(1)
    return {
        **batch,
        "completion_mask": mask_BT * kept_BT,
        "kl_weights": torch.linspace(1.0, 0.1, rows, device=mask_BT.device),
        "advantages": 0.05 * batch["advantages"],
    }


def agrees_with_unsloth(trainer: APOTrainer, batches: list[Batch]) -> Finding:
    """Without the DADS weights it must not agree: else the comparison would see nothing."""
    ours = loss_and_gradient(trainer, batches, our_backward)
    loss, gradient = differences(ours, loss_and_gradient(trainer, batches, unsloth_backward))
    unweighted = partial(unsloth_backward, weighted=False)
    _, blind = differences(ours, loss_and_gradient(trainer, batches, unweighted))
    return gradient < AGREEMENT and blind > 2 * gradient, {
        "relative difference of the loss": loss,
        "of the gradient": gradient,
        "of the gradient where the weights are left out": blind,
    }


def checkpointing_is_exact(trainer: APOTrainer, batches: list[Batch]) -> Finding:
    reset_peak_memory()
    with_it, its_peak = loss_and_gradient(trainer, batches, our_backward), peak_memory()
    with without_checkpointing(trainer.model):
        reset_peak_memory()
        without_it, other_peak = loss_and_gradient(trainer, batches, our_backward), peak_memory()
    _, gradient = differences(with_it, without_it)
    found = {"relative difference of the gradient": gradient}
    if torch.cuda.is_available():
        found |= {"peak bytes with checkpointing": its_peak, "peak bytes without": other_peak}
    return gradient < AGREEMENT, found


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert layers, "no layer checkpoints its activations"
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def offloads() -> Finding:
    import unsloth_zoo.gradient_checkpointing as offloading

    function = torch.utils.checkpoint.CheckpointFunction.__name__
    # Unsloth clears this flag at the first activation that it moves to the host.
    return function == "UnslothCheckpointFunction" and not offloading.USE_UNSLOTH_GC, function
