"""What benchmarks.gpu.simulated has counted, as tables.

    python -m benchmarks.gpu.simulated_table FOLDER          (writes counts.json and results.md beside the files in it)

The files in FOLDER are named by what was measured: recipes-NAME, recipes-NAME-stock (--stock-attention),
recipes-NAME-transformers (model.engine=transformers), peers-NAME. results.md says everything, and performance.md in the
documentation has its first tables.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apo_lora.family.lookup import find_shape
from apo_lora.family.shape import ModelShape
from apo_lora.preflight.memory_plan import Plan, plan
from apo_lora.preflight.time_plan import time_table
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.recipe.schema import Recipe
from apo_lora.run.files import write_json

GiB = 2**30
Results = dict[str, dict[str, Any]]
PHASES = {"generate": "sampling", "score": "scoring", "train": "training"}
MOVERS = {
    ("recipes-single_gpu", "token"): "a token",
    ("recipes-single_gpu", "score"): "scoring",
    ("recipes-single_gpu", "train"): "training",
}
"""Measurements and phases whose largest operations are kept."""
FUSED = ("mul", "add", "pow", "mean", "silu", "silu_backward")
"""Those that only layers have: RMSNorm, rotation, SwiGLU, residuals and LoRA's sums."""


def collect(folder: Path) -> dict[str, Any]:
    """Dates and packages, and of everything that was measured peaks, those of the plan, and phases."""
    files = [file for file in sorted(folder.glob("*.json")) if file.stem != "counts"]
    read = {file.stem: json.loads(file.read_text()) for file in files}
    for name, found in read.items():
        for phase, counted in found["phases"].items():
            if (name, phase) not in MOVERS:
                del counted["movers"]
    kept = ("planned_bytes", "peak_bytes", "phases")
    return {
        "dates": sorted({found["date"] for found in read.values()}),
        "packages": next(iter(read.values()))["environment"]["packages"],
        "measured": {name: {key: found[key] for key in kept if key in found} for name, found in read.items()},
    }


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def peaks(results: Results) -> str:
    """Of the shipped recipes: measured beside planned, GB."""

    def rows() -> Iterator[list[str]]:
        for name, found in results.items():
            if planned := found.get("planned_bytes") if name.count("-") == 1 else None:
                cells = [
                    f"{found['peak_bytes'][phase] / 1e9:.2f} ({planned[phase] / 1e9:.2f}, "
                    f"{found['peak_bytes'][phase] / planned[phase] - 1:+.0%})"
                    for phase in PHASES
                ]
                yield [f"`{name.partition('-')[2]}.yaml`", *cells]

    return table(["recipe", *PHASES.values()], rows())


def recipe_and_shape(name: str) -> tuple[Recipe, ModelShape]:
    recipe = load_recipe(find_recipe(name))
    return recipe, find_shape(recipe.model.name)


def planned(name: str) -> Plan:
    recipe, shape = recipe_and_shape(name)
    return plan(shape, recipe)


def times(name: str) -> str:
    """As `apo-lora plan` prints them."""
    recipe, shape = recipe_and_shape(name)
    head, *rows = time_table(shape, recipe)
    return table(head, iter(rows))


def least_bytes_of_a_token(name: str, *, in_4bit: bool = True) -> int:
    """The language model's weights in 4 bits or 16, lm_head, and the cache, each read once."""
    recipe, shape = recipe_and_shape(name)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"load_in_4bit": in_4bit})})
    parts = ("language attention", "language mlp", "embedding = lm_head", "KV cache")
    rows = plan(shape, recipe).rows
    return sum(row.bytes for row in rows if row.part.startswith(parts) and "decode" in row.moments)


def tokens(results: Results) -> str:
    """One sampled token of the whole rollout, by recipe and by who samples."""

    def rows() -> Iterator[list[str]]:
        for name, found in results.items():
            if name.startswith("recipes-"):
                recipe = name.split("-")[1]
                engine = "transformers" if "transformers" in name else "Unsloth"
                attention = "repeated" if name.endswith("stock") else "not repeated"
                token = found["phases"]["token"]
                least = [least_bytes_of_a_token(recipe, in_4bit=in_4bit) for in_4bit in (True, False)]
                shares = [f"{token['bytes'] / bytes_:.2f}" for bytes_ in least]
                counts = [f"{token[kind]:,}" for kind in ("operations", "launches")]
                yield [f"`{recipe}.yaml`", engine, attention, f"{token['bytes'] / GiB:.1f}", *shares, *counts]

    head = ["recipe", "generate()", "keys and values", "GiB", "of 4-bit weights and cache", "of 16-bit", "operations"]
    return table([*head, "launches"], rows())


def steps(results: Results) -> str:
    """One optimizer step of the peers' work, by phase."""

    def rows() -> Iterator[list[str]]:
        for name, found in results.items():
            if name.startswith("peers-"):
                phases = found["phases"]
                parts = ["prefill", "token", "score", "train"]
                peak = max(phase["peak_bytes"] for key, phase in phases.items() if key != "outside")
                yield [
                    name.partition("-")[2],
                    f"{peak / 1e9:.2f}",
                    *(f"{phases[part]['launches']:,}" for part in parts),
                    *(f"{phases[part]['bytes'] / GiB:,.1f}" for part in parts),
                ]

    words = ("prefill", "token", "scoring", "training")
    return table(["", "peak, GB", *(f"launches: {words[0]}", *words[1:]), *(f"GiB: {words[0]}", *words[1:])], rows())


def movers(results: Results) -> str:
    """The ten operations that move the most bytes, in GiB, by phase."""
    found = [results[name]["phases"][phase]["movers"] for name, phase in MOVERS]
    columns = [[f"{operation} {counts['bytes'] / GiB:.1f}" for operation, counts in part.items()] for part in found]
    return table(list(MOVERS.values()), map(list, zip(*columns, strict=True)))


def fused(results: Results) -> str:
    """Which of the movers a compiler fuses, and their share of a phase's bytes."""
    shares = [
        f"{sum(counts['bytes'] for name, counts in part['movers'].items() if name in FUSED) / part['bytes']:.0%}"
        for part in (results["recipes-single_gpu"]["phases"][phase] for phase in ("score", "train"))
    ]
    return (
        f"{', '.join(FUSED[:-1])} and {FUSED[-1]} are the layers' own element-wise operations, {shares[0]} of the "
        f"bytes of scoring and {shares[1]} of those of training: left as they are, since a compiled layer fuses them."
    )


def report(collected: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in collected["packages"].items() if version)
    results = collected["measured"]
    return "\n".join(
        [
            "# On a simulated device\n",
            f"{', '.join(collected['dates'])}; {packages}.\n",
            "Counted on the null GPU (tools/null_gpu), not measured on a GPU. Layers are not compiled there, nobody's: "
            "compiled ones fuse the element-wise operations of scoring and training.\n",
            "## Peaks of PyTorch's allocator, GB (planned, difference)\n",
            peaks(results),
            "## One sampled token\n",
            tokens(results),
            "## A step of one prompt and 8 completions of 512 tokens\n",
            steps(results),
            "## What moves the most bytes in `single_gpu.yaml`, GiB\n",
            f"Scoring is that of two rollouts, 32 passes; training is four passes. {fused(results)}\n",
            movers(results),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    results = collect(folder)
    write_json(folder / "counts.json", results)
    (folder / "results.md").write_text(report(results))


if __name__ == "__main__":
    main()
