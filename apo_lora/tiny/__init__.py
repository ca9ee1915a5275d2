"""The embedded tiny base: a real Qwen2.5-VL of about a million parameters, and the visual task it was made for.

It lets every verb (train, eval, export, report) run on a CPU in minutes, offline. `boards.py` is the task: images of
coloured shapes, questions about them, train and test rows. `base/` has the weights, with the record of how they were
made by tools/tiny_base.
"""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
