"""The wheel carries the recipes, the embedded base and the report's page, and works away from the checkout."""

import subprocess
import sys

import pytest
from conftest import PROJECT


@pytest.mark.slow
def test_the_wheel_finds_its_recipes_and_its_base(tmp_path):
    source = tmp_path / "source"  # a build leaves litter beside pyproject.toml
    subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(source)], check=True)
    assert not any((tmp_path / "site" / folder).exists() for folder in ("tools", "benchmarks", "tests"))
    code = (
        "import apo_lora.recipe.files as r, apo_lora.tiny as t, json\n"
        f"assert t.__file__.startswith({str(tmp_path)!r}), t.__file__\n"
        "r.load_recipe(r.find_recipe('tiny_cpu.yaml'))\n"
        "import apo_lora.sweep.experiment as x, pathlib\n"
        "found = x.find_experiment('apo_vs_grpo')\n"
        "assert len(x.plan_runs(found, x.load_experiment(found), pathlib.Path('out'))) == 20\n"
        "assert (t.BASE_DIR / 'model.safetensors').is_file()\n"
        "import apo_lora.report.page as p\n"
        "assert all(p._own_file(name) for name in ('report.html', 'figures.html', 'style.css', 'gallery.js'))\n"
        "import apo_lora.machine.host as d\n"
        "assert d.tested_versions()['torch']\n"
        "print(sorted(r.shipped_recipes()))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "single_gpu" in finished.stdout
