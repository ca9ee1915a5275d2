"""Finding a user's own reward function: "module:function" or "path/to/file.py:function".

The signature is TRL's: `f(prompts, completions, **columns) -> list[float]`.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from apo_lora.errors import RewardError
from apo_lora.recipe.schema import BUILT_IN_REWARDS

_FORM = 'write it as "module:function" or "path/to/file.py:function"'


def find_rewards(names: Sequence[str]) -> None:
    """Checks that the files and modules of custom rewards exist, without running them. Raises RewardError, all at once.

    A module that is not imported yet is only located, which imports its parent packages.
    """
    problems = []
    for spec in (name for name in names if name not in BUILT_IN_REWARDS):
        try:
            source, _ = _parts(spec)
            _file(spec, source) if _is_file(source) else _require_module(spec, source)
        except RewardError as error:
            problems += error.problems
    if problems:
        raise RewardError(*problems)


def load_reward(spec: str) -> Callable:
    """The function that `spec` names, checked to be callable as f(prompts=..., completions=..., **columns).

    This runs the module: only commands that train call it, with names that the user's own recipe or command line gives.
    """
    source, name = _parts(spec)
    module = _from_file(spec, _file(spec, source)) if _is_file(source) else _from_module(spec, source)
    function = getattr(module, name, None)
    if function is None:
        raise RewardError(f"reward {spec!r}: {source} has no {name!r}; {_nearest(name, module)}")
    if not callable(function):
        raise RewardError(
            f"reward {spec!r}: {name!r} must be a function, not {type(function).__name__}; name a function"
        )
    _check_signature(spec, function)
    return function


def _parts(spec: str) -> tuple[str, str]:
    source, separator, name = str(spec).rpartition(":")
    if not separator or not source.strip() or not name.isidentifier():
        near = difflib.get_close_matches(str(spec), BUILT_IN_REWARDS, n=1)
        hint = f"did you mean {near[0]}? Otherwise " if near else ""
        raise RewardError(f"reward {spec!r} does not name a function; {hint}{_FORM}")
    return source, name


def _is_file(source: str) -> bool:
    return source.endswith(".py") or "/" in source or "\\" in source


def _file(spec: str, source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "paths are relative to the current directory"
        raise RewardError(f"reward {spec!r}: no file {str(path)!r} (looked in {path.parent.resolve()}); {hint}")
    return path


def _from_file(spec: str, path: Path) -> ModuleType:
    loaded = importlib.util.spec_from_file_location(_module_name(path), path)
    if loaded is None:
        raise RewardError(f"reward {spec!r}: {str(path)!r} is not a Python file; give it the ending .py")
    module = importlib.util.module_from_spec(loaded)
    sys.modules[loaded.name] = module  # dataclasses and pickle look their module up by name
    with _modules_beside(str(path.resolve().parent)):
        return _run(spec, lambda: loaded.loader.exec_module(module) or module)


def _module_name(path: Path) -> str:
    return f"apo_lora_user_{path.stem}"


@contextmanager
def _modules_beside(folder: str) -> Iterator[None]:
    """What is imported inside may lie in `folder`, as in a program that Python is given; it stays on the path, behind
    all libraries, for what functions import when they are called."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _from_module(spec: str, name: str) -> ModuleType:
    _require_module(spec, name)
    return _run(spec, lambda: importlib.import_module(name))


def source_files(spec: str) -> list[Path]:
    """The file of a loaded reward, then the files beside it that it has imported; none of a built-in one."""
    if spec in BUILT_IN_REWARDS:
        return []
    source, _ = _parts(spec)
    module = sys.modules.get(_module_name(_file(spec, source)) if _is_file(source) else source)
    if not (path := getattr(module, "__file__", None)):
        return []
    own = Path(path).resolve()
    files = {Path(str(getattr(other, "__file__", ""))) for other in list(sys.modules.values())}
    folders = {folder: folder.resolve() for folder in {file.parent for file in files if file.is_absolute()}}
    near = {file.resolve() for file in files if folders.get(file.parent) == own.parent or file.is_symlink()} - {own}
    return [own, *sorted(file for file in near if file.parent == own.parent)]


def _require_module(spec: str, name: str) -> None:
    found = _find(name)
    if found is None:  # in the working directory, where `python -m` looks too; behind all libraries
        sys.path.append(os.getcwd())
        if (found := _find(name)) is None:
            sys.path.pop()
    if found is None:
        raise RewardError(
            f"reward {spec!r}: no module named {name!r}; install it, or give its file (path/to/file.py:function)"
        )


def _find(name: str) -> ModuleSpec | None:
    try:
        with _no_bytecode():  # a parent package is imported
            return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """No __pycache__ appears beside the user's files."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _run(spec: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        with _no_bytecode():
            return load()
    except (Exception, SystemExit) as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        message = " ".join(str(error).split())[:200]
        raise RewardError(
            f"reward {spec!r} could not be imported: {type(error).__name__}: {message}{where}; "
            "fix it so that `python` can import it"
        ) from error


def _nearest(name: str, module: ModuleType) -> str:
    names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"it has {', '.join(sorted(names)[:8])}" if names else "it defines no function"


def _check_signature(spec: str, function: Callable) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins have none; the first call will tell
        return
    kinds = {p.kind for p in signature.parameters.values()}
    named = {p.name for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    try:  # named parameters may be columns of the data, which is not here yet
        signature.bind(**dict.fromkeys(named | {"prompts", "completions", "answer", "choices"}))
    except TypeError as error:
        remedy = "" if inspect.Parameter.VAR_KEYWORD in kinds else " (add **columns: every data column is passed)"
        raise RewardError(
            f"reward {spec!r} must be callable as f(prompts, completions, **columns) -> list[float]: {error}{remedy}"
        ) from None
