"""list the shipped recipes, or show one"""

from argparse import ArgumentParser

from apo_lora.machine.paths import at_home


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", type=at_home, help="print this recipe")
    parser.add_argument("--keys", action="store_true", help="list every key with its default and meaning")


def run(name: str | None, keys: bool) -> int:
    from apo_lora.recipe.files import describe_keys, find_recipe, shipped_recipes
    from apo_lora.sweep.experiment import shipped_experiments

    if keys:
        print("\n".join(describe_keys()))
    elif name:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
    else:
        for shipped, path in shipped_recipes().items():
            first_line = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"{shipped:<16} {first_line}")
        print("\napo-lora recipes NAME shows one; apo-lora recipes --keys explains every key.")
        print(f"Experiments, for apo-lora sweep NAME: {', '.join(shipped_experiments())}")
    return 0
