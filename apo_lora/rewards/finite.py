"""Rewards that are not finite: they count as 0, their number is recorded, and the first one is shown.

TRL silently treats NaN as a reward that does not apply; an infinite reward would drown out all others of its group.
"""

import functools
import math
from collections.abc import Callable

from tqdm.auto import tqdm

RewardFunction = Callable[..., list[float | None]]


class FiniteRewards:
    def __init__(self) -> None:
        self.replaced = 0

    def watching(self, function: RewardFunction) -> RewardFunction:
        """The same function, with NaN and infinite rewards replaced by 0. None stays: it means "does not apply"."""

        @functools.wraps(function)
        def finite(**arguments) -> list[float | None]:
            rewards = function(**arguments)
            return [
                reward if reward is None or math.isfinite(reward) else self._nothing(function.__name__, reward)
                for reward in rewards
            ]

        return finite

    def _nothing(self, name: str, reward: float) -> float:
        if not self.replaced:
            tqdm.write(f"warning: {name} returned the reward {reward}; non-finite rewards count as 0, and are counted")
        self.replaced += 1
        return 0.0
