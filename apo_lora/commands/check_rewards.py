"""check on a recipe's data that correct answers earn the reward and wrong ones do not"""

from apo_lora.commands.arguments import add_recipe, load_named

add_arguments = add_recipe


def run(recipe: str, overrides: list[str]) -> int:
    from apo_lora.preflight.data import check_rewards

    return 0 if check_rewards(load_named(recipe, overrides)[1]) else 1
