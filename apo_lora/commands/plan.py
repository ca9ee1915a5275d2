"""estimate the GPU memory and time that a recipe needs and what would fit; runs without a GPU"""

from argparse import ArgumentParser, ArgumentTypeError

from apo_lora.commands.arguments import add_recipe, load_named


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--vram", metavar="GB", type=_gigabytes, help="GPU memory to plan for (default: that of the visible GPU)"
    )


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 10_000:
        raise ArgumentTypeError(f"{text!r}: GPU memory must be given in GB, for instance 8")
    return size


def run(recipe: str, overrides: list[str], vram: float | None) -> int:
    from apo_lora.preflight.plan_table import print_plan
    from apo_lora.run.start import with_start

    name, loaded = load_named(recipe, overrides)
    return 0 if print_plan(name, with_start(loaded), gpu_memory=vram) else 1
