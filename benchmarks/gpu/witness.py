"""Unsloth's own loss kernel as a witness of ours: DADS in terms of what that kernel computes.

Shape suffixes: B sequences of a micro-batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apo_lora.policy.batches import pixels
from apo_lora.trainer import APOTrainer

Batch = dict[str, Any]
Backward = Callable[[APOTrainer, list[Batch]], float]
"""Adds the gradient of one step's loss to the adapter, and returns the loss."""


def our_backward(trainer: APOTrainer, batches: list[Batch]) -> float:
    """compute_loss does its own backward."""
    return sum(trainer.compute_loss(trainer.model, batch).item() for batch in batches)


def unsloth_backward(trainer: APOTrainer, batches: list[Batch], *, weighted: bool = True) -> float:
    """Unsloth's kernel computes  sum_i s_i sum_t (-min(rho A'_i, clip(rho) A'_i) + beta k3).

    The surrogate is positively homogeneous in A', so s_i = w_i / (N T_i) with A'_i = A_i / (s_i Z) is the DADS loss:
    Z tokens and N sequences in the step, T_i tokens in the sequence. `weighted=False` leaves the w out.
    """
    base = type(trainer).__mro__[1]
    num_tokens = sum(batch["completion_mask"].sum() for batch in batches)
    num_sequences = sum(len(batch["completion_mask"]) for batch in batches)
    ours = trainer.beta, trainer.args.use_bias_correction_kl, trainer._get_per_token_logps_and_entropies
    trainer.beta, trainer.args.use_bias_correction_kl = trainer.args.beta, False
    trainer._get_per_token_logps_and_entropies = base._get_per_token_logps_and_entropies.__get__(trainer)
    total = 0.0
    for batch in batches:
        weights_B = batch["kl_weights"] if weighted else torch.ones_like(batch["kl_weights"])
        samples_B = weights_B / (num_sequences * batch["completion_mask"].sum(1))
        fed = {
            **batch,
            "pixel_values": pixels(batch),
            "advantages": batch["advantages"] / (samples_B * num_tokens),
            "unsloth_sample_weight": samples_B,
            "ref_per_token_logps": batch["ref_logps"],
        }
        with trainer.compute_loss_context_manager():  # autocast, as around every training step
            loss = base.compute_loss(trainer, trainer.model, fed)
        trainer.accelerator.backward(loss)  # as ours does: in float16 both gradients carry the scaler's factor
        total += loss.item()
    trainer.beta, trainer.args.use_bias_correction_kl, trainer._get_per_token_logps_and_entropies = ours
    return total


def loss_and_gradient(trainer: APOTrainer, batches: list[Batch], backward: Backward) -> tuple[float, Tensor]:
    """The step's loss, and the gradient of all LoRA weights as one float64 vector."""
    trainer.model.zero_grad()
    loss = backward(trainer, batches)
    gradients = [p.grad.double().flatten().clone() for p in trainer.model.parameters() if p.requires_grad]
    return loss, torch.cat(gradients)


def differences(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> list[float]:
    """Relative to the first: of the loss, and of the gradient as a vector."""
    (loss, gradient), (other_loss, other_gradient) = one, other
    return [abs(other_loss - loss) / abs(loss), ((other_gradient - gradient).norm() / gradient.norm()).item()]


def stir(model: torch.nn.Module, scale: float) -> None:
    """Random values for the adapter's B, which starts as zero: the policy leaves the base, and the KL is not 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
