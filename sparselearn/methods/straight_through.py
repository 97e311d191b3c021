"""Methods that train dense weights through masks: the forward pass sees a projection, the gradient goes to all.

A method is a `StraightThrough` value; N:M training is its main use. The factories are in `methods.n_m` and
`methods.top_kast`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sparselearn.checks import located
from sparselearn.criteria import Criterion, Layer, Tracker, check_score, magnitude
from sparselearn.errors import SparsityError
from sparselearn.schedules import DensitySchedule, Schedule, constant
from sparselearn.structures import Structure, Unstructured


@dataclass(frozen=True)
class StraightThrough:
    """Dense weights W are trained; forward and backward use W⊙(M + β·(1 - M)), M the structure's best mask of W.

    In a step: g = dL/d(forward weights) goes to all of W (the straight-through estimator), plus `penalty`; the
    optimizer moves W; M is chosen anew from W; the model's weights are the forward ones again.

    Args:
        structure: which masks are allowed.
        criterion: score of the dense weights; the highest are active.
        every: optimizer steps between refreshes of the mask.
        stop: the step from which on the mask stays; None never stops.
        density: global density at a step, from (step, final density), for structures that leave it open.
        stage: structure at a step, None = dense (M all true); overrides `structure`, which is that of the end. A new
            stage refreshes the mask at once, as does another value of `backward`.
        residual: β at a step. The model is exactly sparse where it is 0.
        penalty: added to g: a tensor of (layer), with `layer.weight` dense and `layer.grad` = g. See `masked_decay`.
        penalty_after_clip: add it after clipping; only where the wrapper or a hand-written loop does the step.
        gradient: "ste" as above; "chain" multiplies g by M + β·(1 - M), the true derivative of the projection.
        backward: at a step, the density that a second set B ⊇ M has beyond M: the optimizer sees and moves B alone
            (Top-KAST). None lets it move all weights.
        project: forward weights of (layer), in place of W⊙(M + β·(1 - M)).
    """

    structure: Structure
    criterion: Criterion = magnitude
    every: int = 1
    stop: int | None = None
    density: DensitySchedule | None = None
    stage: Callable[[int], Structure | None] | None = None
    residual: Schedule = field(default_factory=lambda: constant(0.0))
    penalty: Criterion | None = None
    penalty_after_clip: bool = False
    gradient: Literal["ste", "chain"] = "ste"
    backward: Schedule | None = None
    project: Criterion | None = None

    # What the engine asks of every method.
    grow = reallocate = None
    skip_step = False
    optimizer_state = "keep"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SparsityError(f"`every` must be at least 1 optimizer step; got {self.every}.")
        if self.gradient not in ("ste", "chain"):
            raise SparsityError(f"`gradient` must be 'ste' or 'chain'; got {self.gradient!r}.")

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        """The trackers that the parts declare, equal ones once."""
        parts = (self.criterion, self.penalty, self.project)
        return tuple(dict.fromkeys(t for part in parts for t in getattr(part, "trackers", ())))

    def due(self, step: int) -> bool:
        """No step's gradient is needed for a mask: refreshes look at the dense weights."""
        return False

    def structure_at(self, step: int) -> Structure | None:
        """The structure of the masks in force at a step; None = dense."""
        return self.structure if self.stage is None else self.stage(step)

    def refresh(self, step: int) -> bool:
        """Whether the mask for this step is chosen anew."""
        if step == 0 or self.structure_at(step) != self.structure_at(step - 1):
            return True
        if self.backward is not None and self.backward(step) != self.backward(step - 1):
            return True
        return step % self.every == 0 and (self.stop is None or step < self.stop)

    def mask(self, layer: Layer, nnz: int, step: int) -> Tensor:
        """The mask for this step, from the dense weights."""
        structure = self.structure_at(step)
        if structure is None:
            return torch.ones_like(layer.mask)
        score = check_score(self.criterion(layer), layer, "mask").float()
        if layer.support is not None:
            score = score.masked_fill(~layer.support, -torch.inf)
        with located(f"`{layer.name}` at step {step}"):
            return structure.topk(score, nnz)

    def backward_mask(self, layer: Layer, step: int) -> Tensor:
        """B: the mask's weights, then the best others."""
        assert self.backward is not None
        score, active = self.criterion(layer).float(), int(layer.mask.sum())
        if layer.support is not None:
            score = score.masked_fill(~layer.support, -torch.inf)
        room = layer.mask.numel() if layer.support is None else int(layer.support.sum())
        extra = min(round(self.backward(step) * layer.mask.numel()), room - active)
        return Unstructured().topk(score, active + extra, layer.mask)

    def masks_alone(self, step: int) -> bool:
        """Whether the forward weights are W⊙M at this step."""
        return self.project is None and self.residual(step) == 0

    def forward_weights(self, layer: Layer) -> Tensor:
        """What the model's weight holds between steps."""
        if self.project is not None:
            return self.project(layer)
        dense = layer.weight
        rest = 0 if self.masks_alone(layer.step) else self.residual(layer.step) * dense
        return torch.where(layer.mask, dense, rest)

    def chained(self, layer: Layer, grad: Tensor) -> Tensor:
        """g, or with gradient="chain" its product with M + β·(1 - M)."""
        if self.gradient == "ste":
            return grad
        beta = self.residual(layer.step)
        return grad.masked_fill(~layer.mask, 0) if beta == 0 else torch.where(layer.mask, grad, beta * grad)


