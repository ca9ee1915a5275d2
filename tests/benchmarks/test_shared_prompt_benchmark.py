"""The benchmark of shared prompts runs, and its two ways do the same work."""

import json
import sys

import pytest

from benchmarks import shared_prompt


@pytest.mark.parametrize(
    "apart", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.matrix)]
)
def test_the_smallest_benchmark_counts_fewer_flops(apart, tmp_path, monkeypatch):
    """Counted work, not time, which would depend on the machine. `apart`: each way in a process of its own, as it is
    measured."""
    options = ["--shapes", "300,16,2", "--groups", "", "--repeats", "1", "--ways", "shared,plain"]
    monkeypatch.setattr(sys, "argv", ["shared_prompt.py", *options, "--out", str(tmp_path / "result")])
    if not apart:
        monkeypatch.setattr(shared_prompt, "measure_apart", lambda *args: shared_prompt.measure(*args, count=True))
    shared_prompt.main()
    (shape,) = json.loads((tmp_path / "result.json").read_text())["shapes"]
    assert shape["ratios"]["plain"]["flops"] > 2
    for figure in ("loss", "gradient_norm"):
        assert shape["ways"]["plain"][figure] == pytest.approx(shape["ways"]["shared"][figure], rel=1e-5)
