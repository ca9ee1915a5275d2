"""Which adapter a command is about: that of a run, or a folder in PEFT's format. No torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from apo_lora.errors import ModelError
from apo_lora.recipe.files import load_recipe
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Not recipe.yaml, by which a run directory is known: what a pull brings is an adapter's (or a GGUF's) folder.
RECIPE_ON_HUB = "apo_lora_recipe.yaml"


@dataclass(frozen=True)
class AdapterSource:
    folder: Path
    """With CONFIG and WEIGHTS."""
    base_name: str
    """What it was trained on: a Hugging Face id or a folder."""
    run: RunDir | None
    """The run it comes from, where it is one's."""

    @property
    def recipe(self) -> Recipe | None:
        """The run's; of a folder, the one that a push put beside it."""
        return load_recipe(self.run.recipe) if self.run else recipe_beside(self.folder)

    @property
    def name(self) -> str:
        return (self.run.path if self.run else self.folder).resolve().name


def recipe_beside(folder: Path) -> Recipe | None:
    """What a push left in a folder, where it is there."""
    path = folder / RECIPE_ON_HUB
    return load_recipe(path) if path.is_file() else None


def find_adapter(path: str | Path) -> AdapterSource:
    """Of a run directory (its adapter/), or of an adapter's own folder. Raises ModelError in one line."""
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: there is no such folder; give a run directory or an adapter's folder")
    run = RunDir(path) if (path / "recipe.yaml").is_file() else None
    folder = run.adapter if run else path
    if run and not folder.is_dir():
        raise ModelError(f"{path}: this run has no adapter yet; finish it with `apo-lora train ... --resume auto`")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: no {' and no '.join(missing)}; give a run directory or an adapter's folder")
    try:
        base_name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base_name, str) or not base_name:
            raise TypeError(f"base_model_name_or_path is {base_name!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / CONFIG} does not name its base model ({type(error).__name__}); copy it anew from where it was "
            "trained"
        ) from None
    return AdapterSource(folder, base_name, run)
