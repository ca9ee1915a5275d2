"""The checks before step 1, and the estimate of memory."""
