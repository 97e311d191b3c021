"""Floating-point operations of sparse training, in the convention of the RigL paper (arXiv 1911.11134, App. H).

A layer of density d costs d times its dense operations. A training step is one forward pass and twice that backward:
3·f_S with f_S the sparse forward cost. A step whose growth needs the dense gradient of the weights costs 2·f_S + f_D.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparselearn.selection import CONV, CONV_TRANSPOSE, Weight, select_weights


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without attention's fused path, which the counter does not see; everything as before after it."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training


def model_flops(model: nn.Module, example: Tensor) -> float:
    """Dense forward operations (2 per multiply-add) for one example; `example` is a batch of any size."""
    with _undisturbed(model), FlopCounterMode(display=False) as counter:
        model(example)
    return float(counter.get_total_flops()) / len(example)


def _positions(module: nn.Module, attribute: str, args: Any, kwargs: Any, output: Any) -> float:
    """How many times one forward call applies each number of this weight."""
    if isinstance(module, nn.MultiheadAttention):
        inputs = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        tokens = {name: inputs[name].numel() / inputs[name].shape[-1] for name in ("query", "key", "value")}
        packed = sum(tokens.values()) / 3  # a third of the packed weight for each
        own = {"in_proj_weight": packed, "k_proj_weight": tokens["key"], "v_proj_weight": tokens["value"]}
        return float(own.get(attribute, tokens["query"]))
    if isinstance(module, CONV):
        return float(output.numel() / module.out_channels)
    if isinstance(module, CONV_TRANSPOSE):
        return float(args[0].numel() / module.in_channels)
    return float(output.numel() / output.shape[-1])


def layer_flops(model: nn.Module, example: Tensor) -> dict[str, float]:
    """Dense forward operations per example of each weight that can be sparse: 2·size·(positions it is applied to).

    Embeddings cost nothing. A weight that the forward pass does not use is not in the result.

    >>> layer_flops(nn.Sequential(nn.Linear(10, 20)), torch.ones(5, 10))
    {'0.weight': 400.0}
    """
    result: dict[str, float] = {}
    # Attention uses its output projection's weight without calling that module.
    attention: dict[nn.Module, nn.Module] = {
        m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    handles = []
    for weight in select_weights(model):

        def count(module: nn.Module, args: Any, kwargs: Any, output: Any, w: Weight = weight) -> None:
            positions = _positions(module, w.attribute, args, kwargs, output)
            result[w.name] = result.get(w.name, 0.0) + 2.0 * w.parameter.numel() * positions / len(example)

        caller = attention.get(weight.module, weight.module)
        handles.append(caller.register_forward_hook(count, with_kwargs=True))
    try:
        with _undisturbed(model):
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
