"""Arguments that several verbs take, and types for them. No torch."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from apo_lora.machine.paths import at_home

if TYPE_CHECKING:
    from apo_lora.recipe.schema import Recipe


def add_recipe(parser: ArgumentParser) -> None:
    add_path(parser, "--recipe", "R", "path of a recipe, or the name of a shipped recipe", required=True)
    add_overrides(parser, "changes to the recipe, such as train.max_steps=10")


def add_path(parser: ArgumentParser, name: str, metavar: str, help: str, **more: Any) -> None:
    """A path, or a name that stands for one; a leading ~ is the home folder."""
    parser.add_argument(name, metavar=metavar, type=at_home, help=help, **more)


def add_overrides(parser: ArgumentParser, help: str) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=help)


def load_named(recipe: str, overrides: Sequence[str] = ()) -> tuple[str, "Recipe"]:
    """Name and content of the recipe that `add_recipe` was given. Raises RecipeError."""
    from apo_lora.recipe.files import find_recipe, load_recipe

    path = find_recipe(recipe)
    return path.stem, load_recipe(path, overrides)


def count_of(what: str) -> Callable[[str], int]:
    """A type for argparse: a whole number of at least 1."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise ArgumentTypeError(f"{text!r} is not a valid number of {what}; give a whole number of at least 1")
        return int(text)

    return read
