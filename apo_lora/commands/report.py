"""write an HTML report of one run, or a comparison of several"""

from argparse import ArgumentParser

from apo_lora.machine.paths import at_home


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        type=at_home,
        help="run directories; runs that differ only in their seed are grouped",
    )
    where = "file to write (default: RUN/report.html, or ./report.html for several runs)"
    parser.add_argument("--out", metavar="FILE", type=at_home, help=where)


def run(runs: list[str], out: str | None) -> int:
    from apo_lora.report.write import report

    print(f"Report       {report(runs, out)}")
    return 0
