"""One run on disk: every file name, complete checkpoints, resume, mirrors, the record of its steps, its model card."""
