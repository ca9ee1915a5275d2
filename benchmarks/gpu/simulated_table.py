"""What benchmarks.gpu.simulated has counted, as tables.

    python -m benchmarks.gpu.simulated_table FOLDER --to benchmarks/results/simulated-2026-11 --page docs/performance.md

The files in FOLDER are those of simulated.py; what counts.json has of others stays. Writes counts.json and results.md,
which says everything, and puts the page's tables in place of those that it has.
"""

import argparse
import json
import re
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
from benchmarks.gpu.simulated import COUNTS

GiB = 2**30
Results = dict[str, dict[str, Any]]
NAMES = [count.name for count in COUNTS]
RECIPES = [name.partition("-")[2] for name in NAMES if name.startswith("recipes-") and name.count("-") == 1]
PHASES = {"generate": "sampling", "score": "scoring", "train": "training"}
MOVERS = {
    ("recipes-single_gpu", "token"): "a token",
    ("recipes-single_gpu", "score"): "scoring",
    ("recipes-single_gpu", "train"): "training",
}
"""Measurements and phases whose largest operations are kept."""
FUSED = ("mul", "add", "pow", "mean", "silu", "silu_backward")
"""Those that only layers have: RMSNorm, rotation, SwiGLU, residuals and LoRA's sums."""


def collect(folder: Path, before: Results) -> dict[str, Any]:
    """Packages, and of everything that was counted its date, peaks, those of the plan, and phases; `before` is what is
    not counted again."""
    read = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    for name, found in read.items():
        for phase, counted in found["phases"].items():
            if (name, phase) not in MOVERS:
                del counted["movers"]
    kept = ("date", "planned_bytes", "peak_bytes", "phases")
    measured = {name: {key: found[key] for key in kept if key in found} for name, found in read.items()}
    return {
        "packages": next(iter(read.values()))["environment"]["packages"],
        "measured": {name: found for name, found in sorted({**before, **measured}.items()) if name in NAMES},
    }


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def peaks(results: Results) -> str:
    """Of the shipped recipes: measured beside planned, GB."""

    def rows() -> Iterator[list[str]]:
        for name, found in results.items():
            if planned := found.get("planned_bytes") if name.count("-") == 1 else None:
                recipe = name.partition("-")[2]
                pairs = [(found["phases"]["preflight"]["peak_bytes"], preflight_peak(planned_for(recipe)))]
                pairs += [(found["peak_bytes"][phase], planned[phase]) for phase in PHASES]
                cells = [f"{peak / 1e9:.2f} ({plan_ / 1e9:.2f}, {peak / plan_ - 1:+.0%})" for peak, plan_ in pairs]
                yield [f"`{recipe}.yaml`", *cells]

    return table(["recipe", "preflight", *PHASES.values()], rows())


def recipe_and_shape(name: str) -> tuple[Recipe, ModelShape]:
    recipe = load_recipe(find_recipe(name))
    return recipe, find_shape(recipe.model.name)


def planned_for(name: str) -> Plan:
    recipe, shape = recipe_and_shape(name)
    return plan(shape, recipe)


def preflight_peak(planned: Plan) -> int:
    """Of its pass of the largest example: as in training, but nothing is left of earlier passes, steps and rollouts."""
    absent = {"optimizer state": 1, "LoRA gradients": 1 / 2, "image features": 1}
    return int(sum(row.bytes * (1 - absent.get(row.part, 0)) for row in planned.rows if "train" in row.moments))


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


def peer_peak(found: dict[str, Any]) -> int:
    """Of the step: all but what was held before it."""
    return max(phase["peak_bytes"] for key, phase in found["phases"].items() if key != "outside")


def steps(results: Results, gpu: str) -> str:
    """One optimizer step of the peers' work, by phase."""
    head, own = f"peers-{gpu}-", peer_peak(results[f"peers-{gpu}-ours-row"])

    def rows() -> Iterator[list[str]]:
        for name, found in results.items():
            if name.startswith(head):
                phases = found["phases"]
                parts = ["prefill", "token", "score", "train"]
                yield [
                    name.removeprefix(head),
                    f"{peer_peak(found) / 1e9:.2f}",
                    f"{own / peer_peak(found):.2f}",
                    *(f"{phases[part]['launches']:,}" for part in parts),
                    *(f"{phases[part]['bytes'] / GiB:,.1f}" for part in parts),
                ]

    words = ("prefill", "token", "scoring", "training")
    columns = ("peak, GB", "ours-row to it", f"launches: {words[0]}", *words[1:], f"GiB: {words[0]}", *words[1:])
    return table(["", *columns], rows())


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
            f"{', '.join(sorted({found['date'] for found in results.values()}))}; {packages}.\n",
            "Counted on the null GPU (tools/null_gpu), not measured on a GPU. Layers are not compiled there, nobody's: "
            "compiled ones fuse the element-wise operations of scoring and training.\n",
            "## Peaks of PyTorch's allocator, GB (planned, difference)\n",
            peaks(results),
            "## One sampled token\n",
            tokens(results),
            "## A step of one prompt and 8 completions of 512 tokens, on an RTX 4090 (bfloat16)\n",
            steps(results, "rtx4090"),
            "## The same on a T4 (float16)\n",
            steps(results, "t4"),
            "## What moves the most bytes in `single_gpu.yaml`, GiB\n",
            f"Scoring and training are those of two steps, two passes each. {fused(results)}\n",
            movers(results),
        ]
    )


def page_tables(results: Results) -> list[str]:
    """Those of docs/performance.md, in its order."""
    by_gpu = [steps(results, gpu) for gpu in ("rtx4090", "t4")]
    return [peaks(results), tokens(results), *by_gpu, *map(times, ("single_gpu", "colab_t4", "qwen3_vl_4b"))]


def with_tables(page: str, tables: list[str]) -> str:
    """The page with these tables in place of its own; of those with the same head, the first in place of the first."""
    for head in dict.fromkeys(table.partition("\n")[0] for table in tables):
        new = iter([table for table in tables if table.startswith(head)])
        page = re.sub(re.escape(head) + r"\n(\|.*\n)+", lambda _, new=new: next(new), page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    options = parser.parse_args()
    collected = collect(options.folder, json.loads((options.to / "counts.json").read_text())["measured"])
    write_json(options.to / "counts.json", collected)
    (options.to / "results.md").write_text(report(collected))
    options.page.write_text(with_tables(options.page.read_text(), page_tables(collected["measured"])))


if __name__ == "__main__":
    main()
