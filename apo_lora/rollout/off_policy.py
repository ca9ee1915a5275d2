"""What sets the sampler apart from the policy that is trained, where another engine samples.

Both have the same weights, but round differently, and may hold the base in other bits. The sampler's log-probs of its
tokens come along in the batch, and importance weights correct for the difference (apo.importance_weights).
"""

from typing import Any, NamedTuple

from torch import Tensor

from apo_lora.apo import importance_weights

SAMPLER_LOGPS = "sampling_per_token_logps"
"""TRL's key of the batch: (B, T), 0 at padding; absent where the trainer's own model samples."""


class Correction(NamedTuple):
    weights_BT: Tensor | None
    """For apo_loss; None leaves it as it is."""
    figures: dict[str, Tensor]
    """Shares of a mean over the step's tokens."""
    largest: dict[str, Tensor]


def correction(batch: dict[str, Any], old_logps_BT: Tensor, cap: float | None, num_tokens: float) -> Correction:
    """`old_logps_BT`: the trainer's, of the policy that the sampler had. `num_tokens`: of the whole step."""
    sampler_logps_BT = batch.get(SAMPLER_LOGPS)
    if sampler_logps_BT is None:
        return Correction(None, {}, {})
    inside_BT = batch["completion_mask"].bool()
    weights_BT = importance_weights(old_logps_BT, sampler_logps_BT, cap or float("inf"))
    used = weights_BT[inside_BT]
    apart = (old_logps_BT - sampler_logps_BT)[inside_BT].abs().nan_to_num(nan=0.0)
    return Correction(
        weights_BT if cap else None,
        {"importance_weight": used.sum() / num_tokens, "sampler_difference": apart.sum() / num_tokens},
        {"importance_weight_max": used.max()} if used.numel() else {},
    )
