"""evaluate a run's base and tuned model on held-out items: accuracy, difference, pass@k, gallery"""

import re
from argparse import ArgumentParser, ArgumentTypeError

from apo_lora.commands.arguments import add_path, count_of

WHEN_STOPPED = "Stopped. Answers so far are kept; run the same command again to continue."


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_path(parser, "run", "RUN", "a run directory, or its adapter-best")
    recipe = "take the settings of model, data, rewards and grpo from recipe R, where it sets them"
    add_path(parser, "--recipe", "R", recipe)
    change = "a change to the settings, such as grpo.max_completion_length=2048; can be repeated"
    add("--set", dest="overrides", metavar="key=value", action="append", default=[], help=change)
    data = (
        "evaluate on D instead of the recipe's held-out data: anything that data.train accepts, or a benchmark "
        "(mathvista, mathverse, mmk12, mmstar, mmmu); can be repeated"
    )
    add_path(parser, "--data", "D", data, action="append", default=[])
    add("--split", metavar="S", help="split of a Hugging Face data set (default: data.eval_split)")
    limit = "use only the first N rows of each data set (default: data.eval_limit; with --data, all rows)"
    add("--limit", metavar="N", type=count_of("rows"), help=limit)
    which = parser.add_mutually_exclusive_group()
    base = "evaluate only the base model; the tuned model can be added later"
    which.add_argument("--base", action="store_true", help=base)
    add_path(which, "--model", "FOLDER", "evaluate an exported (merged) model instead of the run's adapter")
    samples = "also sample K answers per item, for pass@k"
    add("--samples", metavar="K", type=count_of("samples"), default=0, help=samples)
    batch_size = "answers generated at once (default: as many as in training)"
    add("--batch-size", metavar="B", type=count_of("answers"), help=batch_size)
    engine = "what generates the answers: the model itself, or a vLLM server (see apo-lora setup-vllm)"
    add("--engine", choices=("transformers", "vllm"), default="transformers", help=engine)
    add("--name", metavar="NAME", type=_folder_name, help="name of the result folder, RUN/evaluations/NAME")


def _folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise ArgumentTypeError(f"{text!r} is not a valid folder name; use letters, digits, dots and dashes")
    return text


def run(run: str, **options) -> int:
    from apo_lora.evaluation.evaluate import evaluate

    evaluate(run, **options)
    return 0
