"""User errors, one line each. The command line prints them and exits with 2; any other exception is a bug."""


class UserError(Exception):
    """Something that only the user can fix.

    `problems`: one line each, naming what is wrong, where (file, row, key), and the remedy.
    All problems that can be found are raised at once, so that one edit fixes them all.
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
    """The Hugging Face Hub: a token, a repository, or the connection."""


class TrainingStopped(UserError):
    """A run that stopped itself early; what it has learned is kept."""

    exit_code = 1


class Interrupted(TrainingStopped):
    """A run that a signal stopped after its step; the exit code is the shell's for that signal."""

    def __init__(self, signal_number: int, *problems: str):
        super().__init__(*problems)
        self.exit_code = 128 + signal_number


def printable(text: str) -> str:
    """`text` with control characters and broken ones escaped: text from data must not control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
