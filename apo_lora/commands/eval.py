"""measure base and tuned model of a run on held-out items: accuracy, difference, pass@k, gallery"""

import re
from argparse import ArgumentParser, ArgumentTypeError

from apo_lora.commands.arguments import count_of

WHEN_STOPPED = "Stopped. What was answered is kept; the same command goes on."


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory")
    add("--recipe", metavar="R", help="ask as R says where it sets model, data, rewards or grpo")
    add(
        "--set",
        dest="overrides",
        metavar="key=value",
        action="append",
        default=[],
        help="a change to how it is asked, such as grpo.max_completion_length=2048; may be given several times",
    )
    add(
        "--data",
        metavar="D",
        action="append",
        default=[],
        help="measure on D instead of the recipe's held-out data: any form of data.train, or a benchmark "
        "(mathvista, mathverse, mmk12, mmstar, mmmu); may be given several times",
    )
    add("--split", metavar="S", help="split of a Hugging Face id; else data.eval_split")
    limit = "the first N rows of each; else data.eval_limit, or all of --data"
    add("--limit", metavar="N", type=count_of("rows"), help=limit)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true", help="measure the base model alone; the tuned one can follow")
    which.add_argument("--model", metavar="FOLDER", help="an exported (merged) model instead of the run's adapter")
    samples = "besides the greedy answer, K sampled ones, for pass@k"
    add("--samples", metavar="K", type=count_of("samples"), default=0, help=samples)
    add("--batch-size", metavar="B", type=count_of("answers"), help="answers at once; else as many as in training")
    add("--name", metavar="NAME", type=_folder_name, help="of the folder RUN/evaluations/NAME")


def _folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise ArgumentTypeError(f"{text!r} cannot name a folder; use letters, digits, dots and dashes")
    return text


def run(run: str, **options) -> int:
    from apo_lora.evaluation.evaluate import evaluate

    evaluate(run, **options)
    return 0
