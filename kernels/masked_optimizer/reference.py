"""The updates by formula, on one tensor, in its own arithmetic: the kernel's measure, and what runs on a CPU.

    masked            g ← M·g, update, W ← M·W, state ← M·state        (W, state exactly zero outside M)
    straight-through  g ← g + λ·(1 - M)·W, update of all of W; with `keep`: M ← best n of every 4 of W, forward ← M·W

The update is that of `torch.optim.SGD`, Adam (arXiv 1412.6980, Alg. 1) and AdamW (arXiv 1711.05101, Alg. 2), operation
by operation in the order of torch's for-loop and foreach implementations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """The numbers of an optimizer's parameter group. SGD where `beta2` is None; then `beta1` is its momentum."""

    lr: float | Tensor  # a tensor of one number on the weights' device, or a number
    beta1: float = 0.0
    beta2: float | None = None
    eps: float = 0.0
    weight_decay: float = 0.0
    decoupled: bool = False  # AdamW's weight decay
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    @property
    def states(self) -> int:
        """State tensors of a weight: Adam's two moments, SGD's momentum, or none."""
        return 2 if self.beta2 is not None else int(self.beta1 != 0)


def update_(rule: Rule, w: Tensor, g: Tensor, state: tuple[Tensor, ...], step: float) -> None:
    """The optimizer's own update of w and its state (m and v, or the momentum, or nothing), in place.

    Args:
        w, g, *state: of one shape; g is only read.
        step: Adam's t, 1 at the first step.
    """
    lr = float(rule.lr)
    if rule.maximize:
        g = -g
    if rule.weight_decay and rule.decoupled:
        w.mul_(1 - lr * rule.weight_decay)
    elif rule.weight_decay:
        g = g.add(w, alpha=rule.weight_decay)
    if rule.beta2 is None:
        if state:
            (m,) = state
            m.mul_(rule.beta1).add_(g, alpha=1 - rule.dampening)
            g = g.add(m, alpha=rule.beta1) if rule.nesterov else m
        w.add_(g, alpha=-lr)
        return
    m, v = state
    m.lerp_(g, 1 - rule.beta1)
    v.mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
    root = (1 - rule.beta2**step) ** 0.5
    w.addcdiv_(m, (v.sqrt() / root).add_(rule.eps), value=-lr / (1 - rule.beta1**step))


def masked_(rule: Rule, w: Tensor, g: Tensor, state: tuple[Tensor, ...], mask: Tensor, step: float) -> None:
    """One step of a weight that is zero outside the mask (bool, like w); g is not changed."""
    update_(rule, w, g.masked_fill(~mask, 0), state, step)
    for tensor in (w, *state):
        tensor.masked_fill_(~mask, 0)


def straight_through_(
    rule: Rule, w: Tensor, g: Tensor, state: tuple[Tensor, ...], mask: Tensor, step: float, *, penalty: float
) -> None:
    """One step of dense weights w, those outside the mask decayed by λ = `penalty` (SR-STE, arXiv 2102.04010)."""
    update_(rule, w, g + (w * penalty).masked_fill(mask, 0), state, step)


def project(w: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(mask of the `keep` largest |w| of every 4 neighbours, w·mask); of equals the lower index wins; w [..., 4k]."""
    order = w.abs().unflatten(-1, (-1, 4)).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    mask = torch.zeros_like(w, dtype=torch.bool)
    mask.unflatten(-1, (-1, 4)).scatter_(-1, order, True)
    return mask, w.masked_fill(~mask, 0)
