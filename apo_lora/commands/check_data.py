"""report what a recipe's data contains: rows, answers, images, prompt lengths"""

from apo_lora.commands.arguments import add_recipe, load_named

add_arguments = add_recipe


def run(recipe: str, overrides: list[str]) -> int:
    from apo_lora.preflight.data import check_data

    check_data(load_named(recipe, overrides)[1])
    return 0
