"""An experiment: variants of one recipe, each at several seeds, run, compared and drawn.

| module | what it holds |
|---|---|
| `experiment.py` | the file: base recipe, common changes, variants, seeds; the runs it asks for |
| `runs.py` | which runs are done, half-done or another experiment's; those to do as child processes |
| `findings.py` | what they say: sweep.json, README.md, sweep.png. The comparison itself is the report's |
| `sweep.py` | the verb: all of it in order |
"""
