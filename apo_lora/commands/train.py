"""train a LoRA adapter from a recipe"""

from argparse import ArgumentParser

from apo_lora.commands.arguments import add_path, add_recipe, load_named

WHEN_STOPPED = "Stopped. Saved checkpoints are kept; continue with --resume auto."


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    resume = "continue the run from its last complete checkpoint, or from the one at PATH"
    add_path(parser, "--resume", "auto|PATH", resume)
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and the data, print the plan and stop")


def run(recipe: str, overrides: list[str], resume: str | None, dry_run: bool) -> int:
    from apo_lora.recipe.files import find_recipe
    from apo_lora.run.resume import of_its_run
    from apo_lora.train import train

    name, loaded = load_named(recipe, overrides)
    if resume:
        loaded = of_its_run(loaded, find_recipe(recipe), overrides)
    train(loaded, recipe_name=name, resume=resume, dry_run=dry_run)
    return 0
