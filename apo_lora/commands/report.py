"""write an HTML report of one run, or a comparison of several"""

from argparse import ArgumentParser

from apo_lora.commands.arguments import add_path


def add_arguments(parser: ArgumentParser) -> None:
    runs = "run directories; runs that differ only in their seed are grouped"
    add_path(parser, "runs", "RUN", runs, nargs="+")
    add_path(parser, "--out", "FILE", "file to write (default: RUN/report.html, or ./report.html for several runs)")


def run(runs: list[str], out: str | None) -> int:
    from apo_lora.report.page import report

    written = report(runs, out)
    print(f"Report       {written.path}")
    for name, text in written.credit.items():
        run_name = f"{name}: " if len(written.credit) > 1 else ""
        print(f"Credit       {run_name}recomputed from completions.jsonl: {text}")
    return 0
