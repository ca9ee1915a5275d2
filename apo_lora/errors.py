"""What a user did wrong, in one line each. The command line prints these and exits with 2; the rest is our bug."""


class UserError(Exception):
    """Something only the user can mend.

    `problems`: one line each, naming what is wrong, where (file, row, key), and the remedy.
    All problems that can be found are raised at once, so that one edit mends them all.
    """

    exit_code = 2

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("\n".join(problems))


class RecipeError(UserError):
    """A key, a value or a combination in a recipe."""


class DataError(UserError):
    """A data set, one of its rows or images."""


class RewardError(UserError):
    """A reward function that cannot be found, loaded or trusted."""


class ModelError(UserError):
    """A model, an adapter, or what this machine can do with them."""


class RunDirError(UserError):
    """A run directory or a checkpoint in it."""


class HubError(UserError):
    """The Hugging Face Hub: a token, a repository, or the way there."""


class TrainingStopped(UserError):
    """A run that ended early by itself; what it had learned is kept."""

    exit_code = 1


class Interrupted(TrainingStopped):
    """A run that a signal ended in order; the exit code is the shell's for that signal."""

    def __init__(self, signal_number: int, *problems: str):
        super().__init__(*problems)
        self.exit_code = 128 + signal_number


def printable(text: str) -> str:
    """`text` with control characters and broken ones spelled out: what data says must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
