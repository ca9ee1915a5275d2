"""`apo-lora doctor`."""

from argparse import ArgumentParser

HELP = "check this machine: versions, GPU, memory, disk; plain text to paste into an issue"


def add_arguments(parser: ArgumentParser) -> None:
    """It takes none."""


def run() -> int:
    from apo_lora.machine.doctor import doctor

    return doctor()
