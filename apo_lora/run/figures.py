"""Every figure of a run, declared once: its name in metrics.jsonl and eval.json, its label, unit and range.

The screen, the plots, the report and the sweep all read this table.
"""

import math
from typing import NamedTuple


class Figure(NamedTuple):
    name: str
    """The key in metrics.jsonl, and in eval.json where held-out items have it too."""
    label: str
    unit: str
    form: str = ".3f"
    """How a value is written."""
    range: tuple[float, float] | None = None
    """Of all values there can be; None where it has no such bounds."""


SHARE = (0.0, 1.0)

# Figures of a rollout, before any gradient: run/metrics.py; the last five by rollout/ and the trainer.
ROLLOUT = (
    Figure("reward", "reward", "mean of completions"),
    Figure("reward_std", "standard deviation of rewards", "reward"),
    Figure("accuracy", "accuracy", "share of completions", range=SHARE),
    Figure("advantage_std", "standard deviation of advantages", "advantage"),
    Figure("zero_variance_groups", "no reward variance", "share of groups", range=SHARE),
    Figure("all_right_groups", "all right", "share of groups", range=SHARE),
    Figure("all_wrong_groups", "all wrong", "share of groups", range=SHARE),
    Figure("length", "tokens", "tokens", ".1f"),
    Figure("length_correct", "tokens when right", "tokens", ".1f"),
    Figure("length_wrong", "tokens when wrong", "tokens", ".1f"),
    Figure("truncated", "truncated", "share of completions", range=SHARE),
    Figure("difficulty", "difficulty", "1 - accuracy of the group", range=SHARE),
    Figure("dads_weight_positives", "DADS weight of positives", "weight of the KL", range=SHARE),
    Figure("stcr_amplified", "amplified by STCR", "completions", ".0f"),
    Figure("stcr_multiplier", "multiplier of STCR", "of those amplified", ".4f"),
    Figure("generated_tokens", "generated tokens", "tokens", ".0f"),
    Figure("resampled_groups", "groups resampled", "groups", ".0f"),
    Figure("skipped_groups", "groups skipped", "groups", ".0f"),
    Figure("tokens_per_second", "tokens sampled per second", "tokens per second", ".0f"),
)

# What the passes of an optimizer step add up to: apo.apo_loss, and run/metrics.TokenMeans.
PASSES = (
    Figure("loss", "loss", "", ".4f"),
    Figure("policy_loss", "policy loss", "", ".4f"),
    Figure("kl_loss", "KL loss", "", ".4f"),
    Figure("clip_fraction", "clipped", "share of tokens", ".4f", SHARE),
    Figure("kl", "KL to the reference", "nats per token", ".4f"),
    Figure("kl_positives", "KL, positive advantage", "nats per token", ".4f"),
    Figure("kl_negatives", "KL, others", "nats per token", ".4f"),
    Figure("entropy", "entropy", "nats per token"),
    Figure("entropy_correct", "entropy when right", "nats per token"),
    Figure("entropy_wrong", "entropy when wrong", "nats per token"),
)

# Where another engine samples than trains: rollout/off_policy.py. Not in PER_STEP, since most runs have none.
SAMPLER = (
    Figure("importance_weight", "importance weight", "mean of tokens", ".4f"),
    Figure("importance_weight_max", "largest importance weight", "of a token", ".4f"),
    Figure("sampler_difference", "log-prob difference, sampler to trainer", "nats per token", ".2e"),
    Figure("staleness", "age of the adapter that sampled", "optimizer steps", ".1f"),
)

# Of the optimizer step itself: the trainer.
STEP = (
    Figure("grad_norm", "gradient norm", "before clipping", ".4f"),
    Figure("learning_rate", "learning rate", "", ".2e"),
    Figure("skipped_nonfinite_steps", "non-finite steps skipped", "steps so far", ".0f"),
    Figure("verifier_timeouts", "verifier timeouts", "answers so far", ".0f"),
    Figure("verifier_crashes", "verifier crashes", "answers so far", ".0f"),
    Figure("nonfinite_rewards", "non-finite rewards", "rewards so far", ".0f"),
)

