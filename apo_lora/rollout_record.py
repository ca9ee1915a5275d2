"""completions.jsonl: every sampled completion with what it earned and what it weighed."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from apo_lora.apo import Credit
from apo_lora.data import Example
from apo_lora.data_images import ImageRef
from apo_lora.run_dir import RunDir, append_jsonl
from apo_lora.trainer import Rollout


def rollout_writer(run_dir: RunDir, examples: list[Example]) -> Callable[[int, Rollout, Tensor, Tensor, Credit], None]:
    """The `record_rollout` of APOTrainer: one row per completion, and the picture of each prompt."""

    def write(step: int, rollout: Rollout, rewards_NG: Tensor, correct_NG: Tensor, credit: Credit) -> None:
        columns = zip(
            rollout.examples,
            rollout.texts,
            rollout.rewards_BF.tolist(),
            rollout.lengths_B.tolist(),
            rollout.truncated_B.tolist(),
            rewards_NG.flatten().tolist(),
            correct_NG.flatten().tolist(),
            credit.advantages_NG.flatten().tolist(),
            credit.kl_weights_NG.flatten().tolist(),
            credit.stcr_multipliers_NG.flatten().tolist(),
            strict=True,
        )
        append_jsonl(
            run_dir.completions,
            (
                {
                    "step": step,
                    "row": examples[example["index"]].row,
                    "prompt": examples[example["index"]].problem,
                    "images": [_saved(image, run_dir.images) for image in examples[example["index"]].images],
                    "completion": text,
                    "gold": example["answer"],
                    "rewards": rewards,
                    "reward": reward,
                    "correct": bool(correct),
                    "length": int(length),
                    "truncated": bool(truncated),
                    "advantage": advantage,
                    "kl_weight": kl_weight,
                    "stcr_multiplier": multiplier,
                }
                for (
                    example,
                    text,
                    rewards,
                    length,
                    truncated,
                    reward,
                    correct,
                    advantage,
                    kl_weight,
                    multiplier,
                ) in columns  # fmt: skip
            ),
        )

    return write


def _saved(image: ImageRef, folder: Path) -> str:
    """The image's own path if it is a file, else that of a copy in the run directory."""
    if image.path is not None:
        return str(image.path)
    target = folder / (image.name.replace("/", "-").replace(" ", "-") + ".png")
    if not target.exists():
        folder.mkdir(exist_ok=True)
        image.open().save(target)
    return str(target.relative_to(folder.parent))
