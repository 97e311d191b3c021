"""Where weights go between layers: SNFS's re-allocation by momentum, DSR's by an adaptive threshold."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselearn.criteria import Layer, Tracker, check_score, momentum, tracker
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import Budget, part_of
from sparselearn.schedules import Schedule, checked_fraction


def share(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to the weights, none above its `most`.

    What a full entry cannot take goes to the others in proportion; fractions go to the largest remainders, the earlier
    first.

    >>> share(8, [0.75, 0.25], [10, 10]), share(8, [0.75, 0.25], [5, 10])
    ([6, 2], [5, 3])
    """
    if total > sum(most):
        raise SparsityError(f"{total} weights were to be shared out, but there is room for {sum(most)} only.")
    shares, full = [0.0] * len(weights), [m == 0 for m in most]
    left = float(total)
    while left > 1e-9 and not all(full):
        open_weights = [0.0 if f else w for w, f in zip(weights, full, strict=True)]
        if sum(open_weights) == 0:
            open_weights = [float(not f) for f in full]
        scale, left = left / sum(open_weights), 0.0
        for i, w in enumerate(open_weights):
            shares[i] += w * scale
            if shares[i] >= most[i]:
                left, shares[i], full[i] = left + shares[i] - most[i], float(most[i]), True
    counts = [min(int(x + 1e-9), m) for x, m in zip(shares, most, strict=True)]
    for i in sorted(range(len(counts)), key=lambda i: counts[i] - shares[i]):
        if sum(counts) < total and counts[i] < most[i]:
            counts[i] += 1
    return counts


def _room(layer: Layer) -> int:
    """Positions where the layer could grow that are inactive now."""
    return int((~layer.mask if layer.support is None else ~layer.mask & layer.support).sum())


@dataclass(frozen=True)
class momentum_redistribution:
    """SNFS's budgets (arXiv 1907.04840, Alg. 1): every layer loses its fraction of smallest weights; what was lost is
    regrown in proportion to the layers' mean |momentum| of active weights."""

    fraction: Schedule

    def __call__(self, layers: Sequence[Layer], nnz: Sequence[int]) -> list[Budget]:
        active = [int(x.mask.sum()) for x in layers]
        strength = [float(check_score(momentum(x), x, "re-allocation")[x.mask].mean()) for x in layers]
        mean = sum(strength) / len(strength)
        kept = []
        for layer, n, v in zip(layers, active, strength, strict=True):
            p, sparsity = checked_fraction(self.fraction(layer.step), layer.step), 1 - n / layer.mask.numel()
            if sparsity < 0.2 and v > mean:  # nearly dense and about to grow
                p = min(sparsity, p)
            kept.append(max(n - part_of(p, n), 1))
        room = [_room(x) + n - k for x, n, k in zip(layers, active, kept, strict=True)]
        regrown = share(sum(nnz) - sum(kept), strength, room)
        return [Budget(k, k + r) for k, r in zip(kept, regrown, strict=True)]


@dataclass(frozen=True)
class threshold(tracker):
    """float64, 0-d: DSR's adaptive threshold, equal in all layers. The re-allocation writes it."""

    key: str = "threshold"
    initial: float = 1e-3

    def init(self, layer: Layer) -> Tensor:
        return torch.tensor(self.initial, dtype=torch.float64)


@dataclass(frozen=True)
class adaptive_threshold:
    """DSR's budgets (arXiv 1902.05967, Alg. 1): all |w| < H are dropped, and as many weights are regrown in proportion
    to what survived in each layer. H halves when more than 1.1·`target` were dropped, and doubles below 0.9·`target`.

    Every layer keeps a weight, and no more are dropped than find a place that was not active before.
    """

    target: int
    initial: float = 1e-3

    def __post_init__(self) -> None:
        if self.target < 1 or not self.initial > 0:
            raise SparsityError(
                f"`dsr` needs target >= 1 weights and initial_threshold > 0; got {self.target} and {self.initial}."
            )

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        return (threshold(initial=self.initial),)

    def __call__(self, layers: Sequence[Layer], nnz: Sequence[int]) -> list[Budget]:
        limit = float(layers[0].memory["threshold"])
        active = [int(x.mask.sum()) for x in layers]
        if self.target > sum(active):
            raise SparsityError(
                f"`dsr` is to move target={self.target} weights at each update, but only {sum(active)} are active. "
                "Choose a smaller target."
            )
        below = [int((x.mask & (x.weight.abs() < limit)).sum()) for x in layers]
        below = [min(b, n - 1) for b, n in zip(below, active, strict=True)]
        dropped = sum(below)
        factor = 0.5 if dropped > 1.1 * self.target else 2.0 if dropped < 0.9 * self.target else 1.0
        for layer in layers:
            layer.memory["threshold"].mul_(factor)
        room = [_room(x) for x in layers]
        drops = share(min(dropped, sum(room)), below, below)
        kept = [n - d for n, d in zip(active, drops, strict=True)]
        regrown = share(sum(nnz) - sum(kept), kept, room)
        return [Budget(k, k + r) for k, r in zip(kept, regrown, strict=True)]
