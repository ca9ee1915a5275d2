"""Where training starts: lora.start, an adapter that was trained before. Its shape becomes the recipe's. No torch."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from apo_lora.errors import ModelError, RecipeError
from apo_lora.family.lookup import family_of_base, published_model
from apo_lora.recipe.schema import LoraSection, Recipe
from apo_lora.run.adapter import CONFIG, WEIGHTS, AdapterSource, find_adapter, layer_names, plain_lora_config


@contextmanager
def named_in_errors() -> Iterator[None]:
    """Errors about the adapter begin with the key that names it."""
    try:
        yield
    except ModelError as error:
        raise ModelError(*(f"lora.start: {problem}" for problem in error.problems)) from None


def start_adapter(recipe: Recipe) -> AdapterSource:
    """The adapter in lora.start, downloaded where it is on the Hub, on the recipe's base. Raises ModelError."""
    source, here = find_adapter(_folder(recipe.lora.start)), recipe.model.name
    known = published_model(source.base_name), published_model(here)
    if None not in known and known[0] != known[1]:
        raise ModelError(
            f"{source.folder}: was trained on {source.base_name}, not on {here}; give its base as model.name"
        )
    # Adapters also name their base as a quantised copy, or by a path elsewhere: loading compares the layers themselves.
    return replace(source, base_name=here)


def with_start(recipe: Recipe) -> Recipe:
    """The recipe with rank, alpha, dropout and layers of the adapter in lora.start; unchanged where there is none.

    Raises RecipeError where the recipe says otherwise (but of the dropout, which may change), and ModelError for an
    adapter that cannot be trained further.
    """
    lora = recipe.lora
    if lora.start is None:
        return recipe
    with named_in_errors():
        shape = _shape(start_adapter(recipe))
    stated = lora.model_dump(include=lora.model_fields_set)
    if other := [
        key for key in shape if key in stated and key != "dropout" and _plain(stated[key]) != _plain(shape[key])
    ]:
        said = " and ".join(f"lora.{key} is {_inline(stated[key])}" for key in other)
        given = " ".join(f"lora.{key}={_inline(shape[key])}" for key in other)
        raise RecipeError(
            f"lora.start: its adapter was trained otherwise than {said}; give {given}, or another adapter"
        )
    section = {**shape, **stated, "target_modules": shape["target_modules"]}
    try:
        return recipe.model_copy(update={"lora": LoraSection.model_validate(section)})
    except ValidationError as error:
        key, value = error.errors()[0]["loc"][0], error.errors()[0]["input"]
        raise ModelError(f"lora.start: {lora.start}: {CONFIG} has {key} {value!r}; copy it again") from None


def start_line(recipe: Recipe) -> str:
    """What a run with lora.start says once the model is loaded. Same shapes may be other weights: hence the name."""
    trained_on = find_adapter(_folder(recipe.lora.start)).base_name
    reference = "this adapter" if recipe.grpo.reference == "start" else "the base without any adapter"
    return (
        f"Starting from the adapter {recipe.lora.start}, trained on {trained_on}; the KL divergence is to {reference}."
    )


def _shape(source: AdapterSource) -> dict[str, Any]:
    """Of an adapter, the keys of the section `lora`."""
    config, family = plain_lora_config(source), family_of_base(source.base_name)
    layers = set(layer_names(source))
    tower = {name for name in layers if family.is_tower_layer(name)}
    found = {name.rpartition(".")[2] for name in layers - tower}
    if not found:
        raise ModelError(f"{source.folder}: adapts no layer of the language model; give another adapter")
    usual = LoraSection().target_modules
    return {
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout") or 0.0,
        "target_modules": (*(name for name in usual if name in found), *sorted(found - set(usual))),
        "vision": bool(tower),
    }


def _plain(value: Any) -> Any:
    return set(value) if isinstance(value, Iterable) else value


def _inline(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value).lower()


def _folder(name: str) -> str | Path:
    """A path as it is; what looks like a Hub id and is no path, as a folder of the Hub's cache. Raises ModelError."""
    if Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ModelError(
            f"{name}: no such folder, and it cannot be downloaded ({reason}); check the name, or give a folder"
        ) from None
