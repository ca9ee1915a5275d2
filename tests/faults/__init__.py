"""Runs that are killed, starved and poisoned on purpose. docs/reliability.md has the figures."""
