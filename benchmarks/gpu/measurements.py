"""The measurements by name: what a child process runs for each. No torch here: the parent reads this table too."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]

CARDS = {"gpu_8gb": 8, "colab_t4": 15, "single_gpu": 24}
"""GiB on the card that each recipe is for, as its vendor counts them (a T4 has 15 of its 16 GB)."""

PEERS_CARD = CARDS["single_gpu"]


@dataclass(frozen=True)
class Setting:
    """What a measurement is made with."""

    size: str
    """Of the random model and of the work: `3b`, or `tiny` for a rehearsal."""
    folder: Path
    """Scratch: the model, runs, logs."""
    steps: int = 2
    """Optimizer steps that are timed, after one that is not: there kernels are compiled and buffers grow."""

    @property
    def model(self) -> Path:
        return self.folder / f"model-{self.size}"

    def fingerprint(self) -> dict[str, Any]:
        """A result is good for this setting and this code only."""
        digest = hashlib.sha256()
        for path in sorted(p for part in ("apo_lora", "benchmarks", "recipes") for p in (PROJECT / part).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(path.read_bytes())
        return {"size": self.size, "steps": self.steps, "code": digest.hexdigest()[:12]}


@dataclass(frozen=True)
class Measurement:
    name: str
    function: str
    """`module:function` in this package, called with (record, setting, **arguments)."""
    seconds: int
    """It is stopped after so long."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unsloth: bool = True
    """Is Unsloth imported, first of all? Not for stock TRL, which it would rewrite."""
    environment: Mapping[str, str] = field(default_factory=dict)


def _peer(name: str, engine: str, *, whole_group: bool, **environment: str) -> Measurement:
    arguments = {"engine": engine, "whole_group": whole_group}
    return Measurement(f"peers/{name}", "peers:measure", 300, arguments, engine != "trl", environment)


# In the order of what is worth knowing first, for a machine that is paid by the minute.
MEASUREMENTS = (
    Measurement("model", "random_model:measure", 240, unsloth=False),
    Measurement("smoke/bfloat16", "smoke:train_and_check", 420, {"dtype": "auto"}),
    Measurement("smoke/resume", "smoke_resume:resume_and_check", 300),
    Measurement("smoke/float16", "smoke:train_and_check", 420, {"dtype": "float16"}),
    *(
        Measurement(f"recipes/{recipe}", "recipes:measure", 480, {"name": recipe, "card": card})
        for recipe, card in CARDS.items()
    ),
    _peer("ours-group", "ours", whole_group=True),
    _peer("ours-row", "ours", whole_group=False),
    _peer("unsloth-default", "unsloth", whole_group=True),
    _peer("unsloth-thriftiest", "unsloth", whole_group=False, UNSLOTH_GRPO_LOGPROB_RECOMPUTE="1"),
    _peer("trl-group", "trl", whole_group=True),
    _peer("trl-row", "trl", whole_group=False),
    Measurement("sampling/transformers", "sampling:steps", 480, {"engine": "transformers"}),
    Measurement("sampling/vllm", "sampling:steps", 600, {"engine": "vllm"}),
    Measurement("sampling/vllm-ahead", "sampling:steps", 600, {"engine": "vllm", "ahead": 1}),
    Measurement("sampling/transformers-16", "sampling:steps", 480, {"engine": "transformers", "generations": 16}),
    Measurement("sampling/vllm-16", "sampling:steps", 600, {"engine": "vllm", "generations": 16}),
    Measurement("sampling/vllm-ahead-16", "sampling:steps", 600, {"engine": "vllm", "ahead": 1, "generations": 16}),
    Measurement("sampling/ragged", "sampling:ragged", 600),
)


def selected(only: str) -> list[Measurement]:
    """Those whose name begins with one of the comma-separated words; everything for an empty text."""
    words = [word for word in only.split(",") if word] or [""]
    if unknown := [word for word in words if not any(m.name.startswith(word) for m in MEASUREMENTS)]:
        raise ValueError(f"no measurement begins with {', '.join(unknown)}: {', '.join(m.name for m in MEASUREMENTS)}")
    return [m for m in MEASUREMENTS if any(m.name.startswith(word) for word in words)]
