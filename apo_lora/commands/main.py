"""The `apo-lora` command: parse, then import what the verb needs. `--help` answers without torch."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from apo_lora import __version__
from apo_lora.commands.arguments import (
    with_card,
    with_evaluation,
    with_export,
    with_question,
    with_recipe,
    with_recipe_to_show,
    with_runs,
    with_sweep,
    with_training_options,
)
from apo_lora.errors import UserError, printable
from apo_lora.machine import ranks


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
        print(VERBS[options.verb].when_stopped, file=sys.stderr)
        return 130
    except BrokenPipeError:  # `apo-lora recipes --keys | head`
        sys.stderr.close()
        return 0


def _by_rank(problem: str) -> str:
    """All processes of a run have the same to say of a bad recipe, and one of them of its own GPU."""
    problem = printable(problem)
    return problem if ranks.is_main() else f"process {ranks.rank()}: {problem}"


# --- verbs -----------------------------------------------------------------------------------------------------------


def _recipe_of(options: argparse.Namespace):
    from apo_lora.recipe.files import find_recipe, load_recipe

    path = find_recipe(options.recipe)
    return path.stem, load_recipe(path, options.overrides)


def _train(options: argparse.Namespace) -> int:
    from apo_lora.train import train

    name, recipe = _recipe_of(options)
    train(recipe, recipe_name=name, resume=options.resume, dry_run=options.dry_run)
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from apo_lora.recipe.files import describe_keys, find_recipe, shipped_recipes
    from apo_lora.sweep.experiment import shipped_experiments

    if options.keys:
        print("\n".join(describe_keys()))
    elif options.name:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
    else:
        for name, path in shipped_recipes().items():
            first_line = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"{name:<16} {first_line}")
        print("\napo-lora recipes NAME shows one; apo-lora recipes --keys explains every key.")
        print(f"Experiments, for apo-lora sweep NAME: {', '.join(shipped_experiments())}")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from apo_lora.data.check import report
    from apo_lora.data.examples import drop_long_prompts, drop_undecodable, load_examples
    from apo_lora.machine.process import prepare_process
    from apo_lora.policy.loading import load_processor

    _, recipe = _recipe_of(options)
    data = recipe.data
    # Before the heavy libraries: what is wrong with the data shows at once.
    loaded = drop_undecodable(
        load_examples(data.train, data, split=data.split, limit=data.limit, seed=recipe.train.seed)
    )
    prepare_process()

    processor = load_processor(recipe.model, data)
    lines = report(drop_long_prompts(loaded, processor, data), data, processor).lines()
    print("\n".join(map(printable, lines)))
    return 0


def _check_rewards(options: argparse.Namespace) -> int:
    from apo_lora.data.examples import load_examples
    from apo_lora.rewards.check import check_rows, table
    from apo_lora.rewards.verifier import Verifier

    _, recipe = _recipe_of(options)
    data = recipe.data
    loaded = load_examples(data.train, data, split=data.split, limit=data.limit, seed=recipe.train.seed)
    rows = [(example.answer, list(example.choices) if example.choices else None) for example in loaded.examples]
    with Verifier(seconds_per_item=recipe.rewards.seconds_per_item) as verifier:
        checks = check_rows(rows, verifier.score)
    print("\n".join([printable(loaded.summary()), *table(checks)]))
    return 0 if all(check.passed == check.checked for check in checks) else 1


def _preflight(options: argparse.Namespace) -> int:
    from apo_lora.train import run_preflight

    _, recipe = _recipe_of(options)
    return 0 if run_preflight(recipe) else 1


def _plan(options: argparse.Namespace) -> int:
    from apo_lora.family.lookup import find_shape
    from apo_lora.preflight.memory_plan import plan
    from apo_lora.preflight.plan_table import fits, plan_lines

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
    from apo_lora.machine.doctor import doctor

    return doctor()


def _chat(options: argparse.Namespace) -> int:
    from apo_lora.machine.process import prepare_process
    from apo_lora.recipe.files import find_recipe, load_recipe

    recipe = load_recipe(find_recipe(options.recipe)) if options.recipe else None
    how = {"image": options.image, "sampled": options.sample, "max_tokens": options.max_tokens}
    if not options.gguf:
        from apo_lora.run.adapter import find_adapter

        if options.base_gguf or options.llama_cpp:
            raise UserError("chat: --base-gguf and --llama-cpp go with --gguf")
        source = find_adapter(options.run)
        prepare_process()
        from apo_lora.chat.chat import chat

        chat(source, options.question, sys.stdout, recipe=recipe, **how)
        return 0
    prepare_process()
    from apo_lora.chat.gguf import chat_gguf, files_to_ask

    tuned, base, recipe = files_to_ask(Path(options.run), options.base_gguf, recipe)
    chat_gguf(tuned, base, recipe, options.question, sys.stdout, llama_cpp=options.llama_cpp, **how)
    return 0


def _eval(options: argparse.Namespace) -> int:
    from apo_lora.evaluation.evaluate import evaluate_run

    return evaluate_run(options)


def _export(options: argparse.Namespace) -> int:
    from apo_lora.export.verb import export

    return export(options)


def _report(options: argparse.Namespace) -> int:
    from apo_lora.report.write import report

    print(f"Report       {report(options.runs, options.out)}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from pathlib import Path

    from apo_lora.sweep.sweep import sweep

    out = Path(options.out) if options.out else None
    return sweep(
        options.experiment,
        options.overrides,
        out=out,
        jobs=options.jobs,
        seeds=options.seeds,
        dry_run=options.dry_run,
    )


class Verb(NamedTuple):
    help: str
    arguments: tuple[Callable[[argparse.ArgumentParser], None], ...]
    run: Callable[[argparse.Namespace], int]
    when_stopped: str = "Stopped."


VERBS = {
    "train": Verb(
        "train an adapter by a recipe",
        (with_recipe, with_training_options),
        _train,
        "Stopped. What was saved is kept; continue with --resume auto.",
    ),
    "sweep": Verb(
        "run an experiment: variants of a recipe, each at several seeds, compared",
        (with_sweep,),
        _sweep,
        "Stopped. Finished runs are kept; the same command continues the rest.",
    ),
    "recipes": Verb("list the shipped recipes, or show one", (with_recipe_to_show,), _recipes),
    "check-data": Verb("report on a recipe's data: rows, answers, images, tokens", (with_recipe,), _check_data),
    "check-rewards": Verb(
        "prove on a recipe's data that right answers are rewarded and wrong ones are not",
        (with_recipe,),
        _check_rewards,
    ),
    "preflight": Verb(
        "check image, reference and sampling, and whether the largest example fits", (with_recipe,), _preflight
    ),
    "plan": Verb(
        "estimate the GPU memory a recipe needs, and what fits a card; needs no GPU", (with_recipe, with_card), _plan
    ),
    "chat": Verb("ask base and tuned model of a run one question, side by side", (with_question,), _chat),
    "eval": Verb(
        "measure base and tuned model of a run on held-out items: accuracy, difference, pass@k, gallery",
        (with_evaluation,),
        _eval,
    ),
    "report": Verb("make one HTML page of a run, or of several compared", (with_runs,), _report),
    "export": Verb("make of an adapter what people deploy, and check it", (with_export,), _export),
    "doctor": Verb("check this machine: versions, GPU, memory, disk; plain text to paste into an issue", (), _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
