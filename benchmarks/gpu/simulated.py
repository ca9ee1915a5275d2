"""The suite on the null GPU: operations, launches, bytes and the allocator's peaks of every recipe and peer, by phase.

    python -m benchmarks.gpu.simulated --out FOLDER [--only recipes-single_gpu,peers-t4] [--passes 2] [--steps 1]

The exact 3B in 4-bit (and Qwen3-VL of each recipe's size), the recipe's card, trainer and rollout, with prompts and
completions of full length; one JSON file per count. What it shows and what it does not: README.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.measurements import MEASUREMENTS, Measurement

ROOT = Path(__file__).parents[2]
GPUS = {
    "rtx3070": {"NULLGPU_CC": "86", "NULLGPU_BYTES": str(8 * 2**30), "NULLGPU_SMS": "46"},
    "t4": {"NULLGPU_CC": "75", "NULLGPU_BYTES": str(15 * 2**30), "NULLGPU_SMS": "40"},  # it has no bfloat16
    "rtx4090": {"NULLGPU_CC": "89", "NULLGPU_BYTES": str(24 * 2**30), "NULLGPU_SMS": "128"},
}
"""Compute capability, memory and multiprocessors: which kernels are chosen depends on them. Of the two that have
bfloat16, bitsandbytes alone tells one from the other: a process that has imported Unsloth for one counts for both."""


@dataclass(frozen=True)
class Count:
    name: str
    """Of the file."""
    measurement: Measurement
    gpu: str
    size: str = "3b"
    """Of the random model."""
    overrides: tuple[str, ...] = ()
    stock_attention: bool = False
    """Sample as transformers and Unsloth do."""
    passes: int | None = None
    """Of a step, all alike, that are done: all where it is None."""
    steps: int = 1
    """Optimizer steps. From the second on there is optimizer state throughout."""


def _recipe(name: str, gpu: str, variant: str = "", *overrides: str, size: str = "3b", **options: bool) -> Count:
    measurement = next(m for m in MEASUREMENTS if m.name == "recipes/single_gpu")
    arguments = {"name": name, "card": int(GPUS[gpu]["NULLGPU_BYTES"]) / 2**30}
    by_unsloth = "model.engine=transformers" not in overrides
    measurement = replace(measurement, name=f"recipes/{name}", arguments=arguments, unsloth=by_unsloth)
    return Count(f"recipes-{name}{variant}", measurement, gpu, size, overrides, passes=2, steps=2, **options)


COUNTS = (
    _recipe("gpu_8gb", "rtx3070"),
    _recipe("qwen3_vl_2b_8gb", "rtx3070", size="qwen3-vl-2b"),
    _recipe("colab_t4", "t4"),
    _recipe("single_gpu", "rtx4090"),
    _recipe("qwen3_vl_4b", "rtx4090", size="qwen3-vl-4b"),
    _recipe("single_gpu", "rtx4090", "-stock", stock_attention=True),
    _recipe("single_gpu", "rtx4090", "-transformers", "model.engine=transformers"),
    _recipe("single_gpu", "rtx4090", "-transformers-stock", "model.engine=transformers", stock_attention=True),
    *(
        Count(f"peers-{gpu}-{m.name.partition('/')[2]}", m, gpu)
        for gpu in ("rtx4090", "t4")
        for m in MEASUREMENTS
        if m.name.startswith("peers")
    ),
)


def selected(only: str) -> list[Count]:
    """Those of these names or, where a word is no count's name, of names that begin with it; all for an empty text."""
    names, words = {count.name for count in COUNTS}, only.split(",")
    return [c for c in COUNTS if any(c.name == word if word in names else c.name.startswith(word) for word in words)]


def groups(counts: list[Count]) -> Iterator[list[Count]]:
    """Those that one process can make: it imports Unsloth, which rewrites TRL, or not; its GPU has bfloat16 or not."""
    for on_t4 in (False, True):
        for unsloth in (True, False):
            if group := [c for c in counts if (c.gpu == "t4", c.measurement.unsloth) == (on_t4, unsloth)]:
                yield group


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--only", default="", help="counts by name, or how their names begin, separated by commas")
    parser.add_argument("--passes", help="of a step that are done (default: two of recipes, all of peers)")
    parser.add_argument("--steps", help="optimizer steps (default: two of recipes, one of peers)")
    parser.add_argument("--scratch", type=Path, help="folder for models and runs (default: a temporary one)")
    options = parser.parse_args()
    counts = selected(options.only)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        for group in groups(counts):
            names = [count.name for count in group]
            command = [
                *(sys.executable, "-m", "tools.null_gpu", "-m", "benchmarks.gpu.simulated_child", *names),
                *("--out", options.out.absolute(), "--scratch", scratch.absolute()),
                *(("--passes", options.passes) if options.passes else ()),
                *(("--steps", options.steps) if options.steps else ()),
            ]
            if subprocess.run(command, cwd=scratch, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode:
                failed.append(names)
    return f"failed: {failed}" if failed else 0


if __name__ == "__main__":
    sys.exit(main())
