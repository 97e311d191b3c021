"""The literature's drop-and-grow methods as values of `DropGrow`.

Fractions are rounded down throughout; the reference code of ITOP, SNFS and GraNet rounds up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sparselearn import criteria
from sparselearn.criteria import Criterion
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import DropGrow, global_ranking, rigl
from sparselearn.methods.reallocation import adaptive_threshold, momentum_redistribution
from sparselearn.schedules import (
    Schedule,
    UpdateSchedule,
    UpdateSteps,
    alternating,
    check_density,
    checked_fraction,
    constant,
    cosine,
    harmonic_like,
    inverse_power,
    ramp,
    stages,
)


def _annealed(drop_fraction: float | Schedule, stop: int, final: float = 0.0) -> Schedule:
    """A number as a cosine that ends at `stop`; a schedule as it is."""
    if callable(drop_fraction):
        return drop_fraction
    return cosine(checked_fraction(drop_fraction), stop, final=min(final, drop_fraction))


def _check_reached(name: str, what: str, updates: UpdateSchedule, step: int) -> None:
    """Raises where no update comes at this step or after it."""
    if updates.last < step:
        raise SparsityError(
            f"`{name}` would never reach its final density: {what} is step {step}, but the last update before "
            f"stop={updates.stop} is at step {updates.last}. Choose a later stop, or update more often."
        )


def snfs(*, stop: int, every: int, start: int | None = None, drop_fraction: float | Schedule = 0.5) -> DropGrow:
    """Sparse networks from scratch: sparse momentum (Dettmers & Zettlemoyer, arXiv 1907.04840, Alg. 1).

    drop: in each layer the fraction of least |w|; the weights so freed go to layers in proportion to their mean
    |momentum|; grow: highest |momentum| (Adam: m/√v), which is kept dense. A layer of less than 20 % zeros that is to
    grow drops at most its sparsity. Default fraction: 0.5, cosine.

    Differs: clock in optimizer steps (the paper: epochs); the total is exact, so that the reference's drift correction
    is not needed; caps are the room itself, not 0.99 of it.
    """
    fraction = _annealed(drop_fraction, stop)
    return DropGrow(
        grow=criteria.momentum,
        updates=UpdateSchedule(every, stop, start, fraction),
        reallocate=momentum_redistribution(fraction),
        optimizer_state="keep",
    )


def snfs_lite(*, stop: int, every: int = 100, drop_fraction: float | Schedule = 0.3, beta: float = 0.9) -> DropGrow:
    """SNFS-lite: RigL with growth by a running mean of the gradient (RigL's repository, there called SNFS).

    drop: as `rigl`; grow: highest |mean|, mean ← β·mean + (1 - β)·g on every step, the update step included; β = 0 is
    RigL. One tensor per weight, no re-allocation.

    Differs: nothing is bias-corrected, and the mean is kept apart from the optimizer's momentum.
    """
    return replace(rigl(stop=stop, every=every, drop_fraction=drop_fraction), grow=criteria.average_gradient(beta))


def dsr(*, target: int, stop: int, every: int, start: int | None = None, initial_threshold: float = 1e-3) -> DropGrow:
    """Dynamic sparse reparameterization (Mostafa & Wang, arXiv 1902.05967, Alg. 1).

    drop: all |w| < H, over the whole network; grow: as many at random, zero, not those just dropped, in layers in
    proportion to their surviving weights. H doubles or halves so that about `target` weights move per update.

    Args:
        target: N_p, the number of weights that each update should move (the reference code: 600).
        initial_threshold: H at the start (the reference code: 1e-3).

    Differs: what rounding leaves goes to the largest remainder, not to a random layer; single weights, where the
    reference may move whole 2-D kernels of a convolution; no more are dropped than find a place to grow.
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

    Differs: fractions are rounded down; random growth is exact in number (the code draws each weight by itself).
    """
    return DropGrow(grow=grow, updates=UpdateSchedule(every, stop, None, _annealed(drop_fraction, stop, 0.005)))


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

    Args:
        stop, every: optimizer steps; masks change on every, 2·every, ... < stop (the paper's ΔT: 1000 for CIFAR).
        prune_start, prune_stop: when the density begins to fall, and when it is there; an update must come then or
            later. The reference code: epochs 0 and 110 for CIFAR, 0 and 30 for ImageNet.
        initial_density: at least the final one.

    Differs: progress counts steps, not events; fractions are rounded down; ranks, not a threshold, so that ties do not
    change the count.
    """
    check_density("initial_density", initial_density)
    updates = UpdateSchedule(every, stop, None, _annealed(drop_fraction, stop, 0.005))
    _check_reached("granet", "prune_stop", updates, prune_stop)
    return DropGrow(
        grow=criteria.gradient,
        updates=updates,
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

    drop: least |w| + λ·|g|; grow: at random, at zero. In three stages, ended by `boundaries` (fractions of `stop`):

    - EM: prune to 0.8, 0.9, 1 times the final density d and grow back to d;
    - EM&S: prune to d and grow to 1.5, 1.25, 1 times d, so that more than d is held between updates.

    Args:
        weight: λ; the reference code's default is 0.
        factors: other factors for the three stages.

    Differs: clock in optimizer steps (the reference: every 5 epochs, stages at 90 and 120 of 160); weights are moved
    one by one, where the reference also has blocks and kernel patterns.
    """
    factors = factors or ((1.5, 1.25, 1.0) if soft else (0.8, 0.9, 1.0))
    times = (0, round(boundaries[0] * stop), round(boundaries[1] * stop))
    if not times[0] < times[1] < times[2] < stop:
        raise SparsityError(
            f"`boundaries` of `mest` must part the run into three stages, as fractions of stop={stop} that ascend "
            f"within (0, 1); got {boundaries}."
        )
    high = stages(times, factors if soft else (1.0, 1.0, 1.0))
    low = stages(times, (1.0, 1.0, 1.0) if soft else factors)
    if any(not 0 < a <= b for a, b in zip(low.values, high.values, strict=True)):
        raise SparsityError(f"`factors` of `mest` must be {'at least 1' if soft else 'in (0, 1]'}; got {factors}.")
    updates = UpdateSchedule(every, stop, None, constant(0.0))
    if soft:
        _check_reached("mest", "the last stage", updates, times[2])
    fraction = stages(times, tuple(1 - a / b for a, b in zip(low.values, high.values, strict=True)))
    return DropGrow(
        drop=criteria.magnitude_gradient(weight),
        grow=criteria.random,
        updates=replace(updates, drop_fraction=fraction),
        density=_times(high) if soft else None,
        reinit=True,
    )


@dataclass(frozen=True)
class _times:
    """The final density times a schedule."""

    factor: Schedule

    def __call__(self, step: int, final: float) -> float:
        if final * self.factor(step) > 1 + 1e-9:
            raise SparsityError(
                f"The soft memory bound of `mest` is {self.factor(step):g} times the final density, which is "
                f"{final:g}: more than dense. Raise the sparsity, or give smaller `factors`."
            )
        return min(final * self.factor(step), 1.0)


def dst_ee(*, c: float, epsilon: float, stop: int, every: int = 100, drop_fraction: float | Schedule = 0.3) -> DropGrow:
    """DST-EE: exploration and exploitation (Huang et al., arXiv 2211.16667): RigL with growth by
    |g| + c·ln(t)/(N + ε), N the number of mask periods in which the weight was active.

    Args:
        c, epsilon: required, since the paper's values are not known to us. Begin with c = 1e-3 and epsilon = 1: c is
            useful at the scale of |g|. Larger values grow the least visited weights first.

    Differs: the formula is recalled, not read in code; no fidelity is claimed. c = 0 is RigL, bit for bit.
    """
    if c < 0 or epsilon <= 0:
        raise SparsityError(f"`dst_ee` needs c >= 0 and epsilon > 0; got c={c}, epsilon={epsilon}.")
    method = rigl(stop=stop, every=every, drop_fraction=drop_fraction)
    return replace(method, grow=criteria.gradient_exploration(c, epsilon))


def static_reinit(*, stop: int, every: int = 100, drop_fraction: float | Schedule = 0.3) -> DropGrow:
    """Static masks whose least weights start anew, with values of the initial distribution (RigL's repository): tells
    what moving connections add to shaking them.

    drop: the int(f·nnz) active weights of least |w|, by RigL's f(t); grow: the same ones, at values drawn from the
    layer's initial active weights, their optimizer state at zero.

    Differs: the optimizer steps as well; see `criteria.initial_distribution` for the values.
    """
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
    if not times or times[0] < 1 or list(times) != sorted(set(times)):
        raise SparsityError(
            f"`acdc` needs switches that ascend, from step 1 on (training begins dense); got {times}"
            + ("." if steps is None else f", since steps={steps} is too short: give at least 20 steps.")
        )
    if len(times) % 2 == 0:
        raise SparsityError(f"`switches` must be odd in number, so that the run ends sparse; got {len(times)}.")
    return DropGrow(
        grow=criteria.random,
        updates=UpdateSteps(times),
        density=alternating(times),
        reallocate=global_ranking() if scope == "global" else None,
        optimizer_state="reset",
    )


def harmonic(
    *, stop: int, every: int = 100, amplitude: float = 0.1, waves: int = 4, grow: Criterion = criteria.gradient
) -> DropGrow:
    """Gradual pruning with periodic regrowth, after harmonic annealing (Stamatelis et al., arXiv 2503.15172).

    The density is `schedules.harmonic_like`, our own formula since the paper's was not available; regrown weights start
    at zero. The last update before `stop` reaches the final density.

    Differs: the formula, hence the name of the schedule; no fidelity is claimed.
    """
    updates = UpdateSchedule(every, stop, 0, constant(0.0))
    if updates.last < every:
        raise SparsityError(f"`harmonic` needs an update step before stop={stop}; with every={every} there is none.")
    return DropGrow(grow=grow, updates=updates, density=harmonic_like(updates.last, 0, amplitude, waves))
