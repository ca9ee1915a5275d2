"""One run on disk: every file name, whole checkpoints, resume, mirrors, the record of its steps, its card."""
