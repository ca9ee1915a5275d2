"""The `apo-lora` command: parse, then call the verb's function. `--help` answers without a heavy library.

Each verb has a file here: its docstring is the help, `add_arguments(parser)` says what it takes, `run(**options)`
imports what that needs and returns the exit code, and WHEN_STOPPED, where it is there, is the line for Ctrl-C.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence

from apo_lora import __version__
from apo_lora.commands import (
    chat,
    check_data,
    check_rewards,
    doctor,
    eval,
    export,
    plan,
    preflight,
    recipes,
    report,
    setup_vllm,
    sweep,
    train,
)
from apo_lora.errors import UserError, printable
from apo_lora.machine import ranks
from apo_lora.machine.process import accept_every_sign, prepare_process

VERBS = {
    "train": train,
    "sweep": sweep,
    "recipes": recipes,
    "check-data": check_data,
    "check-rewards": check_rewards,
    "preflight": preflight,
    "plan": plan,
    "chat": chat,
    "eval": eval,
    "report": report,
    "export": export,
    "setup-vllm": setup_vllm,
    "doctor": doctor,
}


class _OneLineParser(argparse.ArgumentParser):
    """Bad use is one line and exit code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="apo-lora", description="Teach a vision-language model to reason on one GPU, with LoRA, GRPO and APO."
    )
    parser.add_argument("--version", action="version", version=f"apo-lora {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_OneLineParser)
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.__doc__)
    return parser


def parser_of(name: str) -> argparse.ArgumentParser:
    """Of one verb. Use `parse_intermixed_args`: options may stand anywhere among the other words."""
    verb = VERBS[name]
    parser = _OneLineParser(prog=f"apo-lora {name}", description=verb.__doc__)
    verb.add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0; 1 if a check failed or a run stopped itself; 2 for a user error.

    A run that a signal stopped gives the shell's code for it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser()
    # argparse's message for an unknown verb lists all of them; the nearest one is more help.
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        parser.error(f"unknown verb {arguments[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
    accept_every_sign()
    if not arguments or arguments[0] not in VERBS:
        parser.parse_args(arguments)  # --help, --version, or an error
    # The verb's own parser: argparse takes words before, between and after options only from a parser without verbs.
    verb = VERBS[arguments[0]]
    options = vars(parser_of(arguments[0]).parse_intermixed_args(arguments[1:]))
    prepare_process()
    try:
        return verb.run(**options)
    except UserError as error:
        print("\n".join(_by_rank(problem) for problem in error.problems), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(getattr(verb, "WHEN_STOPPED", "Stopped."), file=sys.stderr)
        return 130
    except BrokenPipeError:  # `apo-lora recipes --keys | head`
        sys.stderr.close()
        return 0


def _by_rank(problem: str) -> str:
    """All processes report the same problem of a recipe; a problem of one GPU comes from its own process."""
    problem = printable(problem)
    return problem if ranks.is_main() else f"process {ranks.rank()}: {problem}"


if __name__ == "__main__":
    sys.exit(main())
