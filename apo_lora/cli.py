"""The `apo-lora` command: parse, then import what the verb needs. `--help` answers without torch."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from apo_lora import __version__, ranks
from apo_lora.errors import UserError


class _OneLineParser(argparse.ArgumentParser):
    """Bad use is one line and exit code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="apo-lora", description="Teach a vision-language model to reason on one GPU: LoRA, GRPO and APO."
    )
    parser.add_argument("--version", action="version", version=f"apo-lora {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_OneLineParser)
    for name, verb in VERBS.items():
        of_verb = verbs.add_parser(name, help=verb.help, description=verb.help)
        for add in verb.arguments:
            add(of_verb)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0; 1 a check failed or a run stopped itself; 2 something to mend.

    A run that a signal stopped gives the shell's code for it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser()
    # The parser's own words for an unknown verb list all of them; the nearest one is more help.
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        parser.error(f"no verb {arguments[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
    options = parser.parse_args(arguments)
    try:
        return VERBS[options.verb].run(options)
    except UserError as error:
        print("\n".join(_by_rank(problem) for problem in error.problems), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped. What was saved is kept; continue with --resume auto.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `apo-lora recipes --keys | head`
        sys.stderr.close()
        return 0


def _by_rank(problem: str) -> str:
    """All processes of a run have the same to say of a bad recipe, and one of them of its own GPU."""
    return problem if ranks.is_main() else f"process {ranks.rank()}: {problem}"


# --- arguments -------------------------------------------------------------------------------------------------------


def _with_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, metavar="R", help="path of a recipe, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, such as train.max_steps=10")


def _with_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="continue the run: its last whole checkpoint, or the one at PATH"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and the data, show the plan, stop")


def _with_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vram", metavar="GB", type=_gigabytes, help="memory of the card; else that of a visible GPU")


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no card; write its gigabytes, for instance 8")
    return size


def _with_question(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("question")
    parser.add_argument("--image", metavar="FILE", help="what the question is about")
    parser.add_argument("--sample", action="store_true", help="sample as in training, in place of the likeliest tokens")
    parser.add_argument(
        "--max-tokens", metavar="N", type=_tokens, help="cut the answers there; else the recipe's limit"
    )


def _tokens(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write for instance 512")
    return int(text)


def _with_recipe_to_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="recipe to print")
    parser.add_argument("--keys", action="store_true", help="every key with its default and meaning")


EXPORT_TARGETS = ("merged", "gguf", "ollama", "hub")  # export.TARGETS, whose module wants no import for --help


def _with_export(parser: argparse.ArgumentParser) -> None:
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


# --- verbs -----------------------------------------------------------------------------------------------------------


def _recipe_of(options: argparse.Namespace):
    from apo_lora.recipe_file import find_recipe, load_recipe

    path = find_recipe(options.recipe)
    return path.stem, load_recipe(path, options.overrides)


def _train(options: argparse.Namespace) -> int:
    from apo_lora.train import train

    name, recipe = _recipe_of(options)
    train(recipe, recipe_name=name, resume=options.resume, dry_run=options.dry_run)
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from apo_lora.recipe_file import describe_keys, find_recipe, shipped_recipes

    if options.keys:
        print("\n".join(describe_keys()))
    elif options.name:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
    else:
        for name, path in shipped_recipes().items():
            first_line = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"{name:<16} {first_line}")
        print("\napo-lora recipes NAME shows one; apo-lora recipes --keys explains every key.")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from apo_lora.check_data import report
    from apo_lora.data import drop_long_prompts, load_examples
    from apo_lora.model import load_processor
    from apo_lora.process import prepare_process

    _, recipe = _recipe_of(options)
    prepare_process()
    data = recipe.data
    processor = load_processor(recipe.model, data)
    loaded = load_examples(data.train, data, split=data.split, limit=data.limit, seed=recipe.train.seed)
    print("\n".join(report(drop_long_prompts(loaded, processor, data), data, processor).lines()))
    return 0


def _check_rewards(options: argparse.Namespace) -> int:
    from apo_lora.check_rewards import check_rows, table
    from apo_lora.data import load_examples
    from apo_lora.verifier import Verifier

    _, recipe = _recipe_of(options)
    data = recipe.data
    loaded = load_examples(data.train, data, split=data.split, limit=data.limit, seed=recipe.train.seed)
    rows = [(example.answer, list(example.choices) if example.choices else None) for example in loaded.examples]
    with Verifier(seconds_per_item=recipe.rewards.seconds_per_item) as verifier:
        checks = check_rows(rows, verifier.score)
    print("\n".join([loaded.summary(), *table(checks)]))
    return 0 if all(check.passed == check.checked for check in checks) else 1


def _preflight(options: argparse.Namespace) -> int:
    from apo_lora.train import run_preflight

    _, recipe = _recipe_of(options)
    return 0 if run_preflight(recipe) else 1


def _plan(options: argparse.Namespace) -> int:
    from apo_lora.memory_plan import plan
    from apo_lora.memory_table import fits, plan_lines
    from apo_lora.model_shape import find_shape

    name, recipe = _recipe_of(options)
    shape = find_shape(recipe.model.name, recipe.model.revision)
    planned, card = plan(shape, recipe), options.vram or _visible_gpu()
    print("\n".join(plan_lines(name, recipe, shape, planned, card)))
    return 0 if card is None or fits(planned, card) else 1


def _visible_gpu() -> float | None:
    """GiB of the GPU, where there is one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None


def _doctor(options: argparse.Namespace) -> int:
    from apo_lora.doctor import doctor

    return doctor()


def _chat(options: argparse.Namespace) -> int:
    from apo_lora.adapter_source import find_adapter
    from apo_lora.process import prepare_process

    source = find_adapter(options.run)
    prepare_process()
    from apo_lora.chat import chat

    chat(
        source,
        options.question,
        sys.stdout,
        image=options.image,
        sampled=options.sample,
        max_tokens=options.max_tokens,
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    from apo_lora.export import export

    return export(options)


class Verb(NamedTuple):
    help: str
    arguments: tuple[Callable[[argparse.ArgumentParser], None], ...]
    run: Callable[[argparse.Namespace], int]


VERBS = {
    "train": Verb("train an adapter by a recipe", (_with_recipe, _with_training_options), _train),
    "recipes": Verb("list the shipped recipes, or show one", (_with_recipe_to_show,), _recipes),
    "check-data": Verb("report on a recipe's data: rows, answers, images, tokens", (_with_recipe,), _check_data),
    "check-rewards": Verb(
        "prove on a recipe's data that right answers are rewarded and wrong ones are not",
        (_with_recipe,),
        _check_rewards,
    ),
    "preflight": Verb(
        "check image, reference and sampling, and whether the largest example fits", (_with_recipe,), _preflight
    ),
    "plan": Verb(
        "estimate the GPU memory a recipe needs, and what fits a card; needs no GPU", (_with_recipe, _with_card), _plan
    ),
    "chat": Verb("ask base and tuned model of a run one question, side by side", (_with_question,), _chat),
    "export": Verb("make of an adapter what people deploy, and check it", (_with_export,), _export),
    "doctor": Verb("check this machine: versions, GPU, memory, disk; plain text to paste into an issue", (), _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
