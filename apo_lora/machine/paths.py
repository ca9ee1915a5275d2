"""Paths as users write them, and as they can paste them."""

import shlex
from os.path import expanduser
from pathlib import Path


def at_home(text: str) -> str:
    """With the home folder in place of a leading ~, also of the path in `mathvista:~/files`.

    A shell leaves the ~ of --out=~/x, of key=~/x and of quoted words as it is, and YAML every one.
    """
    name, colon, path = text.partition(":")
    if path.startswith("~") and not name.startswith("~"):
        return f"{name}:{expanduser(path)}"
    return expanduser(text)


def as_word(path: str | Path) -> str:
    """For a command that is shown to be pasted into a shell."""
    return shlex.quote(str(path))
