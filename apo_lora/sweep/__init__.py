"""An experiment: variants of one recipe, each at several seeds, run, compared and drawn.

| module | what it holds |
|---|---|
| `experiment.py` | the file: base recipe, common changes, variants, seeds; the runs it asks for |
| `runs.py` | which runs are done, half-done or another experiment's |
| `queue.py` | the runs as child processes, some at once |
| `figures.py` | the figures of a run that are compared, read from its record |
| `findings.py` | means over seeds, differences by seed, their intervals. Pure functions |
| `tables.py` | the findings in words, on the screen and as OUT/README.md |
| `picture.py` | the findings as one picture |
| `sweep.py` | the verb: all of it in order |
"""
