"""Held-out items answered by base and tuned model, verified, counted, compared: `apo-lora eval`, and training's own."""
