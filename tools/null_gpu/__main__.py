"""python -m tools.null_gpu script.py argument ...: see the package's docstring."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.null_gpu.build import build, obstacle

PROJECT = Path(__file__).parent.parent.parent


def environment(library: Path) -> dict[str, str]:
    """That of a process which sees the null GPU, and finds this package."""
    search = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent), "PYTHONPATH": search}
    return {**os.environ, **own}


def main() -> int:
    if problem := obstacle():
        sys.exit(problem)
    with tempfile.TemporaryDirectory(prefix="null-gpu-") as folder:
        command = [sys.executable, *sys.argv[1:]]
        return subprocess.run(command, env=environment(build(Path(folder)))).returncode


if __name__ == "__main__":
    sys.exit(main())
