"""Rewards that are not finite: they earn nothing, are counted, and the first one is shown.

TRL takes a NaN for a reward that does not apply, which would pass unseen; an infinite one would swallow all others of
its group.
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
        """The same function; what it gives as NaN or infinite is 0. None stays: it means "does not apply"."""

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
            tqdm.write(f"warning: {name} gave the reward {reward}; such rewards count as 0, and are counted")
        self.replaced += 1
        return 0.0
