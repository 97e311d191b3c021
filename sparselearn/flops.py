"""Operations and size of sparse networks, in the convention of the RigL paper (arXiv 1911.11134, App. H).

A layer of density d costs d times its dense operations. A training step is one forward pass and twice that backward:
3·f_S with f_S the sparse forward cost. A step that needs the dense gradient of the weights costs 2·f_S + f_D.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparselearn import criteria
from sparselearn.methods import DropGrow, StraightThrough
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

    def step(self, densities: Mapping[str, float], gradients: Mapping[str, float] | None = None) -> None:
        """Count one optimizer step.

        Args:
            gradients: densities of the weights whose gradient was computed (`gradient_densities`); default: the active
                ones.
        """
        sparse = self.forward(densities)
        self.spent += 2 * sparse + (sparse if gradients is None else self.forward(gradients))
        self.steps += 1

    @property
    def fraction(self) -> float:
        """Spent so far / what dense training would have spent."""
        return self.spent / (3 * self.total * self.steps) if self.steps else 0.0


_WITHOUT_GRADIENT = (
    criteria.magnitude, criteria.signed_magnitude, criteria.random, criteria.same, criteria.zeros,
    criteria.random_unfired, criteria.random_normal, criteria.random_uniform, criteria.initial_distribution,
)  # fmt: skip


def gradient_densities(
    method: DropGrow | StraightThrough, densities: Mapping[str, float], step: int, updated: bool
) -> Mapping[str, float]:
    """The density of the weights whose gradient an optimizer step needs, by layer; empty where it is dense everywhere.

    Straight-through methods need it for all weights on every step (Top-KAST: for its backward set), a running mean of
    the gradient and sparse momentum too; growth by the gradient on the steps on which masks change. A score that this
    library does not know counts as one that reads the gradient.

    Args:
        densities: of the forward pass, by layer.
        step: optimizer steps taken before this one.
        updated: whether masks changed on it.
    """
    if isinstance(method, StraightThrough):
        if method.backward is None:
            return {}
        wider = method.backward(step)
        return {name: min(1.0, density + wider) for name, density in densities.items()}
    if method.optimizer_state == "keep" or any(hasattr(tracker, "on_gradient") for tracker in method.trackers):
        return {}
    scores = (method.drop, method.grow, method.grow_init)
    known = (score is None or score in _WITHOUT_GRADIENT or type(score) in _WITHOUT_GRADIENT for score in scores)
    return densities if not updated or all(known) else {}


NORMS = (nn.modules.batchnorm._BatchNorm,)


def stored_megabytes(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> float:
    """Size of a network for inference in MB (10⁶ bytes): float32 values, and one bit per weight for each mask.

    Only active weights are stored; a layer whose mask is full needs no mask. Batch norm is folded into the layer before
    it and leaves one bias per channel. That is the convention of the table in the RigL repository's README.

    Args:
        masks: bool, by parameter name, as `Sparsifier.masks`; parameters without one are dense.

    >>> stored_megabytes(nn.Linear(1000, 1000))
    4.004
    >>> one_of_eight = torch.arange(8).view(1, 8) == 3
    >>> stored_megabytes(nn.Linear(8, 1, bias=False), {"weight": one_of_eight})
    5e-06
    """
    masks = masks or {}
    folded = {id(module.weight) for module in model.modules() if isinstance(module, NORMS) and module.affine}
    values, bits = 0, 0
    for name, parameter in model.named_parameters():
        if id(parameter) in folded:
            continue
        mask = masks.get(name)
        nnz = parameter.numel() if mask is None else int(mask.sum())
        values += nnz
        bits += parameter.numel() if nnz < parameter.numel() else 0
    return (4 * values + math.ceil(bits / 8)) / 1e6
