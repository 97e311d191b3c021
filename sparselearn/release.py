"""Training without the dense gradients of all layers: of each, the active values are kept and the rest is freed."""

from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparselearn import distributed
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import DropGrow
from sparselearn.sparsifier import Sparsifier


class ReleasedGradients:
    """Between backward and step, `values[name]` [nnz] is all there is of a sparse weight's gradient.

    A hook takes the active values when a weight's gradient is complete and frees the rest; micro-batches add up there.
    On a step whose gradient the method scores (an update step of RigL, say) gradients stay as they are.

    In the place of a freed gradient stands a tensor of NaN without memory of its own, so that whatever would miss it
    (clipping, `GradScaler.unscale_`, a norm for a log) fails or shows NaN, and is not silently wrong.
    """

    def __init__(self, sparsifier: Sparsifier, optimizer: Optimizer) -> None:
        method = sparsifier.method
        if not isinstance(method, DropGrow) or method.optimizer_state == "keep":
            raise SparsityError(
                "`release_gradients` needs a method whose optimizer sees active weights alone (rigl, set_, ...); this "
                "one uses the gradients of all weights on every step."
            )
        if any(hasattr(tracker, "on_gradient") for tracker in sparsifier.trackers):
            raise SparsityError("`release_gradients` does not go with a criterion that follows every step's gradient.")
        self.sparsifier, self.optimizer = sparsifier, optimizer
        self.values: dict[str, Tensor] = {}
        self._layers = sparsifier.layers_of(optimizer)
        for name, (weight, _) in self._layers.items():
            weight.parameter.register_hook(partial(self._make_place, name))
            weight.parameter.register_post_accumulate_grad_hook(partial(self._release, name))

    def _make_place(self, name: str, _: Tensor) -> None:
        """Before backward adds to a gradient that was freed."""
        if name in self.values:
            self._layers[name][0].parameter.grad = None

    @torch.no_grad()
    def _release(self, name: str, parameter: Tensor) -> None:
        if distributed.active():
            raise SparsityError("`release_gradients` is for one process: DDP and FSDP hold gradients themselves.")
        layer = self._layers[name][1]
        if self.sparsifier.method.due(layer.step) or layer.deferred:
            return
        assert parameter.grad is not None
        values = parameter.grad[layer.mask]
        self.values[name] = self.values[name] + values if name in self.values else values
        parameter.grad = parameter.new_full((), torch.nan).expand_as(parameter)

    def hide(self) -> None:
        """Take the NaN away, before the step."""
        for name in self.values:
            self._layers[name][0].parameter.grad = None

    def clear(self) -> None:
        """Forget all gradients, as `zero_grad` does."""
        self.hide()
        self.values = {}

    @torch.no_grad()
    def step(self) -> None:
        """After `hide`, the optimizer's step: of the other parameters, then of one sparse weight at a time."""
        self.optimizer.step()
        others = [(p, p.grad) for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in others:
            p.grad = None
        for name, values in self.values.items():
            weight, layer = self._layers[name]
            weight.parameter.grad = torch.zeros_like(weight.parameter).masked_scatter_(layer.mask, values)
            self.optimizer.step()
            weight.parameter.grad = None
        self.values = {}
        for p, grad in others:
            p.grad = grad
