"""write an HTML report of one run, or a comparison of several"""

from argparse import ArgumentParser

from apo_lora.commands.arguments import add_path


def add_arguments(parser: ArgumentParser) -> None:
    runs = "run directories; runs that differ only in their seed are grouped"
    add_path(parser, "runs", "RUN", runs, nargs="+")
    add_path(parser, "--out", "FILE", "file to write (default: RUN/report.html, or ./report.html for several runs)")


def run(runs: list[str], out: str | None) -> int:
    from apo_lora.report.page import report

    print(f"Report       {report(runs, out)}")
    return 0
