"""One run of the notebook: a method per cell. Each calls a verb of the command line and shows the result."""

import os
import re
import shutil
from pathlib import Path
from typing import Literal

from IPython.display import HTML, DisplayHandle, Image, display

from apo_lora.errors import UserError
from apo_lora.evaluation.gallery import static_gallery
from apo_lora.machine.host import find_gpu
from apo_lora.machine.paths import at_home
from apo_lora.notebook.machine import banner, suited_recipe
from apo_lora.notebook.verbs import StepFailed, run_module, run_verb
from apo_lora.recipe.files import find_recipe, load_recipe, override
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl, write_atomically
from apo_lora.run.plots import overview

DRIVE = Path("/content/drive")
SHOWN = 3
"""Held-out items that are shown as samples."""

Checkpoints = Literal["this machine", "Google Drive", "Hub"]


def show_machine() -> None:
    """GPU, memory, number format, the recipe that suits them, and what that recipe needs."""
    gpu = find_gpu()
    name = suited_recipe(gpu)
    print("\n".join(banner(gpu, name)))
    if gpu:
        run_verb("plan", "--recipe", name, "--vram", f"{gpu.total_bytes / 2**30:.1f}")


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
        """Empty and 0 leave the recipe's own value. Raises StepFailed for what the recipe refuses."""
        self.recipe_name = suited_recipe(find_gpu()) if recipe == "auto" else recipe
        try:
            self._configure(dataset, held_out, steps, num_generations, apo)
        except UserError as error:
            raise StepFailed("\n".join(error.problems)) from None
        self.run = RunDir(Path(at_home(str(folder))) / self._name(dataset, apo))
        self.overrides += [override("output.dir", str(self.run.path)), *self._mirror(checkpoints, hub_repo)]
        print(f"{self.recipe.method} with {self.recipe_name}.yaml on {self.recipe.data.train}, into {self.run.path}")

    def _configure(self, dataset: str, held_out: str, steps: int, num_generations: int, apo: bool) -> None:
        """The recipe with the form's changes. Raises RecipeError."""
        self.overrides = [
            *(
                [override("data.train", dataset), "data.eval=null", "data.general=null", "data.columns={}"]
                if dataset
                else []
            ),
            *([override("data.eval", held_out)] if held_out else []),
            *([f"train.max_steps={steps}"] if steps else []),
            *(self._group_size(num_generations) if num_generations else []),
            *([] if apo else ["apo.dads=null", "apo.stcr=null"]),
        ]
        self.recipe = load_recipe(find_recipe(self.recipe_name), self.overrides)

    def _group_size(self, num_generations: int) -> list[str]:
        """With the largest number of completions per pass, up to the recipe's, that divides a step evenly."""
        grpo = load_recipe(find_recipe(self.recipe_name)).grpo
        completions = grpo.prompts_per_step * num_generations
        per_pass = max((n for n in range(1, grpo.completions_per_pass + 1) if completions % n == 0), default=1)
        return [f"grpo.num_generations={num_generations}", f"grpo.completions_per_pass={per_pass}"]

    def _name(self, dataset: str, apo: bool) -> str:
        """Distinguishes runs with different settings, except for their length: a longer run continues a shorter one."""
        parts = [self.recipe_name, dataset, "apo" if apo else "grpo", f"g{self.recipe.grpo.num_generations}"]
        return "-".join(re.sub(r"\W+", "_", part).strip("_") for part in parts if part)

    def _mirror(self, checkpoints: Checkpoints, hub_repo: str) -> list[str]:
        if checkpoints == "Google Drive":
            _mount_drive()
            return [override("output.mirror", [f"{DRIVE}/MyDrive/apo-lora/{self.run.path.name}"])]
        if checkpoints == "Hub":
            if not hub_repo:
                raise StepFailed("Checkpoints on the Hub need a repository: set HUB_REPO to ORG/NAME.")
            return [override("output.mirror", [f"hub:{hub_repo}"])]
        return []

    # --- the cells ---------------------------------------------------------------------------------------------------

    def sample_before(self) -> None:
        """Shows how the base answers a few held-out items, else items of the training data; beside the run."""
        base = RunDir(f"{self.run.path}-base")
        shutil.rmtree(base.path, ignore_errors=True)
        write_atomically(base.recipe, self.recipe.in_run_dir(base.path).to_yaml())
        data = self.recipe.data
        spec, split = (data.eval, data.eval_split) if data.eval else (data.train, data.split)
        items = ["--data", spec, "--split", split, "--limit", str(SHOWN), "--name", "samples"]
        run_verb("eval", str(base.path), "--base", *items, secrets=_secrets())
        self._show_answers(base, "samples")

    def train(self) -> None:
        """Trains, with live curves; an existing run is continued."""
        if self._finished():
            print(f"{self.run.path} has finished all {self.recipe.train.max_steps} steps; raise STEPS to continue.")
            display(Image(overview(self.run)))
            return
        self._train()

    def resume(self, more_steps: int = 0) -> None:
        """Continues after a disconnect, or for more steps than set in the form."""
        if not more_steps and self._finished():
            print("The run is finished. Set MORE_STEPS to continue from here.")
            return
        last = max((row["step"] for row in _rows(self.run.metrics)), default=0)
        self._train(*([f"train.max_steps={last + more_steps}"] if more_steps else []))

    def _train(self, *overrides: str) -> None:
        curves = Curves(self.run)
        arguments = ["--recipe", self.recipe_name, "--resume", "auto", "output.logging_steps=5"]
        arguments += [*self.overrides, *overrides]
        run_verb("train", *arguments, meanwhile=curves.redraw, secrets=_secrets())
        curves.redraw()

    def check_trained(self) -> None:
        """Raises StepFailed unless every LoRA matrix that starts at zero has changed."""
        run_module("apo_lora.notebook.adapter_check", str(self.run.adapter / "adapter_model.safetensors"), name="check")

    def evaluate(self, items: int = 0) -> None:
        """Base and tuned on held-out items, greedy: the table, with intervals. `items` of each set, 0 for all."""
        if self._has_held_out():
            run_verb("eval", str(self.run.path), *(["--limit", str(items)] if items else []), secrets=_secrets())

    def sample_after(self) -> None:
        """Shows base and tuned answers of the first held-out items side by side."""
        if self._has_held_out():
            self._show_answers(self.run, "held_out")

    def _show_answers(self, run: RunDir, evaluation: str) -> None:
        """The greedy ones to the first items."""
        rows = [row for row in _rows(run.evaluations / evaluation / "answers.jsonl") if row["greedy"]]
        items = list(dict.fromkeys((row["set"], row["row"]) for row in rows))[:SHOWN]
        display(HTML(static_gallery([row for row in rows if (row["set"], row["row"]) in items], run.path)))

    def _has_held_out(self) -> bool:
        if self.recipe.data.eval is None:
            print("No held-out items: set HELD_OUT in the form above.")
        return self.recipe.data.eval is not None

    def report(self) -> None:
        """One page with everything, to open in a browser."""
        run_verb("report", str(self.run.path))

    def export(self, to: str) -> None:
        """`merged`, `gguf` or `ollama`, beside the adapter; "nothing" does nothing."""
        if to == "nothing":
            print("Nothing was exported: choose a format in EXPORT_TO.")
            return
        run_verb("export", str(self.run.path), "--to", to, secrets=_secrets())

    def push(self, repo: str, what: str = "adapter", private: bool = True) -> None:
        """Pushes to the Hub with a model card; an empty `repo` does nothing."""
        if not repo:
            print("Nothing was pushed: set PUSH_TO to ORG/NAME.")
            return
        seen = "--private" if private else "--public"
        run_verb("export", str(self.run.path), "--to", "hub", "--repo", repo, "--what", what, seen, secrets=_secrets())

    # --- what is there -----------------------------------------------------------------------------------------------

    def _finished(self) -> bool:
        steps = self.recipe.train.max_steps
        return bool(steps and self.run.adapter.is_dir() and any(r["step"] >= steps for r in _rows(self.run.metrics)))


