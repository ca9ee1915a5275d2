"""GPU memory: the estimate before a run, and the peak of one."""
