"""Which of several functions is faster here and now: interleaved runs, and how sure the answer is."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Timer = Callable[[Sequence[Callable[[], object]]], list[list[float]]]
"""Functions -> for each of them its time in every round, in seconds."""


def interleaved(functions: Sequence[Callable[[], object]], rounds: int = 15, least: float = 1e-3) -> list[list[float]]:
    """Time the functions in turn, round after round, so that a change of the machine's pace meets all of them.

    In a round each function is repeated until it has run for `least` seconds; it is warmed up before the first.
    """
    repeats = []
    for function in functions:
        _clock(function, 2)  # compiles, and fills caches
        repeats.append(max(1, math.ceil(least / _clock(function, 1))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, n, seen in zip(functions, repeats, times, strict=True):
            seen.append(_clock(function, n))
    return times


def _clock(function: Callable[[], object], repeats: int) -> float:
    """Seconds for one call."""
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _wait()
    return (time.perf_counter() - start) / repeats


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Speedup(NamedTuple):
    """How many times faster: the median of the rounds' ratios, and the ends of its confidence interval."""

    low: float
    median: float
    high: float


def speedup(base: Sequence[float], other: Sequence[float]) -> Speedup:
    """The speed-up of `other` over `base`, from times of the same rounds.

    The interval holds the true median with at least 95 % confidence whatever the noise is like: its ends are the
    j-th lowest and highest of the n ratios, j being the largest number with P(Binomial(n, 1/2) < j) <= 0.025
    (Conover, Practical Nonparametric Statistics, sec. 3.2). With fewer than 6 rounds it is their whole range.

    >>> speedup([4.0] * 3, [2.0, 1.0, 4.0])
    Speedup(low=1.0, median=2.0, high=4.0)
    """
    ratios = sorted(b / o for b, o in zip(base, other, strict=True))
    n, j, below = len(ratios), 0, 0.5 ** len(ratios)
    while below <= 0.025:  # below = P(Binomial <= j)
        j += 1
        below += math.comb(n, j) * 0.5**n
    j = max(j - 1, 0)
    return Speedup(ratios[j], statistics.median(ratios), ratios[n - 1 - j])
