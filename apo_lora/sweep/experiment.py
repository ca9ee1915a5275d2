"""An experiment file: which runs are to be compared. YAML, strict, no code.

    base: grpo_baseline.yaml          # a recipe: beside this file, a path, or a shipped one's name
    common: {train: {max_steps: 60}}  # changes for every run
    variants:                         # name: changes; the first is what the others are compared with
      GRPO: {}
      APO: {apo: {dads: complement_exp, stcr: 1.01}}
    seeds: [0, 1, 2, 3, 4]            # train.seed; every variant runs at each

Changes are written like a recipe. Each run's recipe is base, common, the command line's changes, the variant's, seed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints, ValidationError

from apo_lora.errors import RecipeError
from apo_lora.recipe.files import find_recipe, load_recipe, one_line, read_yaml, shipped_recipes
from apo_lora.recipe.schema import Count, Place, Positive, Recipe, Section

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]  # it becomes a folder's
Changes = dict[str, dict[str, Any]]

OWN_KEYS = {"train.seed": "list seeds under seeds", "output.dir": "use --out DIR"}
"""What the sweep itself sets, and where a user sets it instead."""


class Experiment(Section):
    model_config = ConfigDict(strict=False)  # YAML's lists are tuples here; the recipes' own check is strict

    base: Place
    common: Changes = {}
    variants: Annotated[dict[Name, Changes | None], Field(min_length=2)]
    seeds: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    final_steps: Count = 10
    """Entropy and KL at the end of training are means over this many last steps."""
    seconds_per_run: Positive | None = None
    """How long one run took for the author of the file; for the estimate before anything has run."""


@dataclass(frozen=True)
class PlannedRun:
    """One run that the experiment asks for."""

    variant: str
    seed: int
    recipe: Recipe
    """Resolved, its run directory included."""
    recipe_file: Path
    overrides: tuple[str, ...]
    """What makes `recipe` of the file, as the command line takes it."""

    @property
    def path(self) -> Path:
        return Path(self.recipe.output.dir)

    def __str__(self) -> str:
        return f"{self.variant}/seed-{self.seed}"


def shipped_experiments() -> dict[str, Path]:
    """Name (without .yaml) to path."""
    recipes = shipped_recipes()
    folder = recipes["tiny_cpu"].parent / "experiments" if recipes else None
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_experiment(name: str) -> Path:
    """An experiment by path, or by the name of a shipped one, with or without .yaml."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_experiments()
    if path := shipped.get(Path(name).name.removesuffix(".yaml")):
        return path
    raise RecipeError(f"experiment {name}: no such file or shipped experiment; shipped: {', '.join(shipped)}")


def load_experiment(path: Path) -> Experiment:
    """Raises RecipeError with every problem of the file."""
    tree = read_yaml(path, "an experiment is a mapping with base, variants and seeds")
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(*(f"{path.name}: {one_line(detail, Experiment)}" for detail in error.errors())) from None
    if not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds):
        raise RecipeError(
            f"{path.name}: seeds: {list(experiment.seeds)} is not valid; give at least one, and each only once"
        )
    return experiment


def plan_runs(path: Path, experiment: Experiment, out: Path, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """Every run, seed by seed, so that an experiment cut short has compared whole seeds.

    `overrides` are the command line's `section.key=value`. Raises RecipeError with every problem, each named once.
    """
    beside = path.parent / experiment.base
    recipe_file = beside if beside.is_file() else find_recipe(experiment.base)
    common = (*_as_overrides(experiment.common), *overrides)
    variants = {name: (*common, *_as_overrides(changes or {})) for name, changes in experiment.variants.items()}

    problems = _problems(f"{path.name}: common", recipe_file, common)
    if not problems:  # problems common to all are reported once
        for name, own in variants.items():
            problems += _problems(f"{path.name}: variants.{name}", recipe_file, own)
    if problems:
        raise RecipeError(*problems)

    def run(variant: str, seed: int) -> PlannedRun:
        folder = out / variant / f"seed-{seed}"
        given = (*variants[variant], f"train.seed={seed}", f"output.dir={json.dumps(str(folder))}")
        return PlannedRun(variant, seed, load_recipe(recipe_file, given), recipe_file, given)

    return [run(variant, seed) for seed in experiment.seeds for variant in variants]


def _as_overrides(changes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    # JSON is YAML as the override's reader takes it.
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in changes.items() for key, value in keys.items()]


def _problems(where: str, recipe_file: Path, overrides: Sequence[str]) -> list[str]:
    taken = [key for key in OWN_KEYS if any(text.partition("=")[0] == key for text in overrides)]
    if taken:
        return [f"{where}: {key} is set by the sweep; {OWN_KEYS[key]}" for key in taken]
    try:
        load_recipe(recipe_file, overrides)
    except RecipeError as error:
        return [f"{where}: {problem.removeprefix(f'{recipe_file.name}: ')}" for problem in error.problems]
    return []
