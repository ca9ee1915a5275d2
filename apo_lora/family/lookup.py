"""Which family a model, a config or a name is of, and the sizes of a model. No torch."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from apo_lora.errors import ModelError
from apo_lora.family.licence import UNKNOWN, Licence
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL
from apo_lora.family.qwen3_vl import QWEN3_VL
from apo_lora.family.record import Family
from apo_lora.family.shape import ModelShape
from apo_lora.tiny import BASE_DIR

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2_5_VL, QWEN3_VL)}
"""By the model_type of config.json."""

PUBLISHERS = ("qwen", "unsloth")
"""Of these models' weights, unchanged; another owner's model of the same name may have further terms."""


def family_of(model_or_config: Any, name: str = "the model") -> Family:
    """Of a model, its inner model, its config or the mapping of a config.json. Raises ModelError for another type."""
    model_type = _config(model_or_config).get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"model.name: {name} has the unsupported model type {model_type}; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def closest_family(model_or_config: Any) -> Family:
    """The same; a model of another type, with or without images, is tried by the names of Qwen2.5-VL, without sharing
    prompts."""
    config = _config(model_or_config)
    if family := FAMILIES.get(model_type := config.get("model_type")):
        return family
    language = QWEN2_5_VL.language if config.get("vision_config") else ""
    return replace(QWEN2_5_VL, model_type=model_type, language=language, shares_prompts=False)


def family_of_base(name: str) -> Family:
    """The closest family of `tiny`, a folder or a Hub id: by its config where that is on this machine, else by name.

    Runs, adapters and exports may name bases on other machines: an unrecognised name counts as Qwen2.5-VL.
    """
    if (path := _config_here(name)) is not None:
        return closest_family(_read_config(path, name))
    by_name = (family for family in FAMILIES.values() if re.search(family.name_pattern, name.lower()))
    return next(by_name, QWEN2_5_VL)


def inner_model_of(model: Any) -> Any:
    """What gives hidden states, of a model with or without PEFT around it."""
    return closest_family(model).inner_of(model)


def find_shape(name: str, revision: str | None = None) -> ModelShape:
    """Sizes of `tiny`, a local folder, a published model of a known family, or another Hub id. Raises ModelError."""
    if (folder := _folder(name)).is_dir():
        return shape_from_config(_read_config(folder / "config.json", name), name)
    published = (family.published[size] for family, size in _published(name))
    return next(published, None) or shape_from_config(_config_from_hub(name, revision), name)


def shape_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    return family_of(config, name).shape(config, name)


def licence_of_base(name: str) -> Licence:
    """Of a published model, by its Hub id; that of any other base is unknown."""
    owner, _, model = name.lower().rpartition("/")
    known = (family.licences[size] for family, size in _published(model) if re.match(family.name_pattern, model))
    return next(known, UNKNOWN) if owner in PUBLISHERS else UNKNOWN


def published_model(name: str) -> tuple[str, str] | None:
    """Model type and size of a published model, quantised or renamed copies of it included; None for other names."""
    return next(((family.model_type, size) for family, size in _published(name)), None)


def _published(name: str) -> Iterator[tuple[Family, str]]:
    """The family and the size that a name says."""
    return ((family, size) for family in FAMILIES.values() if (size := family.published_size(name)))


# --- limits on data, for every family --------------------------------------------------------------------------------


def reserved_tokens() -> list[str]:
    """Tokens that no prompt text may contain: they would start a turn or an image."""
    return sorted({token for family in FAMILIES.values() for token in (*family.turn_tokens, *family.vision_tokens)})


def max_aspect_ratio() -> int:
    """Longer over shorter side of an image."""
    return min(family.max_aspect_ratio for family in FAMILIES.values())


# --- configs ---------------------------------------------------------------------------------------------------------


def _config(model_or_config: Any) -> Mapping[str, Any]:
    config = getattr(model_or_config, "config", model_or_config)
    return config if isinstance(config, Mapping) else {"model_type": config.model_type, **vars(config)}


def _folder(name: str) -> Path:
    return BASE_DIR if name == "tiny" else Path(name)


def _config_here(name: str) -> Path | None:
    """The config.json of a folder, or of a Hub id in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = None if _folder(name).is_dir() else try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path of another machine
        cached = None
    path = Path(cached) if isinstance(cached, str) else _folder(name) / "config.json"
    return path if path.is_file() else None


def _read_config(path: Path, name: str) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name: the config.json of {name} cannot be read ({error}); download the model again"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"model.name: the config.json of {name} must be a mapping; download the model again")
    return config


def _config_from_hub(name: str, revision: str | None) -> Mapping[str, Any]:
    from transformers import AutoConfig

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it logs every retry
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model.name: the sizes of {name} are not known and its config cannot be loaded ({reason}); "
            "give a folder with its config.json"
        ) from None
