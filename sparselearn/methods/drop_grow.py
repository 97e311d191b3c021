"""Hard masks whose positions move: drop some active weights, grow as many others.

A method is a `DropGrow` value. The factories below are papers' methods; a new one needs no registration.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sparselearn import criteria
from sparselearn.criteria import Criterion, Layer, Tracker, check_score
from sparselearn.errors import SparsityError
from sparselearn.schedules import DensitySchedule, Schedule, UpdateSchedule, constant, inverse_power, ramp
from sparselearn.structures import Structure, Unstructured, top_indices

Reallocate = Callable[[Sequence[Layer], Sequence[int]], Sequence[int]]


@dataclass(frozen=True)
class DropGrow:
    """What happens at an update step, for each layer with budget nnz:

    1. keep the active weights with the highest `drop` score, all but int(drop fraction · nnz);
    2. fill up to nnz with the highest `grow` score among the other weights;
    3. grown weights start at `grow_init`, and their optimizer state at zero.

    Args:
        drop: score of active weights; the lowest are dropped.
        grow: score of inactive weights; the highest are grown. None only prunes.
        updates: on which optimizer steps, and how much. None never changes a mask.
        structure: which masks are allowed.
        density: global density at a step, from (step, final density); None keeps it constant.
        reallocate: from (layers, budgets) to new budgets of the same total; None keeps each layer's.
        grow_init: values of grown weights.
        exclude_dropped: weights dropped now may not be grown in the same update. RigL's code lets them return
            (they then keep value and optimizer state, as weights that never left). A layer with fewer inactive
            weights than it would drop drops as many as it can grow.
        skip_step: an update takes the place of the optimizer step (RigL, Alg. 1): weights, optimizer state and
            its step counts stay as they were, for all parameters of the optimizer.
        optimizer_state: "zero" keeps the state of inactive weights at zero and masks gradients; "keep" gives
            the optimizer the dense gradient and leaves its state alone (sparse momentum); "reset" is "zero",
            and clears the state of all sparse weights when their density rises (AC/DC).
    """

    drop: Criterion = criteria.magnitude
    grow: Criterion | None = None
    updates: UpdateSchedule | None = None
    structure: Structure = field(default_factory=Unstructured)
    density: DensitySchedule | None = None
    reallocate: Reallocate | None = None
    grow_init: Criterion = criteria.zeros
    exclude_dropped: bool = False
    skip_step: bool = False
    optimizer_state: Literal["zero", "keep", "reset"] = "zero"

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The trackers that the criteria declare, equal ones once."""
        parts = (self.drop, self.grow, self.grow_init, self.reallocate)
        return tuple(dict.fromkeys(t for part in parts for t in getattr(part, "trackers", ())))

    def due(self, step: int) -> bool:
        """Whether masks change on this optimizer step."""
        return self.updates is not None and self.updates.due(step)

    def new_masks(self, layers: Sequence[Layer], nnz: Sequence[int]) -> list[Tensor]:
        """The masks after an update, exactly nnz[i] active weights each (or what `reallocate` makes of it)."""
        if self.reallocate is not None:
            total, nnz = sum(nnz), self.reallocate(layers, nnz)
            if sum(nnz) != total:
                raise SparsityError(f"`reallocate` must keep the total of {total} weights; it gave {sum(nnz)}.")
            for layer, n in zip(layers, nnz, strict=True):
                if not 0 < n <= layer.mask.numel():
                    raise SparsityError(
                        f"`reallocate` gave `{layer.name}` {n} active weights; it must give every layer at least one "
                        f"and at most its size, here {layer.mask.numel()}."
                    )
        masks = [self._new_mask(layer, n) for layer, n in zip(layers, nnz, strict=True)]
        for mask, n in zip(masks, nnz, strict=True):
            self.structure.check(mask, n)
        return masks

    def _new_mask(self, layer: Layer, nnz: int) -> Tensor:
        active = int(layer.mask.sum())
        stay = min(active, nnz)
        fraction = self.updates.fraction(layer.step) if self.updates is not None and self.grow is not None else 0.0
        n_drop = int(fraction * stay)
        if self.exclude_dropped:  # a dense layer has nowhere else to grow
            room = ~layer.mask if layer.support is None else ~layer.mask & layer.support
            n_drop = min(n_drop, max(int(room.sum()) - (nnz - stay), 0))
        n_keep = stay - n_drop
        if n_keep == active == nnz:
            return layer.mask
        drop_score = check_score(self.drop(layer), layer, "drop").float()
        eligible = drop_score.masked_fill(~layer.mask, -math.inf).reshape(-1)
        keep = (top_indices(eligible, n_keep) & (eligible > -math.inf)).view_as(layer.mask)
        if nnz == n_keep:
            score = torch.full_like(drop_score, -math.inf)
        elif self.grow is None:
            raise SparsityError(
                f"`{layer.name}` has to grow from {active} to {nnz} active weights at step {layer.step}, "
                "but the method only prunes. Give it a `grow` criterion."
            )
        else:
            score = check_score(self.grow(layer), layer, "grow").to(drop_score, copy=True)
            if layer.support is not None:
                score.masked_fill_(~layer.support, -math.inf)
            if self.exclude_dropped:
                score.masked_fill_(layer.mask & ~keep, -math.inf)
        try:
            return self.structure.topk(torch.where(keep, drop_score, score), nnz, keep)
        except SparsityError as error:
            raise SparsityError(f"`{layer.name}` at step {layer.step}: {error}") from error


