"""Make the tiny base from a seed, on one CPU thread.

    python -m tools.tiny_base.make_base --seed 0 --out DIR       trains, saves, measures (see training_record.json)
    python -m tools.tiny_base.make_base --evaluate DIR           measures a base that exists
    python -m tools.tiny_base.make_base --habits even --out DIR  teaches the embedded base other habits

Three stages: `see` (which cell holds what, which cells hold a colour), `answer` (clean chains and general questions)
and `habits` (the mix with overthinking). The first two last until their lessons are learned, at a constant learning
rate, so that a seed that learns late gets its time; the learning rate decays only in the last. Every batch is of newly
drawn boards, so the accuracy on the batches themselves is the measure. Other habits than the embedded base's own are
taught to that base, by the last stage alone.
"""

import argparse
import hashlib
import json
import platform
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from tools.tiny_base.chains import HABITS

BATCH_SIZE = 32
WARMUP_STEPS = 50
MUON_LR = 4e-3
ADAMW_LR = 2e-3
# A tenth of ADAMW_LR. Four tenths and the whole learned neither faster nor slower in 450 steps of `see`.
PATCH_EMBED_LR = 2e-4
GATE_BATCHES = 20
EMBEDDED = "overthinking"


@dataclass(frozen=True)
class Stage:
    name: str
    cycle: tuple[str, ...]
    """Lessons in turn, one kind a batch."""
    max_steps: int
    gates: tuple[tuple[str, float], ...] = ()
    """(lesson, accuracy): the stage ends early once every gate is met over its lesson's last GATE_BATCHES batches."""
    decays: bool = False


STAGES = (
    Stage("see", ("cells", "colors", "clean_general"), max_steps=1200, gates=(("cells", 0.97), ("colors", 0.97))),
    Stage(
        "answer",
        ("clean_reasoning", "clean_general", "clean_reasoning", "cells", "clean_general", "clean_general", "colors"),
        max_steps=1500,
        # Two tokens of a general answer are learned, the word and the end of the turn: 0.97 is 94 of 100 words right.
        gates=(("clean_reasoning", 0.985), ("clean_general", 0.97)),
    ),
    Stage(
        "habits",
        ("reasoning", "reasoning", "reasoning", "general", "reasoning", "cells", "general"),
        max_steps=700,
        decays=True,
    ),
)


def train_base(seed: int, habits: str = EMBEDDED) -> tuple[Any, Any, dict[str, Any]]:
    """(model, processor, what each stage took)."""
    import torch
    from tqdm import tqdm

    torch.manual_seed(seed)
    model, processor = fresh_model() if habits == EMBEDDED else embedded_model()
    teacher = Teacher(model.train(), processor, seed, habits)
    course = STAGES if habits == EMBEDDED else STAGES[-1:]
    stages = {}
    with tqdm(total=sum(stage.max_steps for stage in course), unit="step", smoothing=0.05) as bar:
        for stage in course:
            stages[stage.name] = teacher.teach(stage, bar)
            bar.total -= stage.max_steps - stages[stage.name]["steps"]
            bar.write(f"{stage.name}: {time.process_time():.0f} CPU s, {stages[stage.name]}")
    return model.eval(), processor, stages


def fresh_model() -> tuple[Any, Any]:
    from tools.tiny_base.architecture import build_model, build_processor

    processor = build_processor()
    return build_model(processor.tokenizer), processor


def embedded_model() -> tuple[Any, Any]:
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    from apo_lora.tiny import BASE_DIR

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE_DIR, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(BASE_DIR, trust_remote_code=False)


class Teacher:
    """One model, its optimizers and an endless supply of lessons."""

    def __init__(self, model, processor, seed: int, habits: str):
        from tools.tiny_base.lessons import Batcher

        self.model = model
        self.rng = random.Random(f"base {seed}")
        self.batcher = Batcher(processor, seed)
        self.optimizers = build_optimizers(model)
        self.lesson_makers = lesson_makers(self.rng, habits)
        self.steps_done = 0

    def teach(self, stage: Stage, bar) -> dict[str, Any]:
        """Run one stage; how many steps it took, whether its gates were met, and the last token accuracies."""
        recent = {name: deque(maxlen=GATE_BATCHES) for name in stage.cycle}
        queues = {name: LessonQueue(self.lesson_makers[name], self.rng) for name in stage.cycle}
        gates_met = False
        bar.set_description(stage.name)
        for step in range(stage.max_steps):
            name = stage.cycle[step % len(stage.cycle)]
            lr_share = 1 - step / stage.max_steps if stage.decays else min(1.0, (self.steps_done + 1) / WARMUP_STEPS)
            recent[name].append(self.learn(queues[name], lr_share))
            bar.update()
            if step % 20 == 19:
                bar.set_postfix({name: f"{mean(values):.3f}" for name, values in recent.items() if values})
            gates_met = all(len(recent[n]) == GATE_BATCHES and mean(recent[n]) >= gate for n, gate in stage.gates)
            if stage.gates and gates_met:
                break
        return {
            "steps": step + 1,
            "gates": dict(stage.gates),
            "gates_met": gates_met,
            "token_accuracy": {name: round(mean(values), 4) for name, values in recent.items()},
        }

    def learn(self, queue: "LessonQueue", lr_share: float) -> float:
        """One optimizer step; the token accuracy before it."""
        import torch

        lessons, weight = queue.next_batch()
        batch = self.batcher(lessons, self.rng)
        output = self.model(**batch)
        (output.loss * weight).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * lr_share
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.steps_done += 1
        return token_accuracy(output.logits, batch["labels"])


