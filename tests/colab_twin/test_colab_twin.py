"""The whole notebook in a twin of Colab: its Python, its packages, its kernel and what it says about the machine.

One story, told once: a wrong address; Run all; Run all again; an interrupted training; a kernel that dies in the middle
of a training; Run all in the next kernel. The install cell really installs: from the registry the first time on a
machine, afterwards out of uv's cache.
"""

import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import PROJECT
from twin_frontend import Cell, Frontend, cells_of, colab_environment
from twin_machine import CACHE, PYTHON, find_python, find_uv, kernel_python, uv_settings

sys.path.insert(0, str(PROJECT / "colab"))
import install
from execute import repository

COLAB_PYTHON = find_python()
if COLAB_PYTHON is None:
    pytest.skip(f"the twin of Colab needs Python {PYTHON}, which is not on this machine", allow_module_level=True)

FORM = {"NUM_GENERATIONS": 2, "ITEMS": 4}
STEPS = 6

LOOK = """
ours = {name.partition(".")[0] for name in sys.modules} - BEFORE - set(sys.stdlib_module_names)
import IPython, io, json, matplotlib.pyplot as plt, numpy, pandas, PIL.Image
picture = io.BytesIO(); plt.figure(); plt.plot(pandas.Series(numpy.arange(3))); plt.savefig(picture); plt.close()
drawn = PIL.Image.open(picture).convert("L").resize((4, 4)).size == (4, 4)
print(json.dumps([list(sys.version_info[:2]), IPython.__version__, sorted(ours), drawn]))
"""


@dataclass
class Story:
    parts: dict[str, list[Cell]] = field(default_factory=dict)
    """Of each Run all, the cells that ran."""
    asked: list[list] = field(default_factory=list)
    """Of google.colab."""
    steps: list[int] = field(default_factory=list)
    steps_when_killed: int = 0
    gigabytes: float = 0.0
    kernel: list = field(default_factory=list)
    packages: list[dict] = field(default_factory=list)
    """File to size and time of the kernel's packages: before and after."""

    def cell(self, part: str, title: str) -> Cell:
        return next(cell for cell in self.parts[part] if cell.title.startswith(title))


@pytest.fixture(scope="module")
def story():
    CACHE.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(CACHE).free / 1e9) < (needed := install.DISK_GB + 2):
        pytest.skip(f"the twin of Colab needs {needed:.1f} GB of disk, and {CACHE} has {free:.1f}")
    folder = Path(tempfile.mkdtemp(prefix="twin-", dir=CACHE))  # on the disk of uv's cache, for hard links
    try:
        yield told(COLAB_PYTHON, folder)
    finally:
        shutil.rmtree(folder)


def told(python: Path, folder: Path) -> Story:
    story, uv = Story(), find_uv()
    settings = uv_settings(folder / "config")
    kernel = kernel_python(python, uv, settings)
    content, asked = folder / "content", folder / "asked.jsonl"
    (folder / "home").mkdir()
    content.mkdir()
    environment = {**colab_environment(kernel, uv, folder / "home", asked), **settings, "OMP_NUM_THREADS": "1"}
    command = [str(kernel), str(Path(__file__).with_name("launcher.py"))]
    source = repository(folder / "repository")
    record = content / "runs" / "tiny_cpu-apo-g2" / "metrics.jsonl"

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in record.read_text().splitlines()] if record.is_file() else []

    def cells(steps: int, source: str = source) -> list[Cell]:
        return cells_of({**FORM, "SOURCE": source, "STEPS": steps})

    story.packages.append(_files(kernel))
    with Frontend(command, content, environment) as colab:
        colab.run_all([Cell("", "import sys; BEFORE = {name.partition('.')[0] for name in sys.modules}")])
        story.parts["wrong address"] = colab.run_all(cells(STEPS, (folder / "nowhere").as_uri()))
        story.parts["first"] = colab.run_all(cells(STEPS))
        story.gigabytes = sum(f.lstat().st_size for f in (content / "apo-lora-env").rglob("*")) / 1e9
        story.parts["second"] = colab.run_all(cells(STEPS))

        def interrupt_once(cell: Cell) -> bool:
            if cell.title == "Train" and len(steps()) > STEPS and not getattr(cell, "interrupted", False):
                cell.interrupted = True
                colab.interrupt()
            return False

        story.parts["interrupted"] = colab.run_all(cells(500), interrupt_once)
        story.kernel = json.loads(colab.run_all([Cell("", LOOK)])[0].text().strip().splitlines()[-1])
        stopped = len(steps())
        again = [cell for cell in cells(500) if cell.title == "Train"]
        story.parts["killed"] = colab.run_all(again, lambda cell: len(steps()) > stopped + 1)
        story.steps_when_killed = len(steps())
    with Frontend(command, content, environment) as colab:
        story.parts["next kernel"] = colab.run_all(cells(story.steps_when_killed + 6))
    story.steps = steps()
    story.packages.append(_files(kernel))
    story.asked = [json.loads(line) for line in asked.read_text().splitlines()]
    return story


