"""Completions: sampled, and given their credit."""
