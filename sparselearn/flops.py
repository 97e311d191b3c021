"""Floating-point operations of sparse training, in the convention of the RigL paper (arXiv 1911.11134, App. H).

A layer of density d costs d times its dense operations. A training step is one forward pass and twice that backward: 3·f_S
with f_S the sparse forward cost. A step whose growth needs the dense gradient of the weights costs 2·f_S + f_D.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparselearn.selection import CONV, CONV_TRANSPOSE, select_weights


@torch.no_grad()
def model_flops(model: nn.Module, example: Tensor) -> float:
    """Dense forward operations (2 per multiply-add) for one example; `example` is a batch of any size."""
    with FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() / len(example)


@torch.no_grad()
def layer_flops(model: nn.Module, example: Tensor) -> dict[str, float]:
    """Dense forward operations per example of each weight that can be sparse: 2·size·(positions it is applied to).

    Embeddings cost nothing. A weight that the forward pass does not use is not in the result.

    >>> layer_flops(nn.Sequential(nn.Linear(10, 20)), torch.ones(5, 10))
    {'0.weight': 400.0}
    """
    result: dict[str, float] = {}
    handles = []
    for weight in select_weights(model):

        def count(module: nn.Module, inputs: Any, output: Any, name: str = weight.name, w: Any = weight) -> None:
            size = w.parameter.numel()
            if isinstance(module, nn.Linear | nn.Bilinear):
                positions = output.numel() / output.shape[-1]
            elif isinstance(module, CONV):
                positions = output.numel() / module.out_channels
            elif isinstance(module, CONV_TRANSPOSE):
                positions = inputs[0].numel() / module.in_channels
            else:  # an attention projection: one position a token
                positions = inputs[0].numel() / inputs[0].shape[-1]
            result[name] = result.get(name, 0.0) + 2.0 * size * positions / len(example)

        handles.append(weight.module.register_forward_hook(count))
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return result


class TrainingFlops:
    """Operations of a training run as a fraction of the dense run's.

    Args:
        layers: dense forward operations of each sparse layer (`layer_flops`).
        total: dense forward operations of the whole model (`model_flops`).
    """

    def __init__(self, layers: Mapping[str, float], total: float) -> None:
        self.layers, self.total = dict(layers), total
        self.steps, self.spent = 0, 0.0

    def forward(self, densities: Mapping[str, float]) -> float:
        """Operations of one sparse forward pass; layers without a density are dense."""
        saved = sum(f * (1 - densities.get(name, 1.0)) for name, f in self.layers.items())
        return self.total - saved

    def step(self, densities: Mapping[str, float], dense_gradient: bool = False) -> None:
        """Count one optimizer step."""
        sparse = self.forward(densities)
        self.spent += 2 * sparse + (self.total if dense_gradient else sparse)
        self.steps += 1

    @property
    def fraction(self) -> float:
        """Spent so far / what dense training would have spent."""
        return self.spent / (3 * self.total * self.steps) if self.steps else 0.0
