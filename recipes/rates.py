"""Learning-rate schedules of the recipes: the factor of the rate at an optimizer step, once the warm-up is over.

A recipe's `schedule` names one of these or any function of (step, steps, warmup), all in optimizer steps.
"""

from collections.abc import Sequence

import torch


def cosine(step: int, steps: int, warmup: int) -> float:
    """½·(1 + cos(π·τ)) with τ = (step - warmup) / (steps - warmup): from 1 to 0 (arXiv 1608.03983, without restarts).

    >>> round(cosine(60, steps=110, warmup=10), 6)
    0.5
    """
    tau = (step - warmup) / max(steps - warmup, 1)
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * tau, dtype=torch.float64)).item())


def multi_step(step: int, steps: int, warmup: int, milestones: Sequence[float], factor: float = 0.1) -> float:
    """factor^k after the k-th milestone; milestones are fractions of the run, so that a longer run scales them.

    >>> [multi_step(step, 100, 5, milestones=[0.5, 0.75], factor=0.5) for step in (49, 50, 75)]
    [1.0, 0.5, 0.25]
    """
    return float(factor) ** sum(step >= milestone * steps for milestone in milestones)


def constant(step: int, steps: int, warmup: int) -> float:
    """1 throughout.

    >>> constant(99, steps=100, warmup=5)
    1.0
    """
    return 1.0