def lesson_makers(rng: random.Random, habits: str) -> dict[str, Callable]:
    from tools.tiny_base.chains import CLEAN, HABITS
    from tools.tiny_base.lessons import (
        cells_lesson,
        clean_general_lesson,
        colors_lesson,
        general_lesson,
        reasoning_lesson,
    )

    return {
        "cells": lambda: cells_lesson(rng),
        "colors": lambda: colors_lesson(rng),
        "clean_general": lambda: clean_general_lesson(rng),
        "general": lambda: general_lesson(rng, HABITS[habits]),
        "clean_reasoning": lambda: reasoning_lesson(rng, CLEAN),
        "reasoning": lambda: reasoning_lesson(rng, HABITS[habits]),
    }


class LessonQueue:
    """Batches of one kind of lesson, of similar length each, so that little is padding.

    Each comes with a weight, its length over the mean length: the loss is a mean over the tokens of a batch, and
    without the weight a short chain's tokens would count more than a long one's. The model would then ramble less
    often than it is taught to.
    """

    BATCHES_AHEAD = 8

    def __init__(self, make_lesson: Callable, rng: random.Random):
        self.make_lesson = make_lesson
        self.rng = rng
        self.batches: list[tuple[list, float]] = []

    def next_batch(self) -> tuple[list, float]:
        if not self.batches:
            lessons = [self.make_lesson() for _ in range(BATCH_SIZE * self.BATCHES_AHEAD)]
            lessons.sort(key=num_characters)
            mean_length = mean(map(num_characters, lessons))
            for start in range(0, len(lessons), BATCH_SIZE):
                batch = lessons[start : start + BATCH_SIZE]
                self.batches.append((batch, mean(map(num_characters, batch)) / mean_length))
            self.rng.shuffle(self.batches)
        return self.batches.pop()


def num_characters(lesson) -> int:
    return sum(len(text) for text, _ in lesson.segments)


def build_optimizers(model) -> list:
    """Muon for the matrices inside the layers, AdamW for the rest.

    AdamW alone got 0.68 of the tokens of `cells` right after 400 steps, where this gets 0.96.
    """
    import torch

    groups: dict[str, list] = {"matrices": [], "patch_embed": [], "rest": []}
    for name, parameter in model.named_parameters():
        if "patch_embed" in name:
            groups["patch_embed"].append(parameter)
        elif parameter.ndim == 2 and "embed" not in name:
            groups["matrices"].append(parameter)
        else:
            groups["rest"].append(parameter)
    optimizers = [
        torch.optim.Muon(groups["matrices"], lr=MUON_LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": groups["rest"], "lr": ADAMW_LR}, {"params": groups["patch_embed"], "lr": PATCH_EMBED_LR}],
            betas=(0.9, 0.98),
            weight_decay=0.01,
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def token_accuracy(logits_BTV, labels_BT) -> float:
    """Share of learned tokens that the model would have said itself."""
    wanted = labels_BT[:, 1:]
    hits = logits_BTV[:, :-1].argmax(-1) == wanted
    return hits[wanted != -100].float().mean().item()


def save_base(model, processor, folder: Path) -> str:
    """Write a standard folder with fp16 weights; their sha256."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make or measure the tiny base.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--habits", choices=HABITS, default=EMBEDDED, help="how it is to reason")
    parser.add_argument("--out", type=Path, help="folder to write the base to")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the base in DIR instead of making one")
    args = parser.parse_args()
    if (args.out is None) == (args.evaluate is None):
        parser.error("give one of --out and --evaluate")

    import torch

    from tools.tiny_base.measure_base import measure_base

    torch.set_num_threads(1)
    if args.evaluate:
        print(json.dumps(measure_base(args.evaluate), indent=2))
        return

    model, processor, stages = train_base(args.seed, args.habits)
    training_seconds = round(time.process_time())
    sha256 = save_base(model, processor, args.out)
    record = {
        "command": f"python -m tools.tiny_base.make_base --seed {args.seed} --habits {args.habits} --out DIR",
        "seed": args.seed,
        "habits": args.habits,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_cpu_seconds": training_seconds,
        "stages": stages,
        "evaluation": measure_base(args.out),
        "sha256": {"model.safetensors": sha256},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow")},
        },
    }
    (args.out / "training_record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
