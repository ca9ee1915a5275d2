"""Where the two corrections matter, and where not: `python -m benchmarks.evidence` (docs/experiments).

| module | what it holds |
|---|---|
| `tasks.py` | the bases and the questions, each built to isolate one mechanism |
| `stcr.yaml`, `dads.yaml`, `released_*.yaml` | the experiments, as `apo-lora sweep` takes them |
| `figures.py` | what is measured, compared and pooled |
| `pictures.py` | the same, drawn |
| `__main__.py` | all of it in order, each part only where it is not there yet |
"""
