"""One run of the notebook: a method per cell. Each runs a process of apo-lora's environment and shows its files.

The kernel's side: IPython and the standard library alone, whatever packages the notebook's machine has.
"""

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, Literal
from urllib.parse import quote

from IPython.display import HTML, Image, display

from apo_lora.errors import UserError
from apo_lora.notebook import form
from apo_lora.notebook.verbs import StepFailed, environment, lifetime, python, run_verb
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl

DRIVE = Path("/content/drive")
SHOWN = 3
"""Held-out items that are shown as samples."""

Checkpoints = Literal["this machine", "Google Drive", "Hub"]


def made(what: str, **arguments: Any) -> str:
    """What apo_lora.notebook.worker wrote. Raises StepFailed with its problems, or with what it said last."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [python(), "-m", "apo_lora.notebook.worker", what, json.dumps({"out": str(out), **arguments})]
        done = subprocess.run(
            command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        problems = out.with_name("out.problems")
        if problems.is_file():
            raise StepFailed(problems.read_text(encoding="utf-8"))
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise StepFailed(f"{what}: failed (exit code {done.returncode}): {last}")
        return out.read_text(encoding="utf-8") if out.is_file() else ""


@functools.cache
def machine() -> dict[str, Any]:
    """{lines, recipe, vram}: looked at once."""
    return json.loads(made("machine"))


def show_machine() -> None:
    """GPU, memory, number format, the recipe that suits them, and what that recipe needs."""
    print("\n".join(machine()["lines"]))
    if machine()["vram"]:
        run_verb("plan", "--recipe", machine()["recipe"], "--vram", f"{machine()['vram']:.1f}")


class Session:
    """The settings of the notebook's form, as a recipe with a few keys changed, and its run directory."""

    def __init__(
        self,
        *,
        recipe: str = "auto",
        dataset: str = "",
        held_out: str = "",
        steps: int = 0,
        num_generations: int = 0,
        apo: bool = True,
        checkpoints: Checkpoints = "this machine",
        hub_repo: str = "",
        folder: str | Path = "runs",
    ):
        """Empty and 0 leave the recipe's own value. Raises StepFailed for what the form or the recipe refuses."""
        fields = {
            "dataset": form.text("DATASET", dataset),
            "held_out": form.text("HELD_OUT", held_out),
            "steps": form.count("STEPS", steps),
            "num_generations": form.count("NUM_GENERATIONS", num_generations, at_least=2),
            "apo": form.one_of("APO", apo, (True, False)),
        }
        form.one_of("CHECKPOINTS", checkpoints, Checkpoints.__args__)
        repo = form.repo("HUB_REPO", hub_repo, needed=checkpoints == "Hub")
        recipe = machine()["recipe"] if recipe == "auto" else form.text("RECIPE", recipe)
        filled = json.loads(made("form", recipe=recipe, folder=str(folder), **fields))
        self.recipe, self.max_steps = recipe, filled["max_steps"]
        self.samples, self.held_out = filled["samples"], filled["held_out"]
        self.evaluation = ""
        """What `evaluate` measured, below the run's evaluations."""
        self.run = RunDir(filled["run"])
        self.overrides = [*filled["overrides"], *self._mirror(checkpoints, repo)]
        print("\n".join([*filled["lines"], *expected_time(recipe, self.max_steps)]))

    def _mirror(self, checkpoints: Checkpoints, hub_repo: str) -> list[str]:
        if checkpoints == "Google Drive":
            folder = _drive() / "apo-lora"
            folder.mkdir(exist_ok=True)
            return [f"output.mirror={json.dumps([str(folder / self.run.path.name)])}"]
        return [f"output.mirror={json.dumps([f'hub:{hub_repo}'])}"] if checkpoints == "Hub" else []

    # --- the cells ---------------------------------------------------------------------------------------------------

    def sample_before(self) -> None:
        """Shows how the base answers a few held-out items, else items of the training data; beside the run."""
        base = RunDir(f"{self.run.path}-base")
        if not (base.evaluations / "samples" / "eval.json").is_file():
            data, split = self.samples
            items = ["--data", data, "--split", split, "--limit", str(SHOWN), "--name", "samples"]
            run_verb("eval", str(base.path), "--base", *items, secrets=_secrets())
        self._show_answers(base, "samples")

    def train(self) -> None:
        """Trains, with live curves; an existing run is continued."""
        if not self._finished():
            return self._train(self.max_steps)
        print(f"{self.run.path} has finished all {self.max_steps} steps; raise STEPS to continue.")
        with Curves(self.run, self.max_steps):
            pass

    def resume(self, more_steps: int = 0) -> None:
        """Continues after a disconnect, or for more steps than set in the form."""
        more_steps = form.count("MORE_STEPS", more_steps)
        if not more_steps and self._finished():
            print("The run is finished. Set MORE_STEPS to continue from here.")
            return
        steps = self._last_step() + more_steps if more_steps else self.max_steps
        self._train(steps, *([f"train.max_steps={steps}"] if more_steps else []))

    def _train(self, steps: int | None, *overrides: str) -> None:
        arguments = ["--recipe", self.recipe, "--resume", "auto", "output.logging_steps=5", *self.overrides, *overrides]
        with Curves(self.run, steps) as curves:
            lock = self.run.path.with_name(f".{self.run.path.name}.lock")
            run_verb("train", *arguments, meanwhile=curves.look, secrets=_secrets(), lock=lock)

    def check_trained(self) -> None:
        """Raises StepFailed unless every LoRA matrix that starts at zero has changed."""
        print(made("trained", weights=str(self.run.adapter / "adapter_model.safetensors")))

    def evaluate(self, items: int = 0) -> None:
        """Base and tuned on held-out items, greedy: the table, with intervals. `items` of each set, 0 for all.

        Every length of the run and number of items has a result of its own, which is shown again where it is there.
        """
        items = form.count("ITEMS", items)
        if self._has_held_out():
            asked = f"held_out-{form.as_name(self.held_out)}-step{self._last_step()}"
            self.evaluation = asked + (f"-first{items}" if items else "")
            result = self.run.evaluations / self.evaluation / "eval.json"
            if result.is_file():
                print(made("figures", file=str(result)))
                return
            options = ["--set", f"data.eval={json.dumps(self.held_out)}", *(["--limit", str(items)] if items else [])]
            run_verb("eval", str(self.run.path), "--name", self.evaluation, *options, secrets=_secrets())

    def sample_after(self) -> None:
        """Shows base and tuned answers of the first held-out items side by side."""
        if self._has_held_out():
            if not self.evaluation:
                raise StepFailed("These are answers of the measurement: run the cell above first.")
            self._show_answers(self.run, self.evaluation)

    def _show_answers(self, run: RunDir, evaluation: str) -> None:
        display(HTML(made("answers", run=str(run.path), evaluation=evaluation, shown=SHOWN)))

    def _has_held_out(self) -> bool:
        if not self.held_out:
            print("No held-out items: set HELD_OUT in the form above.")
        return bool(self.held_out)

    def report(self, download: bool = False) -> None:
        """One page with everything, to open in a browser; in Colab, the browser downloads it."""
        form.one_of("DOWNLOAD", download, (True, False))
        run_verb("report", str(self.run.path))
        if not download:
            return
        try:
            from google.colab import files
        except ImportError:
            display(HTML(f'<a href="{quote(str(self.run.report))}" target="_blank">{self.run.report.name}</a>'))
        else:
            files.download(str(self.run.report))

    def export(self, to: str) -> None:
        """`merged`, `gguf` or `ollama`, beside the adapter; "nothing" does nothing."""
        form.one_of("EXPORT_TO", to, ("nothing", "merged", "gguf", "ollama"))
        if to == "nothing":
            print("Nothing was exported: choose a format in EXPORT_TO.")
            return
        run_verb("export", str(self.run.path), "--to", to, secrets=_secrets())

    def push(self, repo: str, what: str = "adapter", private: bool = True) -> None:
        """Pushes to the Hub with a model card; an empty `repo` does nothing."""
        repo = form.repo("PUSH_TO", repo)
        form.one_of("WHAT", what, ("adapter", "merged", "gguf"))
        form.one_of("PRIVATE", private, (True, False))
        if not repo:
            print("Nothing was pushed: set PUSH_TO to ORG/NAME.")
            return
        seen = "--private" if private else "--public"
        run_verb("export", str(self.run.path), "--to", "hub", "--repo", repo, "--what", what, seen, secrets=_secrets())

    # --- what is there -----------------------------------------------------------------------------------------------

    def _last_step(self) -> int:
        return max((row["step"] for row in _rows(self.run.metrics)), default=0)

    def _finished(self) -> bool:
        return bool(self.max_steps and self.run.adapter.is_dir() and self._last_step() >= self.max_steps)


