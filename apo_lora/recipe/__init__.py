"""A recipe: the frozen, strict schema, and its files. No torch."""

from apo_lora.recipe.schema import DataSection, Recipe

__all__ = ["DataSection", "Recipe"]
