"""The answers of runs that a report shows, each under a title."""

from collections import deque
from collections.abc import Iterator, Sequence

from apo_lora.evaluation.figures import AnswerPair, paired
from apo_lora.evaluation.gallery import AnswerSource
from apo_lora.report.runs import OWN_ANSWERS, Run, answer_files, prompt_groups, read_answers

TRAINING_GROUPS = 24
"""Prompts of the last steps that are shown."""


def answer_sources(runs: Sequence[Run]) -> list[AnswerSource]:
    return [source for run in runs for source in _sources(run, [] if len(runs) == 1 else [run.name])]


def _sources(run: Run, prefix: list[str]) -> Iterator[AnswerSource]:
    """Held-out answers; where the tuned model has none, completions of the last training steps too."""
    root, has_tuned = run.folder.path, False
    for title, path in answer_files(run).items():
        pairs = paired(read_answers(path))
        has_tuned = has_tuned or any(pair.tuned for pair in pairs)
        parts = prefix if prefix and title == OWN_ANSWERS else [*prefix, title]
        yield AnswerSource(", ".join(parts), pairs, root)
    if not has_tuned:
        last = deque(prompt_groups(run), maxlen=TRAINING_GROUPS)
        yield AnswerSource(
            ", ".join([*prefix, "training, last steps"]),
            # Training rows were answered by the tuned model at that step.
            [AnswerPair(None, row) for group in reversed(last) for row in group],
            root,
            reward_names=run.recipe.rewards.functions,
            note="There are no held-out answers of the tuned model (answers.jsonl). These are completions of the last "
            "training steps, newest first.",
        )
