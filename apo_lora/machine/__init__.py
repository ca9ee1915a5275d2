"""The machine a run is on: this process, its ranks, memory, versions, and what doctor looks at."""
