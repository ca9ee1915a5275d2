"""Completions: sampling them and assigning their credit."""
