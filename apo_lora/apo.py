"""The algorithm: APO = GRPO + DADS + STCR (arXiv 2506.21655, "View-R1"), as pure functions on tensors.

    advantages  A_i = (r_i - mean r) / (std r + eps)                      over the G completions of one prompt
    STCR        A_i <- A_i (1 + (1 - base^-(l_i - L+)))                   a wrong completion longer than the right ones
    DADS        w_i = 1 - exp(-e a)   where A_i > 0, else 1               a = the group's accuracy
    loss        mean over tokens of -min(rho A, clip(rho, 1-eps, 1+eps) A)  +  beta * mean over sequences of w_i KL_i

The tables REWARD_SCALES, RATIOS and NORMALIZATIONS hold what may stand in for the deviation, rho and the first mean.

Shape suffixes: N prompts, G generations per prompt, B = sequences of one micro-batch, T completion tokens.
Float tensors in, tensors out; nothing is written in place, and nothing here knows a model, a config or a file.
Where the paper is silent, this follows what the authors' released code does; the keyword arguments that depart from it
say so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this before exp: k3 overflows otherwise and one token turns the run into NaN."""


def _with_probability_complement(accuracy: Tensor) -> Tensor:
    return 1.0 - torch.exp(-math.e * accuracy)


def _decaying_in_difficulty(accuracy: Tensor) -> Tensor:
    return torch.exp(-math.e * (1.0 - accuracy))


DADS_SHAPES = {
    "complement_exp": _with_probability_complement,  # the paper, and what the released code runs
    "exp_decay": _decaying_in_difficulty,  # in the released code, commented out
    "constant": torch.ones_like,  # every positive held alike: the KL of plain GRPO
}


REWARD_SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    # GRPO (arXiv 2402.03300) and APO as released: the group's own deviation
    "group": lambda rewards_NG, eps: rewards_NG.std(dim=-1, keepdim=True) + eps,
    # Lite PPO (arXiv 2508.08221): one deviation for the rollout: a group with little variance is not blown up
    "batch": lambda rewards_NG, eps: rewards_NG.std() + eps,
    # Dr. GRPO (arXiv 2503.20783): no division, which favours very easy and very hard prompts
    "none": lambda rewards_NG, eps: torch.ones_like(rewards_NG),
}
"""What the centred rewards of a rollout are divided by."""


def without_variance(rewards_NG: Tensor) -> Tensor:
    """Which groups earned the same throughout, and so teach nothing but the KL. Returns (N,), bool."""
    return (rewards_NG == rewards_NG[:, :1]).all(dim=-1)


def group_advantages(rewards_NG: Tensor, eps: float = 1e-9, scale: str = "group") -> Tensor:
    """Rewards standardised within each group, with the unbiased deviation (divisor G-1). Returns (N, G).

    `scale` is a key of REWARD_SCALES: what the rewards are divided by once the group's mean is subtracted.
    A group without variance has no signal: its advantages are exactly 0. Raises ValueError for G < 2.
    """
    if rewards_NG.shape[-1] < 2:
        raise ValueError("group_advantages needs at least 2 generations per prompt")
    centred_NG = rewards_NG - rewards_NG.mean(dim=-1, keepdim=True)
    # Equal rewards can leave a rounding residue in both the mean and the deviation; eps is too small to hide it.
    constant_N1 = without_variance(rewards_NG).unsqueeze(-1)
    return torch.where(constant_N1, 0.0, centred_NG / REWARD_SCALES[scale](rewards_NG, eps))


def dads_kl_weights(correct_NG: Tensor, advantages_NG: Tensor, shape: str = "complement_exp") -> Tensor:
    """Difficulty-Adaptive Divergence Shaping: the weight of each sequence's KL to the reference. Returns (N, G).

    Positives only (A_i > 0): a hard prompt's rare success is held loosely (accuracy 1/8: 0.288), an easy prompt's
    closely (7/8: 0.907). The weight is 1 for A_i <= 0, and in groups that are all right or all wrong.
    `shape` is a key of DADS_SHAPES; raises KeyError for another.
    """
    accuracy_N1 = correct_NG.mean(dim=-1, keepdim=True)
    mixed_N1 = (accuracy_N1 > 0) & (accuracy_N1 < 1)
    return torch.where(mixed_N1 & (advantages_NG > 0), DADS_SHAPES[shape](accuracy_N1), 1.0)


