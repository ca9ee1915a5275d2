"""A prompt computed once for all of its completions (docs/architecture.md)."""