# Of held-out items, at some steps: run/validation.py. Not in PER_STEP.
VALIDATION = (
    Figure("held_out_accuracy", "held-out accuracy", "share of items", range=SHARE),
    Figure("held_out_accuracy_low", "held-out accuracy, 95 % interval from", "share of items", range=SHARE),
    Figure("held_out_accuracy_high", "held-out accuracy, 95 % interval to", "share of items", range=SHARE),
    Figure("held_out_length", "held-out tokens", "tokens", ".1f"),
    Figure("seconds_held_out", "measuring held-out items", "seconds", ".1f"),
)

PHASES = (
    Figure("seconds_generate", "sampling", "seconds", ".1f"),
    Figure("seconds_reward", "rewards", "seconds", ".1f"),
    Figure("seconds_score", "scoring old policy and reference", "seconds", ".1f"),
    Figure("seconds_train", "forward, backward, optimizer", "seconds", ".1f"),
)
COST = (
    *PHASES,
    Figure("seconds", "whole step", "seconds", ".1f"),
    Figure("peak_memory_bytes", "peak memory", "bytes", ".0f"),
)

EVALUATION = (Figure("well_formatted", "well formatted", "share of completions", range=SHARE),)

PER_STEP = (*ROLLOUT, *PASSES, *STEP, *COST)
"""What a line of metrics.jsonl holds, besides `step` and `reward_FUNCTION` for every reward function of the recipe."""

FIGURES = {figure.name: figure for figure in (*PER_STEP, *SAMPLER, *VALIDATION, *EVALUATION)}

HELD_OUT = ("accuracy", "length_correct", "length_wrong", "truncated", "well_formatted")
"""What is shown of held-out items, in this order."""


def is_recorded(name: str) -> bool:
    """Whether metrics.jsonl takes it; what else TRL logs has another name here, or is not about this training."""
    return name in FIGURES or name.startswith("reward_")


def format_figure(name: str, value: float | None, sign: str = "") -> str:
    """The value in its figure's format; a dash for none."""
    return "-" if value is None or not math.isfinite(value) else format(value, sign + FIGURES[name].form)


class Panel(NamedTuple):
    """Figures that share the axes of one chart."""

    title: str
    lines: dict[str, str]
    """Name of each figure to its label here. They share unit and range, which the first one gives."""
    alarm: float | None = None
    """Of the first figure: where the screen begins to warn."""

    @property
    def figure(self) -> Figure:
        return FIGURES[next(iter(self.lines))]


ALARM_SHARE = 0.5
"""Of the groups without reward variance, or of the completions that were truncated: more than that is too many."""

ALARM_DIFFERENCE = 0.1
"""Nats per token between sampler and trainer: 16-bit kernels and quantised weights explain a tenth of that."""

ACCURACY = Panel("Accuracy", {"accuracy": ""})
HELD_OUT_ACCURACY = Panel("Held-out accuracy", {"held_out_accuracy": ""})
REWARD = Panel("Reward", {"reward": ""})
LENGTH = Panel("Length", {"length_correct": "right", "length_wrong": "wrong"})
ENTROPY = Panel("Entropy", {"entropy": "all", "entropy_correct": "right", "entropy_wrong": "wrong"})
KL = Panel("KL to the reference", {"kl": "all", "kl_positives": "positive advantage", "kl_negatives": "others"})
DADS = Panel("DADS weight", {"dads_weight_positives": ""})
GRADIENT = Panel("Gradient norm", {"grad_norm": ""})
GROUPS = Panel(
    "Uniform groups",
    {"zero_variance_groups": "same reward", "all_right_groups": "all right", "all_wrong_groups": "all wrong"},
    ALARM_SHARE,
)
TRUNCATED = Panel("Truncated", {"truncated": ""}, ALARM_SHARE)

PLOTS = {
    "reward_accuracy.png": (REWARD, ACCURACY),
    "held_out.png": (HELD_OUT_ACCURACY,),
    "length.png": (LENGTH,),
    "entropy.png": (ENTROPY,),
    "kl_dads.png": (KL, DADS),
    "zero_variance_groups.png": (GROUPS, TRUNCATED),
}
"""Files in a run's plots/ and the panels in each; a file is made where there is something to draw."""

CURVES = (ACCURACY, HELD_OUT_ACCURACY, REWARD, LENGTH, ENTROPY, KL, GRADIENT)
SIGNAL_CURVES = (GROUPS, TRUNCATED)
"""Of the report."""
