"""What a score may look at (`Layer`), the scores (`Criterion`), and memory that a score may keep (`Tracker`).

A criterion is a function of one `Layer` to a score per weight: higher is kept, or grown, first. `-inf` means
never; NaN is refused. To add one, write the function; nothing is registered.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparselearn.checks import check
from sparselearn.errors import SparsityError


class Layer(NamedTuple):
    """All that a score may look at, for one weight. Tensors are for reading only."""

    name: str
    weight: Tensor  # [out, in, ...]; 0 where inactive
    grad: Tensor | None  # dense dL/dW of this step, averaged over ranks, unscaled, unclipped
    mask: Tensor  # bool like weight, True = active
    optimizer_state: Mapping[str, Tensor]  # the weight-shaped entries only
    step: int  # optimizer steps taken before this one
    generator: torch.Generator  # on the CPU, seeded by (seed, step, name): equal on every rank and device
    memory: Mapping[str, Tensor] = {}  # tracker key -> its tensor
    support: Tensor | None = None  # bool like weight: where weights may be active; None = everywhere

    def rand(self) -> Tensor:
        """Uniform numbers in [0, 1) like the weight, float32; the same on every rank and device."""
        shape = self.weight.shape
        return torch.rand(shape, generator=self.generator).to(self.weight.device)

    def dense_grad(self) -> Tensor:
        """The gradient, or a clear error where there is none."""
        if self.grad is None:
            raise SparsityError(
                f"Growth by `gradient` found no gradient for `{self.name}` at step {self.step}. "
                "The layer took no part in the loss; exclude it, or grow with `random`."
            )
        return self.grad


Criterion = Callable[[Layer], Tensor]


@runtime_checkable
class Tracker(Protocol):
    """Memory of a criterion: one tensor per layer, checkpointed. A criterion lists its own in `trackers`.

    Trackers that compare equal are shared, so that two criteria that need one count do not count twice. The tensor has
    the weight's shape, or any other; of another shape it is equal on every rank and never sharded.

    Two more methods are called where a tracker has them:
        on_gradient(layer, value) -> value: on every step with finite gradients; `layer.grad` is dense.
        observe(module, inputs, output, value) -> value: after each forward pass in training of the module that owns
            the weight; ranks are averaged before an update.
    """

    @property
    def key(self) -> str:
        """The name under which `Layer.memory` holds the tensor."""

    def init(self, layer: Layer) -> Tensor:
        """The first value. `layer.mask` is the initial mask."""

    def after_step(self, layer: Layer, value: Tensor) -> Tensor:
        """The value after an optimizer step; `layer.grad` is what the optimizer was given, or None."""

    def after_update(self, layer: Layer, value: Tensor) -> Tensor:
        """The value after a mask update; `layer.mask` is the new mask."""


def magnitude(layer: Layer) -> Tensor:
    """|w|. The drop score of RigL (arXiv 1911.11134) and of magnitude pruning (arXiv 1506.02626)."""
    return layer.weight.abs()


def signed_magnitude(layer: Layer) -> Tensor:
    """SET's drop score (Mocanu et al. 2018, Alg. 1): each sign loses the same fraction of its weights.

    The score is the weight's rank among the active weights of its sign, smallest magnitude first, divided by
    their number, in (0, 1]; an active weight that is exactly zero scores 0 and goes first.

    Differs: the reference drops floor(ζ·n) of each sign; here the total is exact and the two signs may differ
    from that by one weight.
    """
    w = layer.weight.float()
    score = torch.zeros_like(w)
    for sign in (w > 0, w < 0):
        members = layer.mask & sign
        values = w[members].abs()
        ranks = torch.empty_like(values)
        order = torch.argsort(values, stable=True)
        ranks[order] = torch.arange(1, values.numel() + 1, device=w.device, dtype=w.dtype)
        score[members] = ranks / max(values.numel(), 1)
    return score


def gradient(layer: Layer) -> Tensor:
    """|dL/dw|, dense: RigL's grow score (arXiv 1911.11134, Alg. 1)."""
    return layer.dense_grad().abs()


def random(layer: Layer) -> Tensor:
    """Uniform random numbers: SET's growth; equal on every rank and device."""
    return layer.rand()


