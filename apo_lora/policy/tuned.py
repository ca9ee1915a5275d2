"""The tuned policy: a base with the adapter that a run, or somebody else, made of it."""

from apo_lora.errors import ModelError
from apo_lora.policy.loading import Policy, import_engine, load_policy
from apo_lora.recipe.schema import Recipe
from apo_lora.run.adapter import AdapterSource


def load_tuned(source: AdapterSource, recipe: Recipe) -> Policy:
    """The run's base, loaded as it was trained, with the run's adapter in place of the fresh one. Raises ModelError."""
    import_engine(recipe.model)
    from safetensors import SafetensorError

    policy = load_policy(recipe.model, recipe.lora, recipe.data, seed=recipe.train.seed)
    try:
        loaded = policy.model.load_adapter(str(source.folder), policy.model.active_adapter)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"{source.folder}: the adapter cannot be loaded ({first_line})") from error
    if loaded.missing_keys or loaded.unexpected_keys:
        raise ModelError(
            f"{source.folder}: not the adapter of this recipe: {len(loaded.missing_keys)} of its weights are "
            f"missing and {len(loaded.unexpected_keys)} belong elsewhere"
        )
    return policy
