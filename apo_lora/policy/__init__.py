"""The model that learns: loading by engine, scoring, prompts shared by their completions."""