def momentum(layer: Layer) -> Tensor:
    """|momentum|: SGD's buffer, or Adam's m/(√v + 1e-8) (sparse momentum, arXiv 1907.04840).

    It needs a momentum that is kept for inactive weights: `DropGrow(optimizer_state="keep")`.
    """
    state = layer.optimizer_state
    if "momentum_buffer" in state:
        return state["momentum_buffer"].abs()
    if "exp_avg" in state and "exp_avg_sq" in state:
        return (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)).abs()
    raise SparsityError(
        f"`momentum` found neither `momentum_buffer` nor `exp_avg` in the optimizer's state of `{layer.name}` "
        f"at step {layer.step} (it has: {', '.join(state) or 'nothing'}). Use SGD with momentum or Adam."
    )


# ---- memory -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class tracker:
    """A tracker that keeps its value; the ones below change what they need."""

    key: str

    def init(self, layer: Layer) -> Tensor:
        return layer.mask.clone()

    def after_step(self, layer: Layer, value: Tensor) -> Tensor:
        return value

    def after_update(self, layer: Layer, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True)
class fired(tracker):
    """Bool: weights that have been active at any time (ITOP, arXiv 2102.02887; its R_s is their fraction)."""

    key: str = "fired"

    def after_update(self, layer: Layer, value: Tensor) -> Tensor:
        return value | layer.mask


@dataclass(frozen=True)
class grown(tracker):
    """Bool: weights that the last update grew. The engine sets it."""

    key: str = "grown"

    def init(self, layer: Layer) -> Tensor:
        return torch.zeros_like(layer.mask)


@dataclass(frozen=True)
class visits(tracker):
    """int32: in how many mask periods each weight has been active (DST-EE, arXiv 2211.16667)."""

    key: str = "visits"

    def init(self, layer: Layer) -> Tensor:
        return layer.mask.to(torch.int32)

    def after_update(self, layer: Layer, value: Tensor) -> Tensor:
        return value + layer.mask


@dataclass(frozen=True)
class gradient_average(tracker):
    """The running mean of the dense gradient, β·value + (1 - β)·g on every step (not bias-corrected)."""

    key: str = "gradient_average"
    beta: float = 0.9

    def init(self, layer: Layer) -> Tensor:
        return torch.zeros_like(layer.weight)

    def on_gradient(self, layer: Layer, value: Tensor) -> Tensor:
        return value.lerp(layer.dense_grad(), 1 - self.beta)


@dataclass(frozen=True)
class initial_weights(tracker):
    """The weights as they were when the sparsifier was built (masked)."""

    key: str = "initial_weights"

    def init(self, layer: Layer) -> Tensor:
        return layer.weight.clone()


# ---- scores that remember ------------------------------------------------------------------------------


@dataclass(frozen=True)
class magnitude_gradient:
    """|w| + λ·|g|: MEST's importance (arXiv 2110.14032, §3.2); g is the gradient of the update step."""

    weight: float

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise SparsityError(f"The weight of |g| in `magnitude_gradient` must be at least 0; got {self.weight}.")

    def __call__(self, layer: Layer) -> Tensor:
        return layer.weight.abs() + self.weight * layer.dense_grad().abs() if self.weight else layer.weight.abs()


@dataclass(frozen=True)
class average_gradient:
    """|running mean of g|: growth by momentum without touching the optimizer's (RigL's repository, SNFS-lite)."""

    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise SparsityError(f"`beta` of a running mean must lie in [0, 1); got {self.beta}.")

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        return (gradient_average(beta=self.beta),)

    def __call__(self, layer: Layer) -> Tensor:
        return layer.memory["gradient_average"].abs()


@dataclass(frozen=True)
class gradient_exploration:
    """|g| + c·ln(t)/(N + ε): DST-EE's acquisition score (arXiv 2211.16667), t the step, N the visits of the weight."""

    c: float
    epsilon: float
    trackers: tuple[Tracker, ...] = (visits(),)

    def __call__(self, layer: Layer) -> Tensor:
        score = layer.dense_grad().abs()
        bonus = self.c * math.log(max(layer.step, 1))
        return score if bonus == 0 else score + bonus / (layer.memory["visits"] + self.epsilon)


