"""The tuned policy: a base with the adapter that a run, or somebody else, made of it."""

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
    """The adapter's matrices in place of those of the active adapter. `options` are PEFT's.

    Raises ModelError unless they are exactly the ones that the model has room for.
    """
    from safetensors import SafetensorError

    try:
        loaded = model.load_adapter(str(source.folder), model.active_adapter, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"{source.folder}: the adapter cannot be loaded ({reason})") from error
    if loaded.missing_keys or loaded.unexpected_keys:
        raise ModelError(
            f"{source.folder}: not an adapter of this model: {len(loaded.missing_keys)} of its weights are missing "
            f"and {len(loaded.unexpected_keys)} belong elsewhere; is this the base it was trained on?"
        )