class Curves:
    """The run's curves in the cell, drawn again when there are new steps."""

    def __init__(self, run: RunDir):
        self.run = run
        self._handle: DisplayHandle | None = None
        self._drawn = 0

    def redraw(self) -> None:
        steps = len(_rows(self.run.metrics))
        if steps == self._drawn:
            return
        self._drawn = steps
        png = overview(self.run)
        if png is None:  # train starts again from nothing
            return
        if self._handle is None:
            self._handle = display(Image(png), display_id=True)
        else:
            self._handle.update(Image(png))


def _rows(path: Path) -> list[dict]:
    return list(read_jsonl(path)) if path.is_file() else []


# --- Colab -----------------------------------------------------------------------------------------------------------


def _mount_drive() -> None:
    try:
        from google.colab import drive
    except ImportError:
        raise StepFailed("Google Drive is only available in Colab; choose 'this machine' or 'Hub'.") from None
    drive.mount(str(DRIVE))


def _secrets() -> dict[str, str]:
    """HF_TOKEN out of Colab's secrets, where it is and the notebook may read it. Never shown, never written."""
    if "HF_TOKEN" in os.environ:
        return {}
    try:
        from google.colab import userdata

        return {"HF_TOKEN": userdata.get("HF_TOKEN")}
    except Exception:  # not in Colab, no such secret, or no access to it: a verb that needs the token reports that
        return {}
