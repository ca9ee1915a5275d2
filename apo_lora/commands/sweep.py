"""run an experiment: train variants of a recipe at several seeds and compare them"""

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

from apo_lora.commands.arguments import add_overrides, add_path, count_of

WHEN_STOPPED = "Stopped. Finished runs are kept; run the same command again to continue the rest."


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_path(parser, "experiment", "EXPERIMENT", "path of an experiment, or the name of a shipped experiment")
    add_overrides(parser, "changes to every run's recipe")
    add_path(parser, "--out", "DIR", "folder for the runs and their comparison (default: runs/NAME)")
    jobs = "number of runs at once (default: 1 with a GPU, else one per CPU core)"
    add("--jobs", metavar="N", type=count_of("runs"), help=jobs)
    add("--seeds", metavar="N,N,...", type=_seeds, help="use these seeds instead of the experiment's")
    add("--dry-run", action="store_true", help="list the runs with a time estimate and write nothing")


def _seeds(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len({int(number) for number in numbers}) < len(numbers):
        raise ArgumentTypeError(f"{text!r} is not a list of different seeds; give for instance 1,2,3")
    return tuple(int(number) for number in numbers)


def run(experiment: str, overrides: list[str], out: str | None, **options) -> int:
    from apo_lora.sweep.sweep import sweep

    return sweep(experiment, overrides, out=Path(out) if out else None, **options)
