"""The literature's drop-and-grow methods as values of `DropGrow`, and the parts that only they need.

Fractions are rounded down (int) throughout; the reference code of ITOP, SNFS and GraNet rounds up.
"""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sparselearn import criteria
from sparselearn.criteria import Criterion, Layer, Tracker, momentum, tracker
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import Budget, DropGrow, global_ranking, rigl
from sparselearn.schedules import (
    Schedule,
    UpdateSchedule,
    UpdateSteps,
    alternating,
    constant,
    cosine,
    harmonic_like,
    inverse_power,
    ramp,
    stages,
)
from sparselearn.structures import ConstantFanIn, Unstructured, rows, top_indices

# ---- re-allocation between layers -----------------------------------------------------------------------------


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
    for i in sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])[:]:
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
        strength = [float(momentum(x)[x.mask].mean()) for x in layers]
        mean = sum(strength) / len(strength)
        kept = []
        for layer, n, v in zip(layers, active, strength, strict=True):
            p, sparsity = self.fraction(layer.step), 1 - n / layer.mask.numel()
            if sparsity < 0.2 and v > mean:  # nearly dense and about to grow
                p = min(sparsity, p)
            kept.append(max(n - int(p * n), 1))
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
    """

    target: int
    initial: float = 1e-3

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        return (threshold(initial=self.initial),)

    def __call__(self, layers: Sequence[Layer], nnz: Sequence[int]) -> list[Budget]:
        limit = float(layers[0].memory["threshold"])
        kept = [max(int((x.mask & (x.weight.abs() >= limit)).sum()), 1) for x in layers]
        dropped = sum(int(x.mask.sum()) for x in layers) - sum(kept)
        factor = 0.5 if dropped > 1.1 * self.target else 2.0 if dropped < 0.9 * self.target else 1.0
        for layer in layers:
            layer.memory["threshold"].mul_(factor)
        regrown = share(sum(nnz) - sum(kept), kept, [_room(x) for x in layers])
        return [Budget(k, k + r) for k, r in zip(kept, regrown, strict=True)]


# ---- ablation of neurons --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class salient_neurons:
    """SRigL's neuron ablation (arXiv 2305.02299, §3): a neuron stays active if enough of its weights are salient.

    Salient are the weights that magnitude keeps in the layer as a whole, and as many of the highest growth score as are
    dropped, anywhere. A neuron needs γ·K of them (γ < 1, rounded down, at least 1; K is the fan-in without ablation) or
    γ of them (γ >= 1); γ = 0 ablates none. At least as many neurons stay as can hold the budget.

    Args:
        group: neurons are ablated in groups of this many, by their mean count.
        permanent: ablated neurons do not come back.
        protect: name patterns of layers without ablation.
    """

    gamma: float
    group: int = 1
    permanent: bool = False
    protect: tuple[str, ...] = ()

    def __call__(self, layer: Layer, keep_score: Tensor, grow_score: Tensor, nnz: int, n_drop: int) -> Tensor:
        out, fan_in = rows(layer.mask).shape
        every = torch.ones(out, dtype=torch.bool, device=layer.mask.device)
        if self.gamma == 0 or any(fnmatch.fnmatch(layer.name, pattern) for pattern in self.protect):
            return every
        flat_keep, flat_grow = keep_score.reshape(-1), grow_score.reshape(-1)
        n_keep = int(layer.mask.sum()) - n_drop
        salient = top_indices(flat_keep, n_keep) & (flat_keep > -math.inf)
        salient |= top_indices(flat_grow, n_drop) & (flat_grow > -math.inf)
        counts = salient.view(out, fan_in).sum(1).float()
        if self.group > 1:
            groups = counts.split(self.group)
            counts = torch.cat([g.mean().expand(len(g)) for g in groups])
        needed = self.gamma if self.gamma >= 1 else max(1, int(self.gamma * (nnz // out)))
        active = counts >= needed
        if self.permanent:
            alive = rows(layer.mask).any(1)
            active, counts = active & alive, counts.masked_fill(~alive, -1)
        fewest = -(-nnz // fan_in)
        fewest += -fewest % self.group
        if int(active.sum()) < fewest:
            active = top_indices(counts, min(fewest, out))
        return active


# ---- the methods ----------------------------------------------------------------------------------------------


def srigl(
    *,
    stop: int,
    every: int = 100,
    start: int | None = None,
    drop_fraction: float | Schedule = 0.3,
    gamma: float = 0.3,
    group: int = 1,
    permanent_ablation: bool = False,
    protect: Sequence[str] = (),
    skip_step: bool = False,
) -> DropGrow:
    """SRigL: RigL with a constant fan-in and neuron ablation (Lasby et al., arXiv 2305.02299, Alg. 1).

    drop: layer-wide the least |w|, and of every neuron what exceeds its new fan-in K; grow: per neuron up to K by
    |dL/dw|; K = ⌊budget / active neurons⌋. A neuron is ablated where fewer than γ·K0 of its weights are salient, K0 the
    fan-in without ablation (`salient_neurons`). The paper: γ = 0.3 for CNNs, 0.95 for ViTs, with last layers protected.

    Args:
        stop, every, start, drop_fraction: as in `rigl`.
        gamma: γ < 1 relative to K0, γ >= 1 a number of weights, 0 never ablates.
        group: this many neighbouring neurons share their inputs (and are ablated together).
        permanent_ablation: ablated neurons stay so; the reference lets them revive.
        protect: name patterns of layers whose neurons are never ablated, e.g. ["fc.*"].
        skip_step: the reference steps first and rewires with the same gradient.

    Differs: surplus weights of a row are trimmed by |w| (the reference sorts booleans), no layer is protected or
    ablated by an accident of names, and scores of ablated rows are not modified in place. Kept weights that are exactly
    zero count as kept.
    """
    return replace(
        rigl(stop=stop, every=every, start=start, drop_fraction=drop_fraction, skip_step=skip_step),
        structure=ConstantFanIn(group),
        ablation=salient_neurons(gamma, group, permanent_ablation, tuple(protect)),
    )


def snfs(*, stop: int, every: int, start: int | None = None, drop_fraction: float | Schedule = 0.5) -> DropGrow:
    """Sparse networks from scratch: sparse momentum (Dettmers & Zettlemoyer, arXiv 1907.04840, Alg. 1).

    drop: in each layer the fraction of least |w|; the weights so freed go to layers in proportion to their mean
    |momentum|; grow: highest |momentum| (Adam: m/√v), which is kept dense. Default fraction: 0.5, cosine.

    Differs: clock in optimizer steps (the paper: epochs); the total is exact, so that the reference's drift correction
    is not needed; caps are the room itself, not 0.99 of it.
    """
    fraction = drop_fraction if callable(drop_fraction) else cosine(drop_fraction, stop)
    return DropGrow(
        grow=criteria.momentum,
        updates=UpdateSchedule(every, stop, start, fraction),
        reallocate=momentum_redistribution(fraction),
        optimizer_state="keep",
    )


def snfs_lite(*, stop: int, every: int = 100, drop_fraction: float | Schedule = 0.3, beta: float = 0.9) -> DropGrow:
    """RigL with growth by a running mean of the gradient (RigL's repository, there called SNFS): one tensor per weight,
    no re-allocation. The mean is β·mean + (1 - β)·g on every step."""
    return replace(rigl(stop=stop, every=every, drop_fraction=drop_fraction), grow=criteria.average_gradient(beta))


def dsr(*, target: int, stop: int, every: int, start: int | None = None, initial_threshold: float = 1e-3) -> DropGrow:
    """Dynamic sparse reparameterization (Mostafa & Wang, arXiv 1902.05967, Alg. 1).

    drop: all |w| < H, over the whole network; grow: as many at random, zero, not those just dropped, in layers in
    proportion to their surviving weights. H doubles or halves so that about `target` weights move per update.

    Args:
        target: N_p, the number of weights that each update should move (the paper: 600 for a WRN-28-2).

    Differs: what rounding leaves goes to the largest remainder, not to a random layer.
    """
    return DropGrow(
        grow=criteria.random,
        updates=UpdateSchedule(every, stop, start, 0.0),
        reallocate=adaptive_threshold(target, initial_threshold),
        exclude_dropped=True,
    )


def itop(
    *,
    stop: int,
    every: int,
    grow: Criterion = criteria.gradient,
    drop_fraction: float | Schedule = 0.5,
) -> DropGrow:
    """In-time over-parameterization (Liu et al., arXiv 2102.02887): RigL or SET that never stops and rests longer.

    drop: the fraction of least |w|, by a cosine from 0.5 to 0.005 at `stop`, the end of training; grow: `gradient`
    (RigL-ITOP, the paper's ΔT: 4000), `random` (SET-ITOP, 1500) or `random_unfired()` (weights that never were active
    first). `sparsifier.metrics()` has the exploration rate R_s.
    """
    fraction = drop_fraction if callable(drop_fraction) else cosine(drop_fraction, stop, final=0.005)
    return DropGrow(grow=grow, updates=UpdateSchedule(every, stop, None, fraction))


def granet(
    *,
    stop: int,
    every: int,
    prune_stop: int,
    prune_start: int = 0,
    initial_density: float = 0.5,
    drop_fraction: float | Schedule = 0.5,
    scope: Literal["global", "layer"] = "global",
) -> DropGrow:
    """GraNet: gradual pruning with neuroregeneration (Liu et al., arXiv 2106.10404, Alg. 1).

    At an update: (1) prune by |w|, over all layers, to the cubic's density between `initial_density` at `prune_start`
    and the sparsifier's at `prune_stop`; (2) in each layer drop the fraction of least |w| and regrow as many by
    |dL/dw|. The fraction follows a cosine from 0.5 to 0.005 at `stop`. scope="layer" is the uniform variant: (1) in
    each layer by the distribution.

    Differs: progress counts steps, not events; ranks, not a threshold, so that ties do not change the count.
    """
    if not 0 < initial_density <= 1:
        raise SparsityError(f"`initial_density` must lie in (0, 1]; got {initial_density}.")
    fraction = drop_fraction if callable(drop_fraction) else cosine(drop_fraction, stop, final=0.005)
    return DropGrow(
        grow=criteria.gradient,
        updates=UpdateSchedule(every, stop, None, fraction),
        density=ramp(inverse_power(1.0, stop=prune_stop, start=prune_start), initial_density),
        reallocate=global_ranking() if scope == "global" else None,
    )


def mest(
    *,
    stop: int,
    every: int,
    soft: bool = False,
    weight: float = 0.0,
    boundaries: tuple[float, float] = (90 / 160, 120 / 160),
    factors: tuple[float, float, float] | None = None,
) -> DropGrow:
    """MEST (Yuan et al., arXiv 2110.14032): elastic mutation, and with `soft` the soft memory bound (EM&S).

    drop: least |w| + λ·|g|; grow: at random. In three stages, ended by `boundaries` (fractions of `stop`):

    - EM: prune to 0.8, 0.9, 1 times the final density d and grow back to d;
    - EM&S: prune to d and grow to 1.5, 1.25, 1 times d, so that more than d is held between updates.

    Args:
        weight: λ; the reference code's default is 0.
        factors: other factors for the three stages.

    Differs: clock in optimizer steps (the reference: every 5 epochs, stages at 90 and 120 of 160).
    """
    factors = factors or ((1.5, 1.25, 1.0) if soft else (0.8, 0.9, 1.0))
    times = (0, round(boundaries[0] * stop), round(boundaries[1] * stop))
    high = stages(times, factors if soft else (1.0, 1.0, 1.0))
    low = stages(times, (1.0, 1.0, 1.0) if soft else factors)
    if any(not 0 < a <= b for a, b in zip(low.values, high.values, strict=True)):
        raise SparsityError(f"`factors` of `mest` must be {'at least 1' if soft else 'in (0, 1]'}; got {factors}.")
    fraction = stages(times, tuple(1 - a / b for a, b in zip(low.values, high.values, strict=True)))
    return DropGrow(
        drop=criteria.magnitude_gradient(weight),
        grow=criteria.random,
        updates=UpdateSchedule(every, stop, None, fraction),
        density=_times(high) if soft else None,
    )


@dataclass(frozen=True)
class _times:
    """The final density times a schedule, at most 1."""

    factor: Schedule

    def __call__(self, step: int, final: float) -> float:
        return min(final * self.factor(step), 1.0)


def dst_ee(*, c: float, epsilon: float, stop: int, every: int = 100, drop_fraction: float | Schedule = 0.3) -> DropGrow:
    """DST-EE: exploration and exploitation (Huang et al., arXiv 2211.16667): RigL with growth by
    |g| + c·ln(t)/(N + ε), N the number of mask periods in which the weight was active.

    Args:
        c, epsilon: required, since the paper's values are not known to us; c is useful at the scale of |g|,
            epsilon = 1.

    Differs: the formula is recalled, not read in code; no fidelity is claimed. c = 0 is RigL, bit for bit.
    """
    if c < 0 or epsilon <= 0:
        raise SparsityError(f"`dst_ee` needs c >= 0 and epsilon > 0; got c={c}, epsilon={epsilon}.")
    method = rigl(stop=stop, every=every, drop_fraction=drop_fraction)
    return replace(method, grow=criteria.gradient_exploration(c, epsilon))


def static_reinit(*, stop: int, every: int = 100, drop_fraction: float | Schedule = 0.3) -> DropGrow:
    """Static masks whose least weights start anew, with values of the initial distribution (RigL's repository): tells
    what moving connections add to shaking them."""
    return DropGrow(
        grow=criteria.same,
        updates=UpdateSchedule(every, stop, None, drop_fraction),
        grow_init=criteria.initial_distribution(),
        reinit=True,
    )


def acdc(
    *,
    steps: int | None = None,
    switches: Sequence[int] | None = None,
    scope: Literal["global", "layer"] = "global",
) -> DropGrow:
    """AC/DC: alternating compressed and decompressed training (Peste et al., arXiv 2106.12379, Alg. 1).

    Dense until the first switch, then sparse, dense, ..., sparse at the end. A sparse phase begins with one-shot
    pruning by |w| over all layers; a dense one with the pruned weights at zero and all optimizer state of the sparse
    weights cleared. The last dense model: `sparsifier.on_update(save, when="before")` calls `save` before each switch.

    Args:
        steps: length of the run; gives the ImageNet schedule (of 100: sparse at 10, 20, ..., 70 for 5 each, dense from
            75 to 85, sparse to the end).
        switches: optimizer steps instead; an odd number of them, so that the end is sparse.
        scope: "layer" prunes each layer to the distribution's density (the paper's uniform variant).

    Differs: a switch comes after the optimizer step of its number. Momentum of weights that are not sparse (biases,
    norms) is not cleared.
    """
    if (steps is None) == (switches is None):
        raise SparsityError("`acdc` needs either `steps`, the length of the run, or `switches`.")
    if steps is not None:
        switches = [round(steps * percent / 100) for percent in (*range(10, 80, 5), 85)]
    times = tuple(switches or ())
    method = DropGrow(
        grow=criteria.random,
        updates=UpdateSteps(times),
        density=alternating(times),
        reallocate=global_ranking() if scope == "global" else None,
        optimizer_state="reset",
    )
    if len(times) % 2 == 0:
        raise SparsityError(f"`switches` must be odd in number, so that the run ends sparse; got {len(times)}.")
    return method


def harmonic(
    *, stop: int, every: int = 100, amplitude: float = 0.1, waves: int = 4, grow: Criterion = criteria.gradient
) -> DropGrow:
    """Gradual pruning with periodic regrowth, after harmonic annealing (Stamatelis et al., arXiv 2503.15172).

    The density is `schedules.harmonic_like`, our own formula since the paper's was not available; regrown weights start
    at zero. The last update before `stop` reaches the final density.
    """
    last = (stop - 1) // every * every
    if last < every:
        raise SparsityError(f"`harmonic` needs an update step before stop={stop}; with every={every} there is none.")
    return DropGrow(
        grow=grow,
        updates=UpdateSchedule(every, stop, 0, constant(0.0)),
        density=harmonic_like(last, 0, amplitude, waves),
        structure=Unstructured(),
    )
