"""The tuned policy: a base with an adapter from a run or from elsewhere."""

from typing import TYPE_CHECKING, Any

from apo_lora.errors import ModelError
from apo_lora.policy.loading import Policy, import_engine, load_policy
from apo_lora.recipe.schema import Recipe
from apo_lora.run.adapter import AdapterSource

if TYPE_CHECKING:
    from peft import PeftModel


def load_tuned(source: AdapterSource, recipe: Recipe) -> Policy:
    """The run's base, loaded as it was trained, with the run's adapter in place of the fresh one. Raises ModelError."""
    import_engine(recipe.model)
    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=recipe.train.seed)
    load_adapter(policy.model, source)
    return policy


def load_adapter(model: "PeftModel", source: AdapterSource, **options: Any) -> None:
    """Loads the adapter's matrices into the active adapter. `options` are PEFT's.

    Raises ModelError unless they match the model's adapter exactly.
    """
    from safetensors import SafetensorError

    try:
        loaded = model.load_adapter(str(source.folder), model.active_adapter, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"{source.folder}: the adapter cannot be loaded ({reason}); copy it again from where it was trained"
        ) from error
    if loaded.missing_keys or loaded.unexpected_keys:
        raise ModelError(
            f"{source.folder}: the adapter does not match this model ({len(loaded.missing_keys)} weights are missing, "
            f"{len(loaded.unexpected_keys)} are unexpected); use the base that it was trained on"
        )
