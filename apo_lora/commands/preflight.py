"""load the model and check images, reference, sampling, and that the largest example fits"""

from apo_lora.commands.arguments import add_recipe, load_named

add_arguments = add_recipe


def run(recipe: str, overrides: list[str]) -> int:
    from apo_lora.train import run_preflight

    return 0 if run_preflight(load_named(recipe, overrides)[1]) else 1
