"""Text in, reward out: the scores, the verifier's process, the user's own functions, and their check."""