def _files(kernel: Path) -> dict[str, tuple[int, int]]:
    packages = next(kernel.parents[1].glob("lib/python*/site-packages"))
    found = {str(file): file.stat() for file in packages.rglob("*") if "__pycache__" not in file.parts}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


pytestmark = pytest.mark.slow


def test_a_wrong_address_is_one_line_and_the_next_run_goes_on(story):
    (install,) = story.parts["wrong address"]
    assert install.failed and install.text().strip().count("\n") == 0
    assert "SOURCE: " in install.text() and "cannot be cloned" in install.text()
    assert not story.parts["first"][0].failed


@pytest.mark.parametrize("part", ["first", "second", "next kernel"])
def test_run_all_ends_with_every_cell_done(story, part):
    cells = story.parts[part]
    assert [(cell.title, cell.text()) for cell in cells if cell.failed] == []
    assert len(cells) == len(cells_of({}))


def test_the_first_run_all_shows_a_whole_run(story):
    show = {cell.title.split(":")[0]: cell for cell in story.parts["first"]}
    assert "No GPU here" in show["The machine"].text()
    assert "GRPO + DADS + STCR with tiny_cpu.yaml" in show["What to train"].text()
    assert show["Before"].data("text/html")[0].count("base</b>") == 3
    assert "step    6" in show["Train"].text() and show["Train"].data("image/png")
    assert "Measured: " in show["Train"].text()
    assert "The LoRA has trained: all" in show["Has the LoRA trained?"].text()
    assert "accuracy" in show["Measure on held-out items"].text()
    (after,) = show["After"].data("text/html")
    assert after.count("base</b>") == after.count("tuned</b>") == 3


def test_the_install_cell_says_its_size_beforehand(story):
    said = story.parts["first"][0].text()
    assert f"{install.DISK_GB} GB of disk" in said and f"{install.DOWNLOAD_GB} GB to download" in said
    assert story.gigabytes == pytest.approx(install.DISK_GB, rel=0.1)


def test_the_second_run_all_does_nothing_twice(story):
    assert "nothing to install" in story.cell("second", "Install").text()
    assert "has finished all 6 steps" in story.cell("second", "Train").text()
    for title in ("Before", "Measure", "After"):
        assert "Loading libraries" not in story.cell("second", title).text()
    assert story.cell("second", "After").data("text/html") == story.cell("first", "After").data("text/html")


def test_an_interrupted_training_is_one_line_saves_and_stops_the_cells_after_it(story):
    last = story.parts["interrupted"][-1]
    assert last.title == "Train" and last.failed
    assert last.text().rstrip().endswith("train: stopped. Run the cell again to continue.")
    assert "a checkpoint is saved" in last.text()


def test_a_training_whose_kernel_died_saves_and_the_next_kernel_goes_on(story):
    (checkpoint,) = re.findall(r"Continuing from .*checkpoint-(\d+)\.", story.cell("next kernel", "Train").text())
    assert int(checkpoint) >= story.steps_when_killed
    assert story.steps == list(range(1, story.steps_when_killed + 7))


def test_nothing_of_the_kernel_s_own_packages_has_changed(story):
    before, after = story.packages
    assert len(before) > 1000 and before == after
    version, ipython, imported, drawn = story.kernel
    assert version == [3, 13] and ipython == "7.34.0" and drawn
    assert imported == ["apo_lora"]


def test_progress_bars_are_no_wall_of_messages(story):
    """Each message is a paint in the browser: one a second at most, and of an installation two."""
    for cell in story.parts["first"]:
        assert cell.num_messages <= 12 + 2 * cell.seconds, cell.title


def test_colab_offers_the_report_and_is_asked_for_the_token_only(story):
    assert ["files.download", "runs/tiny_cpu-apo-g2/report.html"] in story.asked
    assert {what for what, *_ in story.asked} == {"files.download", "userdata.get"}
