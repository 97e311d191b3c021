"""Hebbian growth, for group-to-group connections (G2GNet); their supports are in `wrappers.one_shot`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparselearn.criteria import Layer, Tracker, tracker
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import DropGrow
from sparselearn.schedules import Schedule, UpdateSchedule


@dataclass(frozen=True)
class moments(tracker):
    """Running means of a Linear's outputs y and inputs x as one [out + 2, in + 2] tensor: E[y xᵀ] in the corner, below
    it E[x] and E[x²], beside it E[y] and E[y²]; at the last place the sum of the running weights."""

    key: str = "moments"
    beta: float = 0.9

    def init(self, layer: Layer) -> Tensor:
        if layer.weight.ndim != 2:
            raise SparsityError(
                f"Hebbian growth is for Linear layers; `{layer.name}` has {layer.weight.ndim} dimensions."
            )
        return layer.weight.new_zeros(layer.weight.shape[0] + 2, layer.weight.shape[1] + 2, dtype=torch.float32)

    def observe(self, module: nn.Module, inputs: Tensor, output: Tensor, value: Tensor) -> Tensor:
        """The tracker's value after one more batch."""
        x, y = inputs.detach().flatten(0, -2).float(), output.detach().flatten(0, -2).float()
        now = torch.zeros_like(value)
        now[:-2, :-2] = y.T @ x / len(x)
        now[-2, :-2], now[-1, :-2] = x.mean(0), x.square().mean(0)
        now[:-2, -2], now[:-2, -1] = y.mean(0), y.square().mean(0)
        now[-1, -1] = 1
        mean = self.beta * value + (1 - self.beta) * now
        return torch.where(now.isfinite().all(), mean, value)  # fp16 may overflow; such a step is not taken


@dataclass(frozen=True)
class hebbian:
    """|corr(y_i, x_j)| over running batch statistics in training: units that fire together are wired together.

    Constant units score 0. After G2GNet (arXiv 2508.14140); the sign of the correlation there is not known to us.
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise SparsityError(f"`beta` of a running mean must lie in [0, 1); got {self.beta}.")

    @property
    def trackers(self) -> tuple[Tracker, ...]:
        return (moments(beta=self.beta),)

    def __call__(self, layer: Layer) -> Tensor:
        m = layer.memory["moments"]
        m = m / m[-1, -1].clamp(min=torch.finfo(m.dtype).tiny)
        mean_x, mean_y = m[-2, :-2], m[:-2, -2]
        var_x, var_y = m[-1, :-2] - mean_x.square(), m[:-2, -1] - mean_y.square()
        covariance = m[:-2, :-2] - mean_y.unsqueeze(1) * mean_x
        power = var_y.clamp(min=0).unsqueeze(1) * var_x.clamp(min=0)
        noise = 1e-6 * (m[:-2, -1].unsqueeze(1) * m[-1, :-2])
        return torch.where(power > noise, covariance.abs() / power.clamp(min=1e-30).sqrt(), 0.0)


def g2gnet(*, stop: int, every: int = 100, drop_fraction: float | Schedule = 0.3, beta: float = 0.9) -> DropGrow:
    """G2GNet's dynamics (arXiv 2508.14140): drop by |w|, Hebbian growth; give `group_supports` as `support=`.

    The running means are over forward passes: two micro-batches count as two batches.

    Differs: only the abstract was read, so the details are ours and no fidelity is claimed; see `hebbian` and
    `group_supports`.
    """
    return DropGrow(grow=hebbian(beta), updates=UpdateSchedule(every, stop, None, drop_fraction))
