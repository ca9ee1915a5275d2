"""One question, answered by the base and by the tuned model."""
