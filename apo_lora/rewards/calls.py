"""Calls of reward functions: what a user's own one does wrong is one line that names it, and rewards are numbers.

Rewards that are not finite count as 0, their number is recorded, and the first one is shown: TRL silently treats NaN as
a reward that does not apply, and an infinite one would drown out all others of its group.
"""

import asyncio
import functools
import inspect
import math
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from apo_lora.errors import RewardError

RewardFunction = Callable[..., Any]
"""f(prompts, completions, **columns) -> one number per completion, None where it does not apply. May be async."""

LARGEST = 1e15
"""Advantages square weighted sums of rewards in float32, whose largest number is 3.4e38."""

_WANTED = "it must return a list with one number (or None) per completion"
_NOT_THE_USERS = (str(Path(__file__).parents[1]), str(Path(os.__file__).parent))


class CheckedRewards:
    """Reward functions that raise only RewardError, and return finite numbers."""

    def __init__(self, warn: Callable[[str], Any] = tqdm.write) -> None:
        self.replaced = 0
        self.warn = warn

    def of(self, function: RewardFunction) -> RewardFunction:
        """The same function, checked; async if it is. None stays: it means "does not apply"."""
        name = name_of(function)

        def rewards(**arguments: Any) -> list[float | None]:
            with _as_one_line(name):
                returned = awaited(function(**arguments))
            return self._read(name, returned, len(arguments["completions"]))

        async def async_rewards(**arguments: Any) -> list[float | None]:
            with _as_one_line(name):
                returned = await function(**arguments)
            return self._read(name, returned, len(arguments["completions"]))

        checked = functools.wraps(function)(async_rewards if is_async(function) else rewards)
        checked.__name__ = name  # TRL names its reward columns after the function
        return checked

    def _read(self, name: str, returned: Any, count: int) -> list[float | None]:
        if hasattr(returned, "tolist"):  # a tensor, an array, a series
            returned = returned.tolist()
        if returned is None:
            raise RewardError(f"reward {name!r} returned nothing; {_WANTED}")
        if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping | Set):
            raise RewardError(f"reward {name!r} returned {_described(returned)}; {_WANTED}")
        with _as_one_line(name):  # a generator runs here
            rewards = list(returned)
        if len(rewards) != count:
            raise RewardError(f"reward {name!r} returned {len(rewards)} rewards for {count} completions; {_WANTED}")
        return [None if reward is None else self._number(name, place, reward) for place, reward in enumerate(rewards)]

    def _number(self, name: str, place: int, reward: Any) -> float:
        try:
            if isinstance(reward, str | bytes):  # which float() would read
                raise TypeError
            number = float(reward)
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError, RuntimeError):
            raise RewardError(
                f"reward {name!r} returned {_described(reward)} for completion {place + 1}; {_WANTED}"
            ) from None
        if abs(number) <= LARGEST:  # not so for NaN
            return number
        if not self.replaced:
            self.warn(
                f"warning: {name} returned the reward {number}; rewards that are not finite (or beyond {LARGEST:.0e}) "
                "count as 0, and are counted"
            )
        self.replaced += 1
        return 0.0


def name_of(function: RewardFunction) -> str:
    """As TRL names it: that of the function inside a partial, that of an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: RewardFunction) -> bool:
    """As TRL sees it, which awaits such functions side by side."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ", ".join(repr(key) for key in list(value)[:4])
        return f"a mapping ({keys}), of which it must choose one number"
    if isinstance(value, str | bytes):
        return f"text ({value[:40]!r})"
    if isinstance(value, Sequence):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]}"


@contextmanager
def _as_one_line(name: str) -> Iterator[None]:
    """What a user's code raises as a RewardError; also sys.exit, which would end a run as if it were finished."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = next((frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)), None)
        where = f" ({Path(own.filename).name} line {own.lineno})" if own else ""
        message = " ".join(str(error).split())[:200]
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {message}{where}; fix the function, then run the same "
            "command again (with --resume auto, where there is a checkpoint)"
        ) from error


# --- async functions -------------------------------------------------------------------------------------------------


def awaited(returned: Any) -> Any:
    """The result of a coroutine; anything else as it is.

    All run in one event loop, for as long as the process does: a function's HTTP client belongs to the loop it was
    first used in. It has its own thread, since a notebook's main thread already runs one.
    """
    if not inspect.isawaitable(returned):
        return returned
    result = asyncio.run_coroutine_threadsafe(_without_exit(returned), _event_loop()).result()
    if isinstance(result, SystemExit):
        raise result
    return result


async def _without_exit(coroutine: Any) -> Any:
    try:
        return await coroutine
    except SystemExit as exit:  # raised inside of a loop, it ends the loop, and nobody is told
        return exit


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
