"""Hard masks whose positions move: drop some active weights, grow as many others.

A method is a `DropGrow` value. The factories below are papers' methods; a new one needs no registration.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from sparselearn import criteria
from sparselearn.criteria import Criterion, Layer, Tracker, check_score
from sparselearn.errors import SparsityError
from sparselearn.schedules import (
    DensitySchedule,
    Schedule,
    UpdateSchedule,
    check_density,
    constant,
    inverse_power,
    ramp,
)
from sparselearn.structures import ConstantFanIn, Structure, Unstructured, rows, top_indices


class Budget(NamedTuple):
    """What an update leaves of one layer: `keep` of its active weights, and `nnz` once it has grown."""

    keep: int
    nnz: int


def part_of(fraction: float, n: int) -> int:
    """int(fraction·n), nudged by 1e-6 so that 1 - 0.9 of 100 weights are 10 in floating point as on paper."""
    return int(fraction * n + 1e-6)


Reallocate = Callable[[Sequence[Layer], Sequence[int]], Sequence[int | Budget]]


class Ablation(Protocol):
    """Chooses whole neurons (rows of [out, in, ...]) to lose all their weights; see `srigl`."""

    def __call__(self, layer: Layer, keep_score: Tensor, grow_score: Tensor, nnz: int, n_drop: int) -> Tensor:
        """bool [out], True = active. Scores are -inf where a weight may not be kept, or grown."""


class Updates(Protocol):
    """On which optimizer steps masks change; `UpdateSchedule` and `UpdateSteps` are two."""

    def due(self, step: int) -> bool: ...

    def fraction(self, step: int) -> float: ...


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
        reallocate: from (layers, budgets) to new budgets of the same total; None keeps each layer's. A `Budget`
            in place of a number also says how many active weights are kept, in place of the drop fraction.
        ablation: which neurons are cut off; None cuts off none. The structure must be `ConstantFanIn`.
        grow_init: values of grown weights.
        exclude_dropped: weights dropped now may not be grown in the same update. RigL's code lets them return
            (they then keep value and optimizer state, as weights that never left). A layer with fewer inactive
            weights than it would drop drops as many as it can grow.
        reinit: weights that are dropped and grown in the same update start anew, too.
        skip_step: an update takes the place of the optimizer step (RigL, Alg. 1): weights, optimizer state and
            its step counts stay as they were, for all parameters of the optimizer.
        optimizer_state: "zero" keeps the state of inactive weights at zero and masks gradients; "keep" gives
            the optimizer the dense gradient and leaves its state alone (sparse momentum); "reset" is "zero",
            and clears the state of all sparse weights when their density rises (AC/DC).
    """

    drop: Criterion = criteria.magnitude
    grow: Criterion | None = None
    updates: Updates | None = None
    structure: Structure = field(default_factory=Unstructured)
    density: DensitySchedule | None = None
    reallocate: Reallocate | None = None
    ablation: Ablation | None = None
    grow_init: Criterion = criteria.zeros
    exclude_dropped: bool = False
    reinit: bool = False
    skip_step: bool = False
    optimizer_state: Literal["zero", "keep", "reset"] = "zero"

    def __post_init__(self) -> None:
        if self.optimizer_state not in ("zero", "keep", "reset"):
            raise SparsityError(f"`optimizer_state` must be 'zero', 'keep' or 'reset'; got {self.optimizer_state!r}.")
        if self.reallocate is not None and not isinstance(self.structure, Unstructured):
            raise SparsityError(
                f"`reallocate` moves single weights between layers, which {self.structure} does not allow. Leave it "
                "out, or use `Unstructured()`."
            )
        if self.ablation is not None and not isinstance(self.structure, ConstantFanIn):
            raise SparsityError(f"`ablation` needs the structure `ConstantFanIn`; it is {self.structure}.")

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The trackers that the criteria declare, equal ones once."""
        parts = (self.drop, self.grow, self.grow_init, self.reallocate)
        return tuple(dict.fromkeys(t for part in parts for t in getattr(part, "trackers", ())))

    def due(self, step: int) -> bool:
        """Whether masks change on this optimizer step."""
        return self.updates is not None and self.updates.due(step)

    def new_masks(
        self, layers: Sequence[Layer], nnz: Sequence[int], fixed: Collection[str] = ()
    ) -> list[tuple[Tensor, Tensor]]:
        """For each layer the mask after an update and the weights that were kept; exactly nnz[i] active weights each
        (or what `ablation` makes of it, and `reallocate` of layers that are not named in `fixed`)."""
        budgets = [Budget(-1, n) for n in nnz]
        free = [i for i, layer in enumerate(layers) if layer.name not in fixed]
        if self.reallocate is not None and free:
            for i, budget in zip(
                free, self._reallocated([layers[i] for i in free], [nnz[i] for i in free]), strict=True
            ):
                budgets[i] = budget
        masks = [self._new_mask(layer, budget) for layer, budget in zip(layers, budgets, strict=True)]
        for (mask, _), budget in zip(masks, budgets, strict=True):
            self.structure.check(mask, budget.nnz if self.ablation is None else int(mask.sum()))
        return masks

    def _reallocated(self, layers: Sequence[Layer], nnz: Sequence[int]) -> list[Budget]:
        """What `reallocate` says, checked; keep = -1 leaves the number to the drop fraction."""
        assert self.reallocate is not None
        budgets = [b if isinstance(b, Budget) else Budget(-1, b) for b in self.reallocate(layers, nnz)]
        if (seen := sum(b.nnz for b in budgets)) != sum(nnz):
            raise SparsityError(f"`reallocate` must keep the total of {sum(nnz)} weights; it gave {seen}.")
        for layer, budget in zip(layers, budgets, strict=True):
            if not 0 < budget.nnz <= layer.mask.numel():
                raise SparsityError(
                    f"`reallocate` gave `{layer.name}` {budget.nnz} active weights; it must give every layer at least "
                    f"one and at most its size, here {layer.mask.numel()}."
                )
        return budgets

    def kept(self, step: int, budget: Budget, active: int, room: int) -> int:
        """How many of a layer's active weights stay; `room`: how many others may be active."""
        if budget.keep >= 0:
            return min(budget.keep, active, budget.nnz)
        stay = min(active, budget.nnz)
        fraction = self.updates.fraction(step) if self.updates is not None and self.grow is not None else 0.0
        n_drop = part_of(fraction, stay)
        if self.exclude_dropped:  # a dense layer has nowhere else to grow
            n_drop = min(n_drop, max(room - (budget.nnz - stay), 0))
        return stay - n_drop

    def _new_mask(self, layer: Layer, budget: Budget) -> tuple[Tensor, Tensor]:
        active, nnz = int(layer.mask.sum()), budget.nnz
        room = layer.mask.numel() - active if layer.support is None else int((~layer.mask & layer.support).sum())
        n_keep = self.kept(layer.step, budget, active, room)
        if n_keep == active == nnz and self.ablation is None:
            return layer.mask, layer.mask
        drop_score = self.structure.pool(check_score(self.drop(layer), layer, "drop").float())
        eligible = drop_score.masked_fill(~layer.mask, -math.inf).reshape(-1)
        if nnz == n_keep and self.ablation is None:
            mask = self._topk(layer, eligible.view_as(drop_score), nnz)
            return mask, mask
        keep = (top_indices(eligible, n_keep) & (eligible > -math.inf)).view_as(layer.mask)
        score = self._grow_score(layer, drop_score, keep, nnz, active)
        if self.ablation is not None:
            neurons = self.ablation(layer, eligible.view_as(drop_score), score, nnz, active - n_keep)
            silent = ~neurons.view(-1, *[1] * (layer.mask.ndim - 1))
            nnz = nnz // int(neurons.sum()) * int(neurons.sum())
            eligible = eligible.view_as(drop_score).masked_fill(silent, -math.inf).view(-1)
            keep = (top_indices(eligible, n_keep) & (eligible > -math.inf)).view_as(layer.mask)
            score = score.masked_fill(silent, -math.inf)
        mask = self._topk(layer, torch.where(keep, drop_score, score), nnz, keep)
        return mask, keep & mask

    def _topk(self, layer: Layer, score: Tensor, nnz: int, keep: Tensor | None = None) -> Tensor:
        try:
            return self.structure.topk(score, nnz, keep)
        except SparsityError as error:
            raise SparsityError(f"`{layer.name}` at step {layer.step}: {error}") from error

    def _grow_score(self, layer: Layer, like: Tensor, keep: Tensor, nnz: int, active: int) -> Tensor:
        """The score of every weight that may be grown, -inf elsewhere."""
        if self.grow is None:
            raise SparsityError(
                f"`{layer.name}` has to grow from {active} to {nnz} active weights at step {layer.step}, "
                "but the method only prunes. Give it a `grow` criterion."
            )
        score = self.structure.pool(check_score(self.grow(layer), layer, "grow").to(like, copy=True))
        if isinstance(self.structure, ConstantFanIn):  # each neuron grows, though it never fires and has no gradient
            silent = (rows(score) == 0).all(1)
            if bool(silent.any()):  # at random: by index they would all get the first inputs
                score[silent] = -layer.rand()[silent]
        if layer.support is not None:
            score.masked_fill_(~layer.support, -math.inf)
        if self.exclude_dropped:
            score.masked_fill_(layer.mask & ~keep, -math.inf)
        return score


@dataclass(frozen=True)
class global_ranking:
    """Re-allocation by one ranking over all layers: a layer's new budget is the number of its active weights
    among the highest scores of the network, at least one."""

    criterion: Criterion = criteria.magnitude

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        return getattr(self.criterion, "trackers", ())

    def __call__(self, layers: Sequence[Layer], nnz: Sequence[int]) -> list[int]:
        active = sum(int(x.mask.sum()) for x in layers)
        if active < sum(nnz):
            room = sum(x.mask.numel() if x.support is None else int(x.support.sum()) for x in layers)
            if sum(nnz) == room:
                return list(nnz)
            raise SparsityError(
                f"`global_ranking` ranks active weights, so it cannot say where to grow from {active} to {sum(nnz)} "
                f"(step {layers[0].step}). Start from a higher density, or re-allocate nothing while the density rises."
            )
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
    covers inactive positions, so there a just-grown zero can lose its place to an inactive weight. In a
    `ConstantFanIn`, neurons whose whole gradient is zero (they never fire) grow at random, by (seed, step, name).
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
    check_density("initial_density", initial_density)
    updates = UpdateSchedule(every, stop, start, constant(0.0))
    last = updates.last
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
