"""Penalties from a completion's token ids alone: for running into the length limit, and for repeating itself."""

from collections.abc import Iterator, Sequence


def overlong_punishment(length: int, limit: int, cache: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), in -1..0. All three are tokens.

    0 up to `limit - cache`, -1 at `limit`, a straight line between. DAPO has a limit of 20,480 and a cache of 4,096.
    """
    return 0.0 - min(1.0, max(0.0, (length - (limit - cache)) / cache))


def repetition_penalty(token_ids: Sequence[int], ngram: int) -> float:
    """Minus the share of n-grams that occurred before, in -1..0 (arXiv 2502.03373, appendix C.2, as in TRL).

    0 for a completion of fewer than `ngram` tokens.
    """
    ngrams = list(zip(*(token_ids[start:] for start in range(ngram)), strict=False))
    return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0


def overlong_tries(limit: int, cache: int) -> Iterator[tuple[str, float, list[int]]]:
    """(what it is, its right reward, token ids), for the check of rewards."""
    yield f"{limit - cache} tokens", 0.0, [1] * (limit - cache)
    yield f"{limit} tokens", -1.0, [1] * limit


def repetition_tries(ngram: int) -> Iterator[tuple[str, float, list[int]]]:
    """(what it is, its right reward, token ids), for the check of rewards."""
    yield "no repetition", 0.0, list(range(ngram + 9))
    yield "one token again and again", -0.9, [1] * (ngram + 9)  # ten n-grams, nine of them seen before
