"""Evaluation of base and tuned model on held-out items: `apo-lora eval`, and before and after training."""
