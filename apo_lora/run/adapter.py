"""Which adapter a command is about: a run's, or a folder in PEFT's format; and the recipe to load it by. No torch."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo_lora.errors import ModelError
from apo_lora.family.lookup import family_of_base
from apo_lora.machine.paths import at_home
from apo_lora.recipe.files import load_recipe
from apo_lora.recipe.schema import Recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import write_json
from apo_lora.run.recipes import trained_recipe

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."
"""PEFT's, before the name of a layer in WEIGHTS."""

FOUR_BIT = "base_4bit.json"
"""Beside them where the base was trained on in 4 bits: how, and which of its layers (see `four_bit_layers`)."""

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
        """What the run was trained by; of a folder, the one that a push put beside it."""
        return trained_recipe(self.run) if self.run else recipe_beside(self.folder)

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
        raise ModelError(f"{path}: no such folder; give a run directory or a folder with an adapter")
    run = RunDir(path) if (path / "recipe.yaml").is_file() else None
    folder = run.adapter if run else path
    if run and not folder.is_dir():
        raise ModelError(f"{path}: this run has no adapter yet; finish it with `apo-lora train ... --resume auto`")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: no {' and no '.join(missing)}; give a run directory or a folder with an adapter")
    try:
        base_name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base_name, str) or not base_name:
            raise TypeError(f"base_model_name_or_path is {base_name!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / CONFIG} does not name its base model ({type(error).__name__}); copy it again from where it was "
            "trained"
        ) from None
    return AdapterSource(folder, _base_here(base_name, folder), run)


def recipe_for(source: AdapterSource, given: Recipe | None) -> Recipe:
    """How to load and ask it: the run's recipe, else the one `given` or left by a push; always on the adapter's base.

    Raises ModelError where there is no recipe.
    """
    recipe = given or source.recipe
    if recipe is None:
        raise ModelError(
            f"{source.folder}: the adapter has no recipe that says how to ask it (no {RECIPE_ON_HUB}); give a run "
            "directory, or a recipe with --recipe R"
        )
    if source.run and not given:
        return on_its_base(recipe, source)
    if Path(source.base_name).is_dir() or not Path(source.base_name).is_absolute():  # not a path of another machine
        return recipe.on_base(source.base_name)
    return recipe


def on_its_base(recipe: Recipe, source: AdapterSource) -> Recipe:
    """A run's recipe with the folder of its base, where the recipe names it from elsewhere."""
    is_found = recipe.model.name == "tiny" or Path(recipe.model.name).is_dir()
    return recipe if is_found or not Path(source.base_name).is_dir() else recipe.on_base(source.base_name)


def _base_here(name: str, adapter: Path) -> str:
    """The folder of a base that is named relative to where it was trained: from here, else from above the adapter."""
    name = at_home(name)
    places = [Path.cwd(), *adapter.absolute().parents]
    found = (place / name for place in places if (place / name / "config.json").is_file())
    return str(next(found, name))


CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base: without that change, their adapters are wrong."""
NOT_PLAIN = (
    "use_dora", "use_qalora", "lora_bias", "alpha_pattern", "rank_pattern", "modules_to_save", "target_parameters",
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
)  # fmt: skip


def plain_lora_config(source: AdapterSource) -> dict[str, Any]:
    """CONFIG of an adapter that is two matrices per layer, all of one rank and alpha. Raises ModelError for others."""
    config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(f"{source.folder}: {CONFIG} is of a {kind} adapter; only LoRA is supported")
    others = [key for key in NOT_PLAIN if config.get(key)]
    others += ["bias"] if config.get("bias", "none") != "none" else []
    if str(initial := config.get("init_lora_weights")).lower().startswith(CHANGED_BASES):
        others.append(f"init_lora_weights={initial}")
    if others:
        raise ModelError(
            f"{source.folder}: trained with {', '.join(others)}, which is not supported; merge it into its base with "
            "PEFT, and use that as the base"
        )
    return config


def current_names(keys: Iterable[str], source: AdapterSource) -> dict[str, str]:
    """Of each weight in WEIGHTS, the name that it has in a model that transformers loads now, in PEFT's."""
    family = family_of_base(source.base_name)
    return {key: PREFIX + family.module_name(key.removeprefix(PREFIX)) for key in keys}


def layer_names(source: AdapterSource) -> list[str]:
    """The layers that WEIGHTS adapts, by the names that transformers gives them now. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source.folder / WEIGHTS, "np") as weights:
            keys = current_names(weights.keys(), source).values()
        return sorted({key.removeprefix(PREFIX).partition(".lora_A")[0] for key in keys if ".lora_A" in key})
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{source.folder}: the adapter cannot be read ({str(error).splitlines()[0]}); copy it again"
        ) from None


def save_adapter(model: Any, folder: Path, recipe: Recipe | None = None) -> None:
    """Writes to a folder beside it first, so that `folder` is always complete. With its `recipe`, an adapter can be
    used apart from its run."""
    temporary, old = (folder.with_name(f".{folder.name}{part}.tmp") for part in ("", "-old"))
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the run's model card says more
    if four_bit := four_bit_layers(model):
        write_json(temporary / FOUR_BIT, four_bit)
    if recipe:
        (temporary / RECIPE_ON_HUB).write_text(recipe.to_yaml(), encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def four_bit_layers(model: Any) -> dict[str, Any]:
    """How bitsandbytes holds a model, and the layers that it holds so, by name without PEFT; {} where it holds none.

    `dtype` is what the weights had before, and have for the moment of a product.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = {
        name.removesuffix(".base_layer"): module.weight.quant_state
        for name, module in base.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    if not states:
        return {}
    one = next(iter(states.values()))
    return {
        "quant_type": one.quant_type,
        "double_quant": one.nested,
        "dtype": str(one.dtype).removeprefix("torch."),
        "layers": sorted(states),
    }