@dataclass(frozen=True)
class masked_decay:
    """λ·(1 - M)⊙W: SR-STE's term (arXiv 2102.04010, eq. 8), towards zero where the forward pass sees none of W."""

    rate: float | Schedule

    def __call__(self, layer: Layer) -> Tensor:
        rate = self.rate(layer.step) if callable(self.rate) else self.rate
        return (layer.weight * rate).masked_fill(layer.mask, 0)


@dataclass(frozen=True)
class top_kast_penalty:
    """The gradient of λ·(‖W_A‖² + ‖W_{B∖A}‖²/D): 2λW on A, 2λW/D on the rest (Top-KAST, arXiv 2106.03517, §2.3).

    D is the forward density; the engine zeroes it outside B.
    """

    rate: float

    def __call__(self, layer: Layer) -> Tensor:
        density = float(layer.mask.sum()) / layer.mask.numel()
        decay = 2 * self.rate * layer.weight
        return torch.where(layer.mask, decay, decay / density)


@dataclass(frozen=True)
class until:
    """A value before step `stop`, 0 from then on; None never stops."""

    value: float
    stop: int | None = None

    def __call__(self, step: int) -> float:
        return self.value if self.stop is None or step < self.stop else 0.0


def top_kast(
    *, exploration: float, penalty: float = 1e-4, every: int = 1, stop_exploration: int | None = None
) -> StraightThrough:
    """Top-KAST (Jayakumar et al., arXiv 2106.03517): forward on A = top-D|W|, gradients on B = top-(D+M)|W|.

    A is the sparsifier's density D, uniform or by its distribution; B adds `exploration` (M) to every layer's density.
    Weights outside B, and their optimizer state, do not move.

    Args:
        exploration: M, the density that B has beyond A, at least 0.
        penalty: λ of `top_kast_penalty`.
        every: optimizer steps between refreshes of A and B (the paper: 100 is as good as 1).
        stop_exploration: the step from which on B = A; None never.

    Differs: the form of the penalty is that of the third-party port and the paper's text with squared norms; no
    reference code of the authors was read. Decoupled weight decay is undone outside B.
    """
    if not 0 <= exploration <= 1:
        raise SparsityError(f"`exploration` is a density and must lie in [0, 1]; got {exploration}.")
    if penalty < 0:
        raise SparsityError(f"`penalty` of `top_kast` must be at least 0; got {penalty}.")
    return StraightThrough(
        Unstructured(),
        every=every,
        penalty=top_kast_penalty(penalty) if penalty else None,
        backward=until(exploration, stop_exploration),
    )
