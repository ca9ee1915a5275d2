"""make one HTML page of a run, or of several compared"""

from argparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; seeds of one recipe become one line")
    parser.add_argument("--out", metavar="FILE", help="else RUN/report.html, or ./report.html for several runs")


def run(runs: list[str], out: str | None) -> int:
    from apo_lora.report.write import report

    print(f"Report       {report(runs, out)}")
    return 0
