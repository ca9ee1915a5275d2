"""check this machine (versions, GPU, memory, disk) and print a report to paste into an issue"""

from argparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """It takes none."""


def run() -> int:
    from apo_lora.machine.doctor import doctor

    return doctor()
