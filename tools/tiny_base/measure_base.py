"""What a tiny base can do, measured by sampling on test boards through the saved folder, as a user would load it."""

from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from apo_lora.tiny.boards import LEVELS, general_rows, reasoning_rows
from tools.tiny_base.chains import num_recounts, stated_answer

MAX_NEW_TOKENS = 128
BATCH_SIZE = 64


class Attempt(NamedTuple):
    row: dict[str, Any]
    completion: str
    num_tokens: int
    ended: bool

    @property
    def right(self) -> bool:
        return self.ended and stated_answer(self.completion) == self.row["answer"]


def measure_base(folder: Path, *, num_rows: int = 600, seed: int = 0) -> dict[str, Any]:
    """Figures of the base in `folder`, loaded in float32. Sampling is at temperature 1 except for `greedy_accuracy`."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(seed)

    reasoning = reasoning_rows(num_rows, split="test", seed=seed)
    sampled = answer_rows(model, processor, reasoning)
    general = answer_rows(model, processor, general_rows(num_rows, split="test", seed=seed))
    greedy = answer_rows(model, processor, reasoning, greedy=True)

    by_level = {f"level{level}": [a for a in sampled if a.row["category"] == f"level{level}"] for level in LEVELS}
    by_recounts: dict[int, list[Attempt]] = {}
    for attempt in sampled:
        by_recounts.setdefault(num_recounts(attempt.completion), []).append(attempt)
    return {
        "num_rows": num_rows,
        "seed": seed,
        "max_new_tokens": MAX_NEW_TOKENS,
        "accuracy": _accuracy(sampled),
        "accuracy_by_level": {level: _accuracy(attempts) for level, attempts in by_level.items()},
        "accuracy_by_recounts": {
            str(recounts): {
                "share": round(len(attempts) / len(sampled), 3),
                "accuracy": _accuracy(attempts),
                "tokens": _mean_tokens(attempts),
            }
            for recounts, attempts in sorted(by_recounts.items())
        },
        "tokens_right": _mean_tokens([a for a in sampled if a.right]),
        "tokens_wrong": _mean_tokens([a for a in sampled if not a.right]),
        "truncated": round(mean(not a.ended for a in sampled), 4),
        "greedy_accuracy": _accuracy(greedy),
        "greedy_tokens": _mean_tokens(greedy),
        "general_accuracy": _accuracy(general),
        "general_accuracy_color": _accuracy([a for a in general if "color" in a.row["problem"]]),
        "general_accuracy_shape": _accuracy([a for a in general if "shape" in a.row["problem"]]),
    }


@torch.no_grad()
def answer_rows(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    rows: list[dict[str, Any]],
    *,
    greedy: bool = False,
) -> list[Attempt]:
    """One completion for each row."""
    tokenizer = processor.tokenizer
    how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} if greedy else {}
    attempts = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        prompts = []
        for row in batch:
            content = [{"type": "image"}, {"type": "text", "text": row["problem"]}]
            messages = [{"role": "user", "content": content}]
            prompts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        inputs = processor(
            images=[row["image"] for row in batch], text=prompts, padding=True, padding_side="left", return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **how)
        for row, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ended = tokenizer.eos_token_id in ids
            num_tokens = ids.index(tokenizer.eos_token_id) + 1 if ended else len(ids)
            attempts.append(Attempt(row, tokenizer.decode(ids[: num_tokens - ended]), num_tokens, ended))
    return attempts


def _accuracy(attempts: list[Attempt]) -> float:
    return round(mean(a.right for a in attempts), 3)


def _mean_tokens(attempts: list[Attempt]) -> float | None:
    return round(mean(a.num_tokens for a in attempts), 1) if attempts else None