class Curves:
    """The run's curves at the top of the cell, drawn by a process beside the training and shown when they change."""

    def __init__(self, run: RunDir, steps: int | None):
        """`steps`: that the run will have, if known."""
        self.run, self.steps = run, steps
        self.before = len(_rows(run.metrics))
        """Rows of an earlier process."""
        self._said = False
        self._shown: bytes | None = None

    def __enter__(self) -> "Curves":
        self._folder = tempfile.TemporaryDirectory()
        self._png = Path(self._folder.name) / "curves.png"
        self._handle = display(HTML("<small>The curves appear after the first steps.</small>"), display_id=True)
        arguments = json.dumps({"png": str(self._png), "run": str(self.run.path), "watch": True})
        self._drawer = subprocess.Popen(
            [python(), "-m", "apo_lora.notebook.worker", "curves", arguments],
            env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            **lifetime(),
        )  # fmt: skip
        return self

    def __exit__(self, *_: Any) -> None:
        self._drawer.kill()
        self._drawer.wait()
        with self._folder, suppress(StepFailed):  # a picture is no reason to fail
            if _rows(self.run.metrics):
                made("curves", run=str(self.run.path), watch=False, png=str(self._png))
                self._show()

    def look(self) -> str | None:
        """Shows new curves. Returns, once, the line that says how long the rest will take."""
        self._show()
        rows = _rows(self.run.metrics)
        if self._said or self.steps is None or len(rows) <= self.before:
            return None
        seconds = [row["seconds"] for row in rows[self.before :]]
        line = remaining_time(seconds, self.steps, rows[-1]["step"])
        self._said = line is not None
        return line

    def _show(self) -> None:
        png = self._png.read_bytes() if self._png.is_file() else None
        if png != self._shown:
            self._shown = png
            self._handle.update(Image(png))


