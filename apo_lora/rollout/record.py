"""completions.jsonl: every sampled completion with what it earned and what it weighed; some of them in the terminal."""

from collections.abc import Sequence

from tqdm.auto import tqdm

from apo_lora.data.examples import Example
from apo_lora.rollout.credit import ScoredRollout
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl
from apo_lora.run.hooks import APOCallback
from apo_lora.run.pictures import saved_images
from apo_lora.run.tables import aligned


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


class CompletionsView(APOCallback):
    """One prompt's completions in the terminal, at step 1 and then every `every` steps."""

    SHOWN = (90, 50)
    """Characters of a long text's beginning and of its end, where the answer is."""

    def __init__(self, examples: list[Example], reward_names: Sequence[str], every: int, steps_per_rollout: int):
        self.examples, self.reward_names = examples, reward_names
        self.every, self.steps_per_rollout = every, steps_per_rollout

    def on_rollout(self, step: int, scored: ScoredRollout) -> None:
        steps = range(step, step + self.steps_per_rollout)
        if step == 1 or any(each % self.every == 0 for each in steps):
            tqdm.write("\n".join(self.lines(step, scored)))

    def lines(self, step: int, scored: ScoredRollout) -> list[str]:
        rollout, group = scored.rollout, range(scored.rewards_NG.shape[1])
        example = self.examples[rollout.indices[0]]
        rows = [
            (
                *(f"{reward:.2f}" for reward in rollout.rewards_BF[row].tolist()),
                f"{scored.credit.advantages_NG[0, row]:+.2f}",
                f"{rollout.lengths_B[row]:.0f}",
                self._short(rollout.texts[row]),
            )
            for row in group
        ]
        heading = (*self.reward_names, "advantage", "tokens", "completion")
        return [
            f"step {step}, row {example.row}: {self._short(example.problem)}",
            f"correct answer: {self._short(str(example.gold))}",
            *(f"  {line}" for line in aligned([heading, *rows], left=(len(heading) - 1,))),
        ]

    def _short(self, text: str) -> str:
        """In one line, and without what a terminal would obey."""
        line = "".join(character if character.isprintable() else " " for character in text)
        first, last = self.SHOWN
        return line if len(line) <= first + last + 5 else f"{line[:first]} ... {line[-last:]}"
