"""The two recipes of a run: as it was asked for (recipe.yaml), and as this machine trained it (recipe_trained.yaml).

They differ where preflight found that the largest example does not fit, or that a shared prompt gives another result.
Who continues or repeats a run asks for the first; who reads what it made, for the second.
"""

from collections.abc import Sequence

from apo_lora.recipe.files import load_recipe
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import write_atomically

FITTED = ("data.max_pixels", "grpo.completions_per_pass", "grpo.num_generations", "grpo.shared_prompt")
"""Keys that preflight may change."""


def record_recipes(run_dir: RunDir, asked: Recipe, trained: Recipe) -> None:
    write_atomically(run_dir.recipe, asked.to_yaml())
    write_atomically(run_dir.recipe_trained, trained.to_yaml())


def trained_recipe(run_dir: RunDir, overrides: Sequence[str] = ()) -> Recipe:
    """What the run was trained by, with `section.key=value` overrides. Raises RecipeError."""
    return load_recipe(run_dir.recipe_trained if run_dir.recipe_trained.is_file() else run_dir.recipe, overrides)


def fitted_as_before(recipe: Recipe, run_dir: RunDir) -> Recipe:
    """The recipe with the FITTED keys of the run that is continued: its later steps are like its first ones."""
    if not run_dir.recipe_trained.is_file():
        return recipe
    before = load_recipe(run_dir.recipe_trained)
    for key in FITTED:
        section, name = key.split(".")
        changed = getattr(recipe, section).model_copy(update={name: getattr(getattr(before, section), name)})
        recipe = recipe.model_copy(update={section: changed})
    return recipe