@dataclass(frozen=True)
class random_unfired:
    """Uniform random numbers, weights that were never active first (ITOP's code, arXiv 2102.02887)."""

    trackers: tuple[Tracker, ...] = (fired(),)

    def __call__(self, layer: Layer) -> Tensor:
        return layer.rand() + ~layer.memory["fired"]


def same(layer: Layer) -> Tensor:
    """The positions that were just dropped, again: with `DropGrow(reinit=True)` this renews values, not places."""
    return layer.mask.float()


# ---- the values of grown weights ------------------------------------------------------------------------


def zeros(layer: Layer) -> Tensor:
    """Grown weights start at zero: RigL's default, and the only choice that leaves the output unchanged."""
    return torch.zeros_like(layer.weight)


def _normal(layer: Layer) -> Tensor:
    return torch.randn(layer.weight.shape, generator=layer.generator).to(layer.weight)


@dataclass(frozen=True)
class random_normal:
    """N(0, σ²)/k with σ the standard deviation of the whole weight, zeros included (RigL's random_normal_k)."""

    k: float = 1.0

    def __call__(self, layer: Layer) -> Tensor:
        return _normal(layer) * layer.weight.std(correction=0) / self.k


@dataclass(frozen=True)
class random_uniform:
    """U(-a, a)/k with a the mean magnitude of the whole weight, zeros included (RigL's random_uniform_k)."""

    k: float = 1.0

    def __call__(self, layer: Layer) -> Tensor:
        return (layer.rand() * 2 - 1).to(layer.weight) * layer.weight.abs().mean() / self.k


@dataclass(frozen=True)
class gradient_scale:
    """-g/k: a step downhill.

    Differs: RigL's grad_scale_k has the sign of the gradient of the code's masked weights; ours descends.
    """

    k: float = 1.0

    def __call__(self, layer: Layer) -> Tensor:
        return -layer.dense_grad() / self.k


@dataclass(frozen=True)
class gradient_sign:
    """-sign(g)/k: a step of equal size downhill (RigL's grad_sign_k). `Differs:` as `gradient_scale`."""

    k: float = 1.0

    def __call__(self, layer: Layer) -> Tensor:
        return -layer.dense_grad().sign() / self.k


@dataclass(frozen=True)
class initial_distribution:
    """Values drawn from the layer's initial active weights, divided by k (RigL's initial_dist_k).

    Differs: RigL shuffles the dense initial tensor; here each value is drawn with replacement from the
    weights that were active at the start, since the others are gone.
    """

    k: float = 1.0
    trackers: tuple[Tracker, ...] = (initial_weights(),)

    def __call__(self, layer: Layer) -> Tensor:
        initial = layer.memory["initial_weights"]
        values = initial[initial != 0]
        if not len(values):  # a layer that started at zero
            return torch.zeros_like(layer.weight)
        index = (layer.rand().double() * values.numel()).long().clamp(max=values.numel() - 1)
        return values[index] / self.k


# ---- one-shot saliencies ---------------------------------------------------------------------------------


def snip(layer: Layer) -> Tensor:
    """|g·w|: connection sensitivity (SNIP, arXiv 1810.02340, eq. 5; not normalised, which ranks the same)."""
    return (layer.dense_grad() * layer.weight).abs()


def _refuse_nan(name: str, step: int, role: str) -> None:
    raise SparsityError(
        f"The {role} criterion returned NaN for `{name}` at step {step}. "
        "Look for a loss that diverged, or return -inf for weights that must not be chosen."
    )


def check_score(score: Tensor, layer: Layer, role: str) -> Tensor:
    """Refuse a score of another shape or with NaN; the message names layer, role and step."""
    if score.shape != layer.weight.shape:
        raise SparsityError(
            f"The {role} criterion returned a score of shape {list(score.shape)} for `{layer.name}`; "
            f"it must have the weight's shape {list(layer.weight.shape)}."
        )
    if score.numel():
        check(score.min(), math.isnan, partial(_refuse_nan, layer.name, layer.step, role))  # NaN, where there is one
    return score


NEVER = -math.inf
