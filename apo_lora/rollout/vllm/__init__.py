"""Sampling with vLLM: a server in an environment of its own, which takes the adapter of every step."""