@dataclass(frozen=True)
class global_ranking:
    """Re-allocation by one ranking over all layers: a layer's new budget is the number of its active weights
    among the highest scores of the network, at least one."""

    criterion: Criterion = criteria.magnitude

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        return getattr(self.criterion, "trackers", ())

    def __call__(self, layers: Sequence[Layer], nnz: Sequence[int]) -> list[int]:
        scores = [
            check_score(self.criterion(x), x, "global").float().masked_fill(~x.mask, -math.inf).reshape(-1)
            for x in layers
        ]
        for score in scores:  # every layer keeps its best weight
            score[score.argmax()] = math.inf
        device = scores[0].device
        chosen = top_indices(torch.cat([s.to(device) for s in scores]), sum(nnz))
        return [int(part.sum()) for part in chosen.split([s.numel() for s in scores])]


def static(*, structure: Structure | None = None) -> DropGrow:
    """A random mask that never changes: the baseline every dynamic method has to beat (arXiv 2202.02643)."""
    return DropGrow(structure=structure or Unstructured())


def set_(*, stop: int, every: int = 100, start: int | None = None, drop_fraction: float | Schedule = 0.3) -> DropGrow:
    """SET: sparse evolutionary training (Mocanu et al. 2018, Nature Communications 9:2383, Alg. 1).

    drop: of each sign the fraction nearest zero; grow: uniformly at random, at zero. A dropped weight may be
    drawn again at once.

    Args:
        stop, every, start: optimizer steps; masks change on start, start + every, ... < stop.
        drop_fraction: constant by default in the paper; a number here is that constant.

    Differs: clock in optimizer steps (the paper: once an epoch). Optimizer state of moved weights is zeroed;
    the reference builds a new optimizer each epoch.
    """
    fraction = drop_fraction if callable(drop_fraction) else constant(drop_fraction)
    return DropGrow(
        drop=criteria.signed_magnitude,
        grow=criteria.random,
        updates=UpdateSchedule(every, stop, start, fraction),
    )


def rigl(
    *,
    stop: int,
    every: int = 100,
    start: int | None = None,
    drop_fraction: float | Schedule = 0.3,
    grow_init: Criterion = criteria.zeros,
    exclude_dropped: bool = False,
    skip_step: bool = True,
    structure: Structure | None = None,
) -> DropGrow:
    """RigL: rigging the lottery (arXiv 1911.11134, Alg. 1).

    drop: the int(f·nnz) active weights of least |w|; grow: the same number of highest |dL/dw|, at zero, with
    f(t) = α/2·(1 + cos(πt/stop)). The paper's defaults: α = 0.3, every = 100, stop = 75 % of training.

    Args:
        stop, every, start: optimizer steps; masks change on start, start + every, ... < stop. The gradient is
            that of the update step alone.
        drop_fraction: α of the cosine, or any schedule (`constant`, `inverse_power`, ...).
        grow_init: `zeros`, `random_normal(k)`, `random_uniform(k)`, `initial_distribution(k)`,
            `gradient_scale(k)`, `gradient_sign(k)` from sparselearn.criteria.
        exclude_dropped, skip_step: as in `DropGrow`; the defaults are the reference code's.

    Differs: ties are broken by index, not by noise of 1e-5 on the drop score; the noise of the reference also
    covers inactive positions, so there a just-grown zero can lose its place to an inactive weight.
    """
    return DropGrow(
        drop=criteria.magnitude,
        grow=criteria.gradient,
        updates=UpdateSchedule(every, stop, start, drop_fraction),
        structure=structure or Unstructured(),
        grow_init=grow_init,
        exclude_dropped=exclude_dropped,
        skip_step=skip_step,
    )


def gmp(
    *,
    stop: int,
    every: int = 100,
    start: int = 0,
    initial_density: float = 1.0,
    scope: Literal["layer", "global"] = "layer",
) -> DropGrow:
    """Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878, eq. 1).

    s(t) = s_f + (s_i - s_f)·(1 - (t - start)/(last - start))³, the least |w| going first, from
    `initial_density` to the sparsifier's density, which the last update step before `stop` reaches.

    Args:
        scope: "layer" gives each layer its share of the distribution at the density of the step; "global" ranks
            |w| over all layers.

    Differs: masks only shrink; the paper's may regain weights, whose hidden values it keeps.
    """
    updates = UpdateSchedule(every, stop, start, constant(0.0))
    last = start + (stop - 1 - start) // every * every
    if last == 0:
        raise SparsityError(
            f"`gmp` needs an update step after step 0 to prune by magnitude; with start=0, every={every} and "
            f"stop={stop} there is none. Choose a later stop, or update more often."
        )
    weight = inverse_power(1.0, stop=last, start=min(start, last - 1))
    return DropGrow(
        updates=updates,
        density=ramp(weight, initial_density),
        reallocate=global_ranking() if scope == "global" else None,
    )
