"""An adapter without a run: what its folder alone says about how to load it, and a recipe for how to ask. No torch."""

import json
from pathlib import Path

from apo_lora.errors import ModelError
from apo_lora.family.lookup import family_of_base
from apo_lora.family.record import Family
from apo_lora.recipe.schema import LoraSection, Recipe
from apo_lora.run.adapter_source import CONFIG, RECIPE_ON_HUB, WEIGHTS, AdapterSource

# What a LoraSection cannot say; PEFT itself loads such adapters.
_BEYOND = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save")


def recipe_for(source: AdapterSource, given: Recipe | None) -> Recipe:
    """How to load and ask it: the run's recipe, else the one `given` or left by a push, fitted to the adapter.

    Fitted: base, rank, alpha and layers are the adapter's own. Raises ModelError where there is no recipe.
    """
    if source.run and not given:
        return source.recipe
    recipe = given or source.recipe
    if recipe is None:
        raise ModelError(
            f"{source.folder}: an adapter alone does not say how it was asked (no {RECIPE_ON_HUB} in it); give a run "
            "directory, or a recipe as --recipe R"
        )
    model = recipe.model
    if Path(source.base_name).is_dir() or not Path(source.base_name).is_absolute():  # not a path of another machine
        model = model.model_copy(update={"name": source.base_name})
    return recipe.model_copy(update={"model": model, "lora": lora_section(source, family_of_base(model.name))})


def lora_section(source: AdapterSource, family: Family) -> LoraSection:
    """Rank, alpha and layers out of its config and the names of its weights. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(source.folder / WEIGHTS, "np") as weights:
            layers = [name.rpartition(".lora_A")[0] for name in weights.keys() if ".lora_A" in name]  # noqa: SIM118
        beyond = [key for key in _BEYOND if config.get(key)]
        if beyond:
            raise ModelError(f"{source.folder}: trained with {', '.join(beyond)}; load it with PEFT itself")
        language = sorted({layer.rpartition(".")[2] for layer in layers if not family.is_tower_layer(layer)})
        if not language:
            raise ModelError(f"{source.folder}: no low-rank layer of a language model in {WEIGHTS}")
        vision = any(map(family.is_tower_layer, layers))
        return LoraSection(
            r=config["r"], alpha=float(config["lora_alpha"]), target_modules=tuple(language), vision=vision
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{source.folder}: the adapter cannot be read ({str(error).splitlines()[0]})") from error
