"""The embedded tiny base: a real Qwen2.5-VL of about a million parameters, and the visual task it was made for.

It lets the whole kit (train, evaluate, export, report) run on a CPU in minutes, offline.

| module | what it holds |
|---|---|
| `boards.py` | the task: pictures of coloured shapes, questions about them, train and test rows |
| `chains.py` | the answers the base is taught, with overthinking built in |
| `architecture.py` | tokenizer, processor and model, untrained |
| `lessons.py` | batches for training, made without the image processor |
| `make_base.py` | trains a base from a seed: `python -m tools.tiny_base.make_base` |
| `measure_base.py` | what a base can do, by sampling |
| `base/` | the shipped weights, with the record of how they were made |
"""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
