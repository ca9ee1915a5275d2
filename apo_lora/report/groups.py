"""Runs of one recipe that differ only in their seed form a group: one line with a band, one row of a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from apo_lora.recipe import schema
from apo_lora.recipe.schema import Recipe
from apo_lora.report.runs import Run
from apo_lora.run.drawing import css_classes


@dataclass(frozen=True)
class Group:
    label: str
    runs: list[Run]
    place: int
    """Among the groups: decides the colour and the dashes of its line."""

    @property
    def recipe(self) -> Recipe:
        return self.runs[0].recipe

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.seed) for run in self.runs)

    @property
    def style(self) -> str:
        """CSS classes."""
        return css_classes(self.place)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """In the order of their first runs."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        recipe_of_group = run.recipe.model_dump_json(exclude={"train": {"seed"}, "output": {"dir"}})
        members.setdefault(recipe_of_group, []).append(run)
    labels = _labels([group[0].recipe for group in members.values()])
    return [Group(*group, place) for place, group in enumerate(zip(labels, members.values(), strict=True))]


def differences(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """Key to its value in each recipe, of the keys that are not the same in all; a group's own keys are left out."""
    keys = dict.fromkeys(key for other in recipes[1:] for key in schema.differences(recipes[0], other))
    return {
        key: [attrgetter(key)(recipe) for recipe in recipes] for key in keys if key not in ("train.seed", "output.dir")
    }


def _labels(recipes: Sequence[Recipe]) -> list[str]:
    """The method where that tells them apart, else with the first keys that differ."""
    methods = [recipe.method for recipe in recipes]
    if len(set(methods)) == len(methods):
        return methods
    different = list(differences(recipes).items())[:3]
    labels = [
        ", ".join([method, *(f"{key.split('.')[1]} {values[place]}" for key, values in different)])
        for place, method in enumerate(methods)
    ]
    return [label if labels.count(label) == 1 else f"{label} ({place + 1})" for place, label in enumerate(labels)]