def _rows(path: Path) -> list[dict]:
    """Raises StepFailed for a file that was written into."""
    try:
        return list(read_jsonl(path)) if path.is_file() else []
    except UserError as error:
        raise StepFailed("\n".join(error.problems)) from None


# --- how long a run will take ----------------------------------------------------------------------------------------

MODELLED = {"colab_t4": (75, 95)}
"""Recipe to seconds per step at full completion length: what `apo-lora plan` models for a T4, and up to a quarter
more for what it leaves out. No GPU has measured them."""
MEASURED_STEPS = 3
"""After the first one, which is slower: what is compiled and loaded on first use."""


def expected_time(recipe: str, steps: int | None) -> list[str]:
    """A line where there is a model for the recipe."""
    if recipe not in MODELLED or not steps:
        return []
    low, high = MODELLED[recipe]
    return [
        f"Expected: {steps} steps of {low} to {high} s (modelled, not measured), so {duration(steps * low)} to "
        f"{duration(steps * high)}; the time that it takes here is shown after the first steps."
    ]


def remaining_time(seconds: Sequence[float], steps: int, last: int) -> str | None:
    """`seconds`: of each step of this process so far; `last`: of `steps`, the one that was done last.

    None until enough steps have been measured, and where little is left.
    """
    if len(seconds) <= MEASURED_STEPS or steps <= last:
        return None
    each = median(seconds[1:])
    return f"Measured: {each:.3g} s per step, so {duration(each * (steps - last))} for the other {steps - last} steps."


def duration(seconds: float) -> str:
    """`1 h 20 min`, `5 min` or `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 100 else f"{minutes} min"


# --- Colab -----------------------------------------------------------------------------------------------------------


def _drive() -> Path:
    """The user's own folder on the drive, mounted."""
    try:
        from google.colab import drive
    except ImportError:
        raise StepFailed("CHECKPOINTS: Google Drive is only available in Colab; use 'this machine' or 'Hub'.") from None
    try:
        drive.mount(str(DRIVE))
    except Exception as error:  # drive.mount's own kinds, of a refused permission or a time-out
        raise StepFailed(
            f"CHECKPOINTS: Google Drive could not be mounted ({error}); allow it, or choose another."
        ) from None
    return DRIVE / "MyDrive"


def _secrets() -> dict[str, str]:
    """HF_TOKEN out of Colab's secrets, where it is and the notebook may read it. Never shown, never written."""
    if "HF_TOKEN" in os.environ:
        return {}
    try:
        from google.colab import userdata

        return {"HF_TOKEN": userdata.get("HF_TOKEN")}
    except Exception:  # not in Colab, no such secret, or no access to it: a verb that needs the token reports that
        return {}
