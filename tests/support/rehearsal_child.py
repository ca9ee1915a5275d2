"""A child of the rehearsed GPU suite: ADDRESS, then the child's own arguments. Forked from a process that has started
Unsloth, or on its own where the measurement is one without Unsloth.
"""

import runpy
import sys
from pathlib import Path

from forks import run_in_fork

from benchmarks.gpu.child import parse

SCRIPT = Path(__file__).with_name("rehearse_gpu_suite.py")

if __name__ == "__main__":
    address = sys.argv.pop(1)
    measurement, *_ = parse(sys.argv[1:])
    if measurement.unsloth:
        sys.exit(run_in_fork(address, str(SCRIPT), *sys.argv[1:]))
    runpy.run_path(str(SCRIPT), run_name="__main__")
