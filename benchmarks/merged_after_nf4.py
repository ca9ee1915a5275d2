"""What a merge keeps of a run trained on NF4: `--onto trained` and `original` against the adapter on its 4-bit base.

    python -m benchmarks.merged_after_nf4 RUNS --out FILE.json        (20 minutes; the embedded model, a CPU)

Trains the tiny recipe on NF4 at each seed (a run that is in the folder RUNS already is kept), merges it both ways, and
answers the same held-out boards greedily by `apo-lora eval`. Differences are paired by item: by seed with Newcombe's
interval, over all seeds as the mean over items of the seeds' mean (bootstrap over items). All intervals are 95 %. The
log-probs are those of the export's check, always against the adapter on the 4-bit base.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from apo_lora.commands.main import main as apo_lora
from apo_lora.evaluation.figures import compared, summary
from apo_lora.evaluation.statistics import bootstrap_interval
from apo_lora.export import ONTO
from apo_lora.export.base import find_base
from apo_lora.export.comparison import compare
from apo_lora.machine.versions import environment
from apo_lora.run.adapter import find_adapter
from apo_lora.run.files import read_jsonl, write_json

ADAPTER = "adapter"


def measure(run: Path, seed: int, items: int) -> None:
    """Trains, exports and evaluates what is not there yet."""
    if not (run / "adapter").exists():
        _do("train", "--recipe", "tiny_cpu", "model.load_in_4bit=true", f"train.seed={seed}", f"output.dir={run}")
    _do("eval", str(run), "--limit", str(items), "--name", ADAPTER)
    for onto in ONTO:
        merged = run / f"merged_{onto}"
        if not merged.exists():
            _do("export", str(run), "--to", "merged", "--onto", onto, "--out", str(merged))
        _do("eval", str(run), "--limit", str(items), "--name", onto, "--model", str(merged))


def _do(*arguments: str) -> None:
    if code := apo_lora(list(arguments)):
        raise SystemExit(code)


def answers(run: Path, name: str, model: str = "tuned") -> dict[str, list[dict[str, Any]]]:
    """Rows of an evaluation by set."""
    by_set: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(run / "evaluations" / name / "answers.jsonl"):
        if row["model"] == model:
            by_set.setdefault(row["set"], []).append(row)
    return by_set


def of_run(run: Path) -> dict[str, Any]:
    trained, base = answers(run, ADAPTER), answers(run, ADAPTER, "base")
    figures: dict[str, Any] = {
        title: {"base in 4 bits": _short(summary(base[title])), "adapter on it": _short(summary(rows))}
        for title, rows in trained.items()
    }
    source = find_adapter(run)
    for onto in ONTO:
        gaps = compare(run / f"merged_{onto}", find_base(source, "trained"), source)
        figures[f"log-probs, {onto}"] = {of.kind: {"effect": of.effect, "gap": of.gap} for of in gaps}
        for title, rows in answers(run, onto).items():
            pairs = list(zip(rows, trained[title], strict=True))
            difference = compared([row | {"model": "base"} for row in trained[title]], rows)
            figures[title][onto] = _short(summary(rows)) | {
                "less_adapter": _short(difference) | {"sign_test_p": difference["sign_test_p"]},
                "same_verdict": sum(one["correct"] == other["correct"] for one, other in pairs) / len(pairs),
                "same_text": sum(one["text"] == other["text"] for one, other in pairs) / len(pairs),
            }
    return figures


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: figures[key] for key in ("items", "accuracy", "accuracy_95_low", "accuracy_95_high")}


def over_seeds(runs: list[Path]) -> dict[str, Any]:
    """Accuracy of one less that of the other, by set."""
    right = {name: _right(runs, name) for name in (ADAPTER, *ONTO)}
    return {
        f"{one} less {other}": {title: _mean(right[one][title], right[other][title]) for title in right[one]}
        for one, other in (("trained", ADAPTER), ("original", ADAPTER), ("original", "trained"))
    }


def _right(runs: list[Path], name: str) -> dict[str, list[float]]:
    """By set and item, the share of the runs that answer it correctly."""
    by_run = [answers(run, name) for run in runs]
    shares = {}
    for title in by_run[0]:
        of_item = zip(*(by_set[title] for by_set in by_run), strict=True)
        shares[title] = [sum(row["correct"] for row in rows) / len(rows) for rows in of_item]
    return shares


def _mean(one: list[float], other: list[float]) -> dict[str, float]:
    differences = [a - b for a, b in zip(one, other, strict=True)]
    low, high = bootstrap_interval(differences)
    return {"items": len(differences), "accuracy": sum(differences) / len(differences), "95_low": low, "95_high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=500)
    asked = parser.parse_args()
    runs = [asked.runs / f"seed{seed}" for seed in range(asked.seeds)]
    for seed, run in enumerate(runs):
        measure(run, seed, asked.items)
    write_json(asked.out, {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "by_seed": {run.name: of_run(run) for run in runs},
        "over_seeds": over_seeds(runs),
    })  # fmt: skip


if __name__ == "__main__":
    main()
