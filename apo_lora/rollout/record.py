"""completions.jsonl: every sampled completion with what it earned and what it weighed."""

from apo_lora.data.examples import Example
from apo_lora.rollout.credit import ScoredRollout
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl
from apo_lora.run.hooks import APOCallback
from apo_lora.run.pictures import saved_images


class CompletionsWriter(APOCallback):
    """One row of completions.jsonl per completion, and the images of each prompt."""

    def __init__(self, run_dir: RunDir, examples: list[Example]):
        """`examples`: what the data set's column `index` counts through."""
        self.run_dir = run_dir
        self.examples = examples

    def on_rollout(self, step: int, scored: ScoredRollout) -> None:
        rollout, credit = scored.rollout, scored.credit
        columns = {
            "completion": rollout.texts,
            "adapter_step": rollout.adapter_steps,
            "gold": [self.examples[index].gold for index in rollout.indices],
            "rewards": rollout.rewards_BF.tolist(),
            "reward": scored.rewards_NG.flatten().tolist(),
            "correct": scored.correct_NG.flatten().bool().tolist(),
            "length": rollout.lengths_B.int().tolist(),
            "truncated": rollout.truncated_B.bool().tolist(),
            "advantage": credit.advantages_NG.flatten().tolist(),
            "kl_weight": credit.kl_weights_NG.flatten().tolist(),
            "stcr_multiplier": credit.stcr_multipliers_NG.flatten().tolist(),
        }
        append_jsonl(
            self.run_dir.completions,
            (
                {"step": step, **_prompt(self.examples[index], self.run_dir), **dict(zip(columns, values, strict=True))}
                for index, *values in zip(rollout.indices, *columns.values(), strict=True)
            ),
        )


def _prompt(example: Example, run_dir: RunDir) -> dict[str, object]:
    images = saved_images(example.images, run_dir.images, run_dir.path)
    return {"row": example.row, "prompt": example.problem, "images": images}
