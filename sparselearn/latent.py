"""Straight-through methods in the engine: dense weights during the optimizer's step, forward weights at other times."""

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from sparselearn import distributed, statistics
from sparselearn.criteria import Layer, Tracker
from sparselearn.methods.straight_through import StraightThrough
from sparselearn.state import LayerState

SAMPLE = 50  # optimizer steps between looks at flips and gradients, which wait for the device
B = "backward"


class Observer:
    """A forward hook that shows a tracker what its module received and returned, in training."""

    def __init__(self, tracker: Tracker, layer: LayerState) -> None:
        self.tracker, self.layer = tracker, layer

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module.training:
            key = self.tracker.key
            self.layer.memory[key] = self.tracker.observe(module, args[0], output, self.layer.memory[key])  # type: ignore[attr-defined]


def refresh(method: StraightThrough, layer: LayerState, view: Layer, nnz: int) -> dict[str, Tensor | float]:
    """A new mask from the dense weights of `view`; returns what changed, on every SAMPLE-th step."""
    mask = method.mask(view, nnz, layer.step)
    changed: dict[str, Tensor | float] = {}
    if layer.step % SAMPLE == 0:
        changed["flips"] = statistics.flips(view.mask, mask)
        if (m := getattr(method.structure, "m", 0)) > 1:
            changed["groups"] = statistics.group_changes(view.mask, mask, m)
    layer.set_mask(distributed.place_like(mask, layer.dense), nnz)
    if method.backward is not None:
        wider = method.backward_mask(view._replace(mask=mask), layer.step)
        layer.memory[B] = distributed.place_like(wider, layer.dense)
    return changed


def enter(weights: Sequence[Tensor], layers: Sequence[LayerState]) -> None:
    """Put the dense weights into the model."""
    _copy(weights, [layer.dense for layer in layers])


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """In few launches for all layers: what starts them, not what they do, takes the time."""
    if targets:
        torch._foreach_copy_([distributed.local(t) for t in targets], [distributed.local(s) for s in sources])


def project(
    method: StraightThrough, weights: Sequence[Tensor], layers: Sequence[LayerState], view: Callable[[int], Layer]
) -> None:
    """Put the forward weights into the model; `view(i)` is what the method may look at for layer i."""
    masked = [method.masks_alone(layer.step) for layer in layers]
    enter(list(compress(weights, masked)), list(compress(layers, masked)))
    for i, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
        if masked[i]:
            distributed.local(weight).masked_fill_(distributed.local(layer.inactive), 0)
        else:
            distributed.assign(weight, method.forward_weights(view(i)))


def adjust_gradient(
    method: StraightThrough, layer: LayerState, view: Layer, grad: Tensor, *, fresh: bool, penalty: bool
) -> None:
    """In place: a fresh gradient as the method passes it on, and its penalty where that is due now."""
    dense = view.dense_grad()
    total = method.chained(view, dense) if fresh else dense
    if penalty and method.penalty is not None:
        addend = method.penalty(view._replace(grad=total))
        total = grad.add_(addend) if total is grad else total + addend
    if method.backward is not None:
        total = total.masked_fill(~distributed.full(layer.memory[B]), 0)
    if total is not dense:
        distributed.assign(grad, total)


def leave(
    weights: Sequence[Tensor], layers: Sequence[LayerState], slots: Callable[[int], Mapping[str, Tensor]]
) -> None:
    """Take the dense weights back from the model after a step; outside of B nothing has moved, `slots(i)` either."""
    for i, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
        if B in layer.memory:
            outside = ~distributed.local(layer.memory[B])
            distributed.local(weight).copy_(
                torch.where(outside, distributed.local(layer.dense), distributed.local(weight))
            )
            for slot in slots(i).values():
                distributed.local(slot).masked_fill_(outside, 0)
    _copy([layer.dense for layer in layers], weights)
