"""The benchmark of shared prompts runs, and its two ways do the same work."""

import json
import subprocess
import sys

import pytest
from conftest import PROJECT


@pytest.mark.slow
def test_the_smallest_benchmark_counts_fewer_flops(tmp_path):
    """Counted work, not time, which would depend on the machine."""
    script = PROJECT / "benchmarks" / "shared_prompt.py"
    options = ["--shapes", "300,16,2", "--groups", "", "--repeats", "1", "--ways", "shared,plain"]
    options += ["--out", str(tmp_path / "result")]
    subprocess.run([sys.executable, str(script), *options], check=True, cwd=PROJECT)
    (shape,) = json.loads((tmp_path / "result.json").read_text())["shapes"]
    assert shape["ratios"]["plain"]["flops"] > 2
    for figure in ("loss", "gradient_norm"):
        assert shape["ways"]["plain"][figure] == pytest.approx(shape["ways"]["shared"][figure], rel=1e-5)