def stcr_multipliers(correct_NG: Tensor, lengths_NG: Tensor, base: float = 1.00001) -> Tensor:
    """Suboptimal Trajectory Complexity Regularization: the factor on each advantage, in [1, 2). Returns (N, G).

    With L+ the mean length (tokens) of the group's correct completions, a wrong completion of length l > L+ gets
    1 + (1 - base^-(l - L+)); every other completion, and every group without a correct one, gets 1.
    """
    num_correct_N1 = correct_NG.sum(dim=-1, keepdim=True)
    mean_correct_length_N1 = (lengths_NG * correct_NG).sum(dim=-1, keepdim=True) / num_correct_N1.clamp(min=1)
    excess_NG = (lengths_NG - mean_correct_length_N1).clamp(min=0)
    rambling_NG = (correct_NG == 0) & (num_correct_N1 > 0)
    # -expm1 is 1 - base^-excess without the cancellation that a base of 1.00001 would suffer in float32.
    return torch.where(rambling_NG, 1.0 - torch.expm1(-excess_NG * math.log(base)), 1.0)


@dataclass(frozen=True)
class Credit:
    """What each completion of a rollout is worth. Shapes as named."""

    advantages_NG: Tensor
    """Group-standardised rewards with the STCR factor applied."""
    kl_weights_NG: Tensor
    difficulty_N: Tensor
    """1 - accuracy of the group."""
    stcr_multipliers_NG: Tensor


def assign_credit(
    rewards_NG: Tensor,
    correct_NG: Tensor,
    lengths_NG: Tensor,
    *,
    dads: bool = True,
    stcr: bool = True,
    stcr_base: float = 1.00001,
    dads_shape: str = "complement_exp",
    stcr_amplify_positive: bool = True,
    scale_rewards: str = "group",
    eps: float = 1e-9,
) -> Credit:
    """Turns a rollout's rewards, correctness (0 or 1) and lengths (tokens), each (N, G), into its credit.

    With dads=stcr=False this is plain GRPO: group advantages and weights of 1. STCR multiplies whatever sign A_i has,
    as released: a wrong answer with a positive advantage (format right, in a group with few right answers) is
    amplified too if it is long. stcr_amplify_positive=False leaves those unchanged. `scale_rewards` is a key of
    REWARD_SCALES; it changes no advantage's sign, so that DADS and STCR pick the same completions under each.
    """
    advantages_NG = group_advantages(rewards_NG, eps, scale_rewards)
    multipliers_NG = torch.ones_like(advantages_NG)
    if stcr:
        multipliers_NG = stcr_multipliers(correct_NG, lengths_NG, stcr_base)
        if not stcr_amplify_positive:
            multipliers_NG = torch.where(advantages_NG > 0, 1.0, multipliers_NG)
    advantages_NG = advantages_NG * multipliers_NG
    return Credit(
        advantages_NG=advantages_NG,
        kl_weights_NG=dads_kl_weights(correct_NG, advantages_NG, dads_shape if dads else "constant"),
        difficulty_N=1.0 - correct_NG.mean(dim=-1),
        stcr_multipliers_NG=multipliers_NG,
    )


def token_kl(logps_BT: Tensor, ref_logps_BT: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) per token: exp(x) - x - 1, x = ref - logp. Returns (B, T), >= 0."""
    log_ratio_BT = (ref_logps_BT - logps_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.exp(log_ratio_BT) - log_ratio_BT - 1.0


def _sequence_means(values_BT: Tensor, inside_BT: Tensor) -> Tensor:
    """Mean over each sequence's tokens, of values that are 0 elsewhere. Returns (B,).

    A sequence without a token (a masked truncation) gives 0; the clamp keeps its division finite.
    """
    return values_BT.sum(dim=-1) / inside_BT.sum(dim=-1).clamp(min=1)


RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # PPO, GRPO and APO as released: each token's own
    "token": lambda log_ratio_BT, inside_BT: log_ratio_BT,
    # GSPO (arXiv 2507.18071): one for a sequence, the geometric mean of its tokens'
    "sequence": lambda log_ratio_BT, inside_BT: _sequence_means(log_ratio_BT, inside_BT).unsqueeze(-1),
}
"""The log of the ratio to the old policy that is clipped: (B, T), or (B, 1) where a sequence's tokens share it."""


@dataclass(frozen=True)
class StepTotals:
    """What the WHOLE optimizer step trains on, over all micro-batches and processes."""

    tokens: float | Tensor
    sequences: float | Tensor
    max_tokens: int
    """A completion's most tokens, whatever it really has."""


NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, StepTotals], Tensor]] = {
    # APO as released, and DAPO (arXiv 2503.14476): every token counts alike, so that a long completion counts more
    "tokens": lambda values_BT, inside_BT, step: values_BT.sum() / step.tokens,
    # GRPO (arXiv 2402.03300) and GSPO: every completion counts alike, so that a token of a long one counts less
    "sequences": lambda values_BT, inside_BT, step: _sequence_means(values_BT, inside_BT).sum() / step.sequences,
    # Dr. GRPO (arXiv 2503.20783): sums, over a number that no length changes
    "constant": lambda values_BT, inside_BT, step: values_BT.sum() / (step.sequences * step.max_tokens),
}
"""A micro-batch's share of the surrogate's mean over the step, of (B, T) values that are 0 outside the completions."""


def importance_weights(old_logps_BT: Tensor, sampler_logps_BT: Tensor, cap: float) -> Tensor:
    """By how much likelier the old policy finds each token than the sampler did, at most `cap`. Returns (B, T), >= 0.

    Truncated importance sampling (Espeholt et al. 2018, arXiv 1802.01561): completions that another engine sampled,
    which rounds differently, then teach as if the old policy had. Equal log-probs give exactly 1, and so does a token
    whose log-prob the sampler does not know (NaN).
    """
    log_ratio_BT = (old_logps_BT - sampler_logps_BT).nan_to_num(nan=0.0)
    return torch.exp(log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(max=cap)


def apo_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    ref_logps_BT: Tensor,
    mask_BT: Tensor,
    advantages_B: Tensor,
    kl_weights_B: Tensor,
    *,
    beta: float,
    epsilon: float,
    num_tokens: float | Tensor,
    num_sequences: float | Tensor,
    epsilon_high: float | None = None,
    ratio: str = "token",
    normalization: str = "tokens",
    max_tokens: int | None = None,
    entropies_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
    policy_weights_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of an optimizer step's loss; the shares of a step add up to its loss.

    logps, old and ref are log-probabilities of the sampled tokens, (B, T); mask is 1 on completion tokens.
    num_tokens and num_sequences count the WHOLE optimizer step (all micro-batches, all processes), so that any split
    gives the same gradient. entropies_BT with entropy_coef > 0 adds an entropy bonus, mean over tokens.
    policy_weights_BT, without a gradient, multiplies each token's policy term (see importance_weights).

    What departs from APO's own loss: `epsilon_high` clips the ratio at 1 + epsilon_high instead of 1 + epsilon (DAPO's
    clip-higher), `ratio` is a key of RATIOS, and `normalization` one of NORMALIZATIONS, of which "constant" needs
    `max_tokens`, the most tokens that a completion may have. The KL stays a mean over sequences under each.

    Returns (loss, metrics): scalars, each this micro-batch's share of a step-wide mean over the same mask
    (`policy_loss`, `kl_loss` as weighted in the loss, `kl` unweighted per token, `clip_fraction`). Raises KeyError for
    a name that is in no table, ValueError where max_tokens is missing.
    """
    if normalization == "constant" and not max_tokens:
        raise ValueError('apo_loss: normalization="constant" divides by max_tokens, which is missing; give it')
    inside_BT = mask_BT.bool()

    def masked(values_BT: Tensor) -> Tensor:
        # where, not a product: whatever stands at padding (inf, NaN) must not reach the sum or the gradient
        return torch.where(inside_BT, values_BT, 0.0)

    logps_BT, old_logps_BT, ref_logps_BT = masked(logps_BT), masked(old_logps_BT), masked(ref_logps_BT)
    advantages_B1 = advantages_B.unsqueeze(-1)

    log_ratio_BT = RATIOS[ratio](logps_BT - old_logps_BT, inside_BT)
    ratio_BT = torch.exp(log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    highest = 1.0 + (epsilon if epsilon_high is None else epsilon_high)
    unclipped_BT = ratio_BT * advantages_B1
    clipped_BT = ratio_BT.clamp(1.0 - epsilon, highest) * advantages_B1
    surrogate_BT = torch.minimum(unclipped_BT, clipped_BT)
    if policy_weights_BT is not None:
        surrogate_BT = policy_weights_BT * surrogate_BT
    step = StepTotals(num_tokens, num_sequences, max_tokens or 0)
    policy_loss = NORMALIZATIONS[normalization](masked(-surrogate_BT), inside_BT, step)

    kl_BT = masked(token_kl(logps_BT, ref_logps_BT))
    kl_loss = (kl_weights_B * _sequence_means(kl_BT, inside_BT)).sum() / num_sequences

    loss = policy_loss + beta * kl_loss
    if entropy_coef:
        loss = loss - entropy_coef * masked(entropies_BT).sum() / num_tokens

    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "kl_loss": kl_loss.detach(),
            "kl": kl_BT.sum() / num_tokens,
            "clip_fraction": masked((clipped_BT < unclipped_BT).to(logps_BT.dtype)).sum() / num_tokens,
        }
    return loss, metrics
