"""APOConfig: TRL's GRPOConfig with APO's own arguments, and APO's values where TRL's defaults contradict them.

Imported after the engine is chosen, like trainer.py: after `import unsloth` the base class is Unsloth's.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from apo_lora.apo import DADS_SHAPES, RATIOS, REWARD_SCALES

ONE_OF = {
    "zero_variance_groups": ("keep", "skip", "resample"),
    "reference": ("base", "start"),
    "scale_rewards": tuple(REWARD_SCALES),
    "importance_sampling_level": tuple(RATIOS),
}

LOSS_TYPES = {"dapo": "tokens", "grpo": "sequences", "dr_grpo": "constant"}
"""TRL's names for apo.NORMALIZATIONS."""

FIXED: dict[str, Any] = {
    "multi_objective_aggregation": "sum_then_normalize",
    "use_bias_correction_kl": False,
    "vllm_importance_sampling_correction": False,
    "delta": None,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_adaptive_entropy": False,
    "sync_ref_model": False,
}
"""Arguments of TRL's loss, with the only value that matches APO's loss."""


@dataclass
class APOConfig(GRPOConfig):
    """Replaces `trl.GRPOConfig`: every argument of that class, and these:

    dads                    shape of the KL weight of positive completions: complement_exp (the paper's), exp_decay,
                            constant; None is off
    stcr                    base of the factor on wrong completions longer than the correct ones, above 1; None is off
    stcr_amplify_positive   whether STCR multiplies positive advantages too, as the released code does
    correct_by              name of the reward function that decides which completions are correct; None is the first
    correct_from            smallest value of that reward that counts as correct
    shared_prompt           compute each prompt once for all of its completions, where the model allows it; same result
    zero_variance_groups    groups whose rewards are all equal: keep, skip, or resample other prompts (twice at most)
    reference               what the KL is to: base, the model with its adapters off, or start, a frozen copy of the
                            adapter as it is when the trainer is made (for a PeftModel that was trained before)
    importance_cap          largest importance weight of a token, where vLLM sampled it; None leaves tokens unweighted
    max_nonfinite_steps     stop after this many optimizer steps in a row with a loss or gradient that is not finite

    Defaults that differ from TRL 1.15's, because those contradict APO (arXiv 2506.21655 and its released code):

    | argument                            | TRL    | here   | why                                                    |
    |-------------------------------------|--------|--------|--------------------------------------------------------|
    | beta                                | 0.0    | 1e-3   | DADS weighs the KL to the reference                    |
    | use_bias_correction_kl              | True   | False  | the released KL has no correction factor               |
    | vllm_importance_sampling_correction | True   | False  | it multiplies TRL's loss; importance_cap is ours   |

    Of TRL's own, these choose among the tables of apo.py, as they do in TRL:

    epsilon_high                 upper clip range, DAPO's clip-higher; None is epsilon
    loss_type                    normalisation of the surrogate: dapo is a mean over tokens (as released), grpo over
                                 sequences, dr_grpo over sequences x max_completion_length. The KL is a mean over
                                 sequences under each. Any other loss of TRL's is replaced by dapo, with a warning
    scale_rewards                deviation that advantages are divided by: group (as released), batch, none
    importance_sampling_level    ratio to the old policy: token (as released), sequence (GSPO, with loss_type="grpo")

    The arguments in FIXED have only one valid value; any other is replaced, with a warning.
    Raises ValueError for an invalid value of the arguments above.
    """

    dads: str | None = field(default="complement_exp", metadata={"help": "Shape of the KL weight of positives."})
    stcr: float | None = field(default=1.00001, metadata={"help": "Base of the factor on long wrong completions."})
    stcr_amplify_positive: bool = field(
        default=True, metadata={"help": "Let STCR multiply positive advantages too, as released."}
    )
    correct_by: str | None = field(
        default=None, metadata={"help": "Name of the reward function that decides what is correct; default: the first."}
    )
    correct_from: float = field(default=1.0, metadata={"help": "Smallest value of that reward that counts as correct."})
    shared_prompt: bool = field(default=True, metadata={"help": "Compute each prompt once for all of its completions."})
    zero_variance_groups: str = field(
        default="keep", metadata={"help": "Groups with equal rewards: keep, skip or resample."}
    )
    reference: str = field(
        default="base", metadata={"help": "Policy that the KL is to: base, or the adapter at the start."}
    )
    importance_cap: float | None = field(
        default=2.0, metadata={"help": "Largest importance weight of a token that another engine sampled."}
    )
    max_nonfinite_steps: int = field(
        default=3, metadata={"help": "Stop after this many non-finite optimizer steps in a row."}
    )

    beta: float = field(default=1e-3, metadata={"help": "Weight of the KL to the reference."})
    loss_type: str = field(default="dapo", metadata={"help": "Normalisation of the surrogate: dapo, grpo, dr_grpo."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Fixed: APO's KL has no correction factor."})
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Fixed: applies only to TRL's loss."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dads is not None and self.dads not in DADS_SHAPES:
            raise ValueError(f"APOConfig: dads={self.dads!r} must be one of {', '.join(DADS_SHAPES)}, or None")
        if self.stcr is not None and not self.stcr > 1:
            raise ValueError(f"APOConfig: stcr={self.stcr!r} must be above 1, for instance 1.00001; None is off")
        for name, allowed in ONE_OF.items():
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"APOConfig: {name}={given!r} must be one of {', '.join(allowed)}")
        if self.epsilon_high is not None and not self.epsilon_high > 0:
            raise ValueError(f"APOConfig: epsilon_high={self.epsilon_high!r} must be above 0; None is epsilon")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"APOConfig: importance_cap={self.importance_cap!r} must be above 0; None is off")
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"APOConfig: steps_per_generation={self.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: an optimizer step must lie within "
                "one rollout, since APO's loss is divided by the step's counts"
            )
        without_effect = [name for name, value in FIXED.items() if getattr(self, name) != value]
        if self.loss_type not in LOSS_TYPES:
            without_effect.append("loss_type")
        if without_effect:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in without_effect)
            warnings.warn(f"APOConfig: {given}: ignored, because APO has its own loss", UserWarning, stacklevel=3)
        for name, value in FIXED.items():
            setattr(self, name, value)
        if self.loss_type not in LOSS_TYPES:
            self.loss_type = "dapo"
        if self.loss_type == "dr_grpo" and not self.max_completion_length:
            raise ValueError("APOConfig: loss_type='dr_grpo' divides by max_completion_length, which is None; give it")

    @property
    def normalization(self) -> str:
        """A key of apo.NORMALIZATIONS."""
        return LOSS_TYPES[self.loss_type]
