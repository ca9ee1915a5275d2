"""Everything of docs/experiments, from nothing:

    python -m benchmarks.evidence [--out runs/evidence] [--results DIR]      (under 90 minutes on two idle cores)

Makes the bases and the questions, runs five sweeps, and writes figures, tables and pictures to --results. What is there
already is kept, as `apo-lora sweep` does: the same command continues after an interrupt.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from apo_lora.report.comparison import format_estimate
from apo_lora.report.runs import Run, read_run
from apo_lora.run.files import write_atomically, write_json
from apo_lora.run.tables import markdown
from apo_lora.sweep.experiment import load_experiment
from apo_lora.sweep.findings import now
from apo_lora.sweep.sweep import sweep
from benchmarks.evidence import pictures
from benchmarks.evidence.figures import EVEN, MIXED, Figure, mean_kl_weight, measured, pooled
from benchmarks.evidence.tasks import make_bases, write_tasks

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "evidence-2026-11"
BETAS = (0.01, 0.04, 0.16, 0.64)
CAPTION = "embedded model of 0.8 M parameters, on a task built to isolate this mechanism"
TASKS = {"even": "the task built to isolate STCR", "mixed": "the task built to isolate DADS"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="runs, bases and questions")
    parser.add_argument("--results", type=Path, default=RESULTS, help="figures, tables and pictures")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), help="instead of 1,2,3,4,5")
    args = parser.parse_args(arguments)
    make_bases(args.out / "bases")
    write_tasks(args.out / "tasks")
    args.results.mkdir(parents=True, exist_ok=True)
    lab = Lab(args.out, args.results, args.seeds)
    stcr(lab)
    dads(lab)
    released(lab, "even", EVEN)
    released(lab, "mixed", MIXED)
    return 1 if lab.failed else 0


class Lab:
    """Where things are, and how an experiment is run there."""

    def __init__(self, out: Path, results: Path, seeds: tuple[int, ...] | None):
        self.out, self.results, self.seeds = out, results, seeds
        self.failed = False
        tasks = out / "tasks"
        self.overrides = {
            "even": (f"model.name={out / 'bases' / 'even'}",),
            "mixed": (
                f"model.name={out / 'bases' / 'confused'}",
                f"data.train={tasks / 'mixed_train.parquet'}",
                f"data.eval={tasks / 'mixed_eval.parquet'}",
                f"data.general={tasks / 'general_eval.parquet'}",
            ),
        }

    def runs(self, experiment: Path, task: str) -> dict[str, list[Run]]:
        """Runs what is left of it, and returns all by variant."""
        out = self.out / experiment.stem
        self.failed |= bool(sweep(str(experiment), self.overrides[task], out=out, seeds=self.seeds))
        return {
            variant: [read_run(path) for path in sorted((out / variant).glob("seed-*"))]
            for variant in load_experiment(experiment).variants
        }

    def write(
        self, name: str, caption: str, groups: dict[str, list[Run]], figures: Sequence[Figure], found: dict[str, Any]
    ) -> None:
        some = next(iter(groups.values()))[0]
        recipe = some.recipe.model_dump(mode="json")
        del recipe["train"]["seed"], recipe["output"]["dir"]
        facts = {"date": now(), "cpu_cores": os.cpu_count(), "environment": some.environment, "recipe": recipe}
        write_json(self.results / f"{name}.json", {**facts, **found})
        write_atomically(self.results / f"{name}.md", f"{caption}.\n\n{tables(found, figures)}")


def stcr(lab: Lab) -> None:
    groups = lab.runs(HERE / "stcr.yaml", "even")
    found = {"figures": measured(groups, EVEN, [(label, "GRPO") for label in list(groups)[1:]])}
    caption = f"STCR by its base: {CAPTION}"
    lab.write("stcr", caption, groups, EVEN, found)
    keys = ("length_wrong", "length_correct", "accuracy", "entropy")
    (lab.results / "stcr.png").write_bytes(pictures.ends(found["figures"], keys, caption))


def dads(lab: Lab) -> None:
    groups = lab.runs(HERE / "dads.yaml", "mixed")
    means = {beta: mean_kl_weight(groups[f"DADS-{beta:g}"]) for beta in BETAS}
    groups |= lab.runs(_with_mean_weights(lab.out / "dads_mean.yaml", means), "mixed")
    others = {name: [(f"DADS-{beta:g}", f"{name}-{beta:g}") for beta in BETAS] for name in ("GRPO", "mean")}
    figures = measured(groups, MIXED, [pair for pairs in others.values() for pair in pairs])
    found = {
        "mean_weights": {f"{beta:g}": weight for beta, weight in means.items()},
        "figures": figures,
        "pooled": {f"DADS minus {name}": pooled(figures, pairs) for name, pairs in others.items()},
    }
    caption = f"DADS by beta: {CAPTION}"
    lab.write("dads", caption, groups, MIXED, found)
    series = {
        label: [(0.0, "GRPO-0"), *((beta, f"{name}-{beta:g}") for beta in BETAS)]
        for label, name in (("constant weight", "GRPO"), ("DADS", "DADS"), ("beta times DADS's mean weight", "mean"))
    }
    (lab.results / "dads.png").write_bytes(pictures.frontier(figures, series, caption))


def _with_mean_weights(path: Path, means: dict[float, float]) -> Path:
    """dads.yaml with other variants: plain GRPO whose KL is as weak as DADS made it on average."""
    experiment = yaml.safe_load((HERE / "dads.yaml").read_text(encoding="utf-8"))
    experiment["variants"] = {f"mean-{beta:g}": {"grpo": {"beta": beta * weight}} for beta, weight in means.items()}
    write_atomically(path, yaml.safe_dump(experiment, sort_keys=False))
    return path


def released(lab: Lab, task: str, figures: Sequence[Figure]) -> None:
    name = f"released_{task}"
    groups = lab.runs(HERE / f"{name}.yaml", task)
    found = {"figures": measured(groups, figures, [(label, "GRPO") for label in list(groups)[1:]])}
    caption = f"Both corrections: embedded model of 0.8 M parameters, on {TASKS[task]}"
    lab.write(name, caption, groups, figures, found)


def tables(found: dict[str, Any], figures: Sequence[Figure]) -> str:
    """Means, differences and, where there are any, pooled differences, with * where an interval excludes 0."""
    measured_ = found["figures"]
    heading = ["", *(figure.title for figure in figures)]

    def row(label: str, estimate_of: Callable[[str], Any], sign: str = "") -> list[str]:
        estimates = [estimate_of(figure.key) for figure in figures]
        words = [
            format_estimate(estimate, figure.formatted_as, sign)
            for estimate, figure in zip(estimates, figures, strict=True)
        ]
        stars = [" *" if sign and estimate and estimate["excludes_zero"] else "" for estimate in estimates]
        return [label, *map(str.__add__, words, stars)]

    some = measured_[figures[0].key]
    means = [row("before", lambda key: measured_[key]["before"])]
    means += [row(label, lambda key, label=label: measured_[key]["variants"][label]) for label in some["variants"]]
    differences = [
        row(label, lambda key, label=label: measured_[key]["differences"][label], "+") for label in some["differences"]
    ]
    over_betas = [row(f"{label}, all betas", of.__getitem__, "+") for label, of in found.get("pooled", {}).items()]
    return "\n\n".join("\n".join(markdown([heading, *rows])) for rows in (means, [*differences, *over_betas])) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
