"""A recipe: the frozen, strict schema, and its files. No torch."""
