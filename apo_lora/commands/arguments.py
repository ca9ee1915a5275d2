"""What each verb of the command line takes, and what a word on it must look like. No torch."""

import argparse
import re
from collections.abc import Callable


def _number_of(what: str) -> Callable[[str], int]:
    """Reads a whole number from 1 on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of {what}; write 1 or more")
        return int(text)

    return read


_tokens, _rows, _samples, _answers, _runs = map(_number_of, ("tokens", "rows", "samples", "answers", "runs"))


def with_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, metavar="R", help="path of a recipe, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, such as train.max_steps=10")


def with_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="continue the run: its last whole checkpoint, or the one at PATH"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and the data, show the plan, stop")


def with_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vram", metavar="GB", type=_gigabytes, help="memory of the card; else that of a visible GPU")


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no card; write its gigabytes, for instance 8")
    return size


def with_question(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or an adapter's or a GGUF's folder (see --recipe)")
    parser.add_argument("question")
    parser.add_argument("--image", metavar="FILE", help="what the question is about")
    parser.add_argument("--sample", action="store_true", help="sample as in training, in place of the likeliest tokens")
    parser.add_argument(
        "--max-tokens", metavar="N", type=_tokens, help="cut the answers there; else the recipe's limit"
    )
    parser.add_argument("--recipe", metavar="R", help="how to ask; else the run's, or the one that a push left")
    parser.add_argument("--gguf", action="store_true", help="ask the run's exported GGUF, through llama.cpp")
    parser.add_argument(
        "--base-gguf",
        metavar="DIR",
        help="with --gguf: the base's GGUF; else that of `export --to base-gguf`, or the tuned answer stands alone",
    )
    parser.add_argument(
        "--llama-cpp",
        metavar="DIR",
        help="with --gguf: a llama.cpp folder; else llama-server on the PATH, or the package xllamacpp",
    )


def with_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--recipe", metavar="R", help="ask as R says where it sets model, data, rewards or grpo")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="key=value",
        action="append",
        default=[],
        help="a change to how it is asked, such as grpo.max_completion_length=2048; may be given several times",
    )
    parser.add_argument(
        "--data",
        metavar="D",
        action="append",
        help="measure on D in place of the recipe's held-out data: any form of data.train, or a benchmark "
        "(mathvista, mathverse, mmk12, mmstar, mmmu); may be given several times",
    )
    parser.add_argument("--split", metavar="S", help="split of a Hugging Face id; else data.eval_split")
    parser.add_argument(
        "--limit",
        metavar="N",
        type=_rows,
        help="the first N rows of each; else data.eval_limit, or all of --data",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true", help="measure the base model alone; the tuned one can follow")
    which.add_argument("--model", metavar="FOLDER", help="an exported (merged) model in place of the run's adapter")
    parser.add_argument(
        "--samples",
        metavar="K",
        type=_samples,
        default=0,
        help="beside the greedy answer, K sampled ones, for pass@k",
    )
    parser.add_argument("--batch-size", metavar="B", type=_answers, help="answers at once; else as many as in training")
    parser.add_argument("--name", metavar="NAME", type=_folder_name, help="of the folder RUN/evaluations/NAME")


def _folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder; use letters, digits, dots and dashes")
    return text


def with_recipe_to_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="recipe to print")
    parser.add_argument("--keys", action="store_true", help="every key with its default and meaning")


def with_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; seeds of one recipe become one line")
    parser.add_argument("--out", metavar="FILE", help="else RUN/report.html, or ./report.html for several runs")


# export.verb.TARGETS, whose module wants no import for --help
EXPORT_TARGETS = ("merged", "gguf", "ollama", "base-gguf", "hub")


def with_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run directory, or an adapter's folder")
    parser.add_argument("--to", required=True, choices=EXPORT_TARGETS, help="what to make of it")
    parser.add_argument("--out", metavar="DIR", help="folder to write, which must not exist; else beside the adapter")
    parser.add_argument(
        "--quantization",
        choices=("Q8_0", "Q4_K_M", "F16", "F32"),
        default="Q8_0",
        help="of a GGUF's text model (default: Q8_0)",
    )
    parser.add_argument(
        "--llama-cpp", metavar="DIR", help="a llama.cpp folder, for GGUF; else its programs are looked for on the PATH"
    )
    parser.add_argument("--repo", metavar="ORG/NAME", help="where on the Hub (--to hub)")
    parser.add_argument("--what", choices=("adapter", "merged", "gguf"), default="adapter", help="what goes to the Hub")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", default=True, help="only you see it on the Hub (default)")
    seen.add_argument("--public", dest="private", action="store_false", help="everybody sees it on the Hub")


def with_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="path of an experiment, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to every run's recipe")
    parser.add_argument("--out", metavar="DIR", help="folder of the runs and of what they say (default: runs/NAME)")
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_runs,
        help="runs at once (default: one per core; one where there is a GPU)",
    )
    parser.add_argument("--seeds", metavar="N,N,...", type=_seeds, help="in place of the experiment's own seeds")
    parser.add_argument("--dry-run", action="store_true", help="list the runs with a time estimate, write nothing")


def _seeds(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len({int(number) for number in numbers}) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds; write for instance 1,2,3, none twice")
    return tuple(int(number) for number in numbers)
