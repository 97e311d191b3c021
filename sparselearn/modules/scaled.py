"""Linear layers with a learned factor for every output (CAST's weight scaling)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearn.errors import SparsityError


class ScaledLinear(nn.Linear):
    """y = x·(diag(scale)·W)ᵀ + bias; made by `scale_outputs`."""

    scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale[:, None], self.bias)


def scale_outputs(model: nn.Module) -> nn.Module:
    """Give every Linear layer a parameter `scale` [N] of ones, in place; returns the model.

    A layer whose smaller weights are drawn to zero can make up for what its outputs lose. Call it before the optimizer
    is made, and `fold_scales` at the end. The masks are chosen from the weight without its scale, which orders the
    inputs of a neuron alike.

    Source: CAST (arXiv 2509.25996); one factor per output channel, from 1.

    Raises:
        SparsityError: the model has no Linear layer.

    >>> model = scale_outputs(nn.Sequential(nn.Linear(4, 2)))
    >>> sorted(name for name, _ in model.named_parameters())
    ['0.bias', '0.scale', '0.weight']
    >>> type(fold_scales(model)[0])
    <class 'torch.nn.modules.linear.Linear'>
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    if not layers:
        raise SparsityError("`scale_outputs` scales Linear layers; the model has none.")
    for layer in layers:
        layer.__class__ = ScaledLinear
        layer.register_parameter("scale", nn.Parameter(torch.ones_like(layer.weight[:, 0])))
    return model


@torch.no_grad()
def fold_scales(model: nn.Module) -> nn.Module:
    """Multiply the scales into the weights and go back to ordinary layers, in place; returns the model."""
    for layer in model.modules():
        if isinstance(layer, ScaledLinear):
            layer.weight.mul_(layer.scale[:, None])
            del layer.scale
            layer.__class__ = nn.Linear  # type: ignore[assignment]
    return model
