"""The tuned policy: a base with an adapter from a run or from elsewhere.

An adapter's layers are those that its file has weights for, by the names that transformers gives them now. So it does
not matter how they were chosen in training (all-linear, some layers, a pattern), nor by which version of transformers.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from apo_lora.errors import ModelError
from apo_lora.policy.loading import Policy, import_engine, load_policy, set_reference
from apo_lora.recipe.schema import Recipe
from apo_lora.run.adapter import CONFIG, WEIGHTS, AdapterSource, current_names, layer_names, plain_lora_config
from apo_lora.run.start import named_in_errors, start_adapter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor


def load_start(recipe: Recipe) -> Policy:
    """The recipe's base with the adapter in lora.start, to be trained; and the reference. Raises ModelError.

    `recipe` has been through run.start.with_start.
    """
    with named_in_errors():
        policy = load_tuned(start_adapter(recipe), recipe, dropout=recipe.lora.dropout)
    set_reference(policy.model, recipe.grpo.reference)
    return policy


def load_tuned(source: AdapterSource, recipe: Recipe, *, dropout: float = 0.0) -> Policy:
    """The recipe's base, loaded as it was trained, with the adapter. Raises ModelError."""
    import_engine(recipe.model)
    plain_lora_config(source)
    config = lora_config(source)
    shape = {key: getattr(config, key) for key in ("r", "lora_alpha", "target_modules", "use_rslora")}
    shape["lora_dropout"] = dropout
    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=recipe.train.seed, adapter=shape)
    load_adapter(policy.model, source)
    return policy


def lora_config(source: AdapterSource) -> "LoraConfig":
    """The adapter's own, with its layers by name. Raises ModelError."""
    from peft import LoraConfig, PeftConfig

    layers = layer_names(source)
    try:
        config = PeftConfig.from_pretrained(str(source.folder))
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source.folder}: the adapter cannot be read ({str(error).splitlines()[0]}); copy it again"
        ) from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{source.folder}: {CONFIG} is of a {config.peft_type} adapter; only LoRA is supported")
    if not layers:
        raise ModelError(f"{source.folder}: {WEIGHTS} contains no LoRA layer; give another adapter")
    config.target_modules = "|".join(map(re.escape, layers))  # PEFT matches it in full
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def load_adapter(model: "PeftModel", source: AdapterSource, *, assign: bool = False) -> None:
    """Loads the adapter's matrices into the active adapter; with `assign`, in float32 in place of those that are there.

    Raises ModelError unless they match the model's adapter exactly, and are numbers.
    """
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(source.folder / WEIGHTS)
        _require_numbers(weights, source.folder)
        names = current_names(weights, source)
        state = {names[key]: weight.float() if assign else weight for key, weight in weights.items()}
        loaded = set_peft_model_state_dict(model, state, model.active_adapter, low_cpu_mem_usage=assign)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"{source.folder}: the adapter cannot be loaded ({reason}); copy it again, or use the base that it was "
            "trained on"
        ) from error
    missing = [key for key in loaded.missing_keys if ".lora_" in key]
    if missing or loaded.unexpected_keys:
        raise ModelError(
            f"{source.folder}: the adapter does not match this model ({len(missing)} weights are missing, "
            f"{len(loaded.unexpected_keys)} are unexpected); use the base that it was trained on"
        )


def _require_numbers(weights: "dict[str, Tensor]", folder: Path) -> None:
    bad = [key for key, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        raise ModelError(
            f"{folder}: {len(bad)} of {len(weights)} weights of the adapter are NaN or infinite, such as {min(bad)}; "
            "take an earlier checkpoint of that training"
        )
