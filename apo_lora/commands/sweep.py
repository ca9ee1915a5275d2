"""run an experiment: variants of a recipe, each at several seeds, compared"""

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

from apo_lora.commands.arguments import count_of

WHEN_STOPPED = "Stopped. Finished runs are kept; the same command continues the rest."


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("experiment", metavar="EXPERIMENT", help="path of an experiment, or the name of a shipped one")
    add("overrides", nargs="*", metavar="key=value", help="changes to every run's recipe")
    add("--out", metavar="DIR", type=Path, help="folder of the runs and of the comparison (default: runs/NAME)")
    jobs = "runs at once (default: one per core; one where there is a GPU)"
    add("--jobs", metavar="N", type=count_of("runs"), help=jobs)
    add("--seeds", metavar="N,N,...", type=_seeds, help="instead of the experiment's own seeds")
    add("--dry-run", action="store_true", help="list the runs with a time estimate, write nothing")


def _seeds(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len({int(number) for number in numbers}) < len(numbers):
        raise ArgumentTypeError(f"{text!r} is not a list of seeds; give for instance 1,2,3, none twice")
    return tuple(int(number) for number in numbers)


def run(experiment: str, overrides: list[str], **options) -> int:
    from apo_lora.sweep.sweep import sweep

    return sweep(experiment, overrides, **options)
