"""Arguments that several verbs take, and what a word on the command line must look like. No torch."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apo_lora.recipe.schema import Recipe


def add_recipe(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, metavar="R", help="path of a recipe, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, such as train.max_steps=10")


def load_named(recipe: str, overrides: Sequence[str] = ()) -> tuple[str, "Recipe"]:
    """Name and content of the recipe that `add_recipe` was given. Raises RecipeError."""
    from apo_lora.recipe.files import find_recipe, load_recipe

    path = find_recipe(recipe)
    return path.stem, load_recipe(path, overrides)


def count_of(what: str) -> Callable[[str], int]:
    """A type for argparse: a whole number from 1 on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise ArgumentTypeError(f"{text!r} is not a number of {what}; give 1 or more")
        return int(text)

    return read
