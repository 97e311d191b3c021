"""Linear layers whose gradient of the weight is a 2:4 sparse product (the neural gradients' MVUE).

    Y = X·Wᵀ        dX = G·W        dW = MVUE(Gᵀ)·X

G is pruned at random to 2 of every 4 tokens, without bias: the mean of dW over the draws is GᵀX. With
`methods.pretrain_24`, whose masks make the other two products sparse, this is the 2:4 pre-training of Hu et al.
(arXiv 2404.01847, §5).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearn.errors import SparsityError
from sparselearn.methods.n_m import mvue_24
from sparselearn.state import generator


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: "MvueLinear") -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.biased = layer, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_TN, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        to_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        to_weight = (ctx.layer.pruned(grad_TN).T @ x_TI).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, grad_TN.sum(0) if ctx.biased else None, None


class MvueLinear(nn.Linear):
    """nn.Linear whose training backward pass prunes the neural gradients; made by `mvue`."""

    name: str
    seed: int
    draws: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            bias = None if self.bias is None else self.bias.to(dtype)
            return _Product.apply(x.to(dtype), self.weight.to(dtype), bias, self)  # type: ignore[no-any-return]
        return _Product.apply(x, self.weight, self.bias, self)  # type: ignore[no-any-return]

    def pruned(self, grad_TN: Tensor) -> Tensor:
        """Gradients of T tokens, 2:4 along the tokens; the last T % 4 tokens stay dense."""
        whole = len(grad_TN) // 4 * 4
        draw = torch.Generator(grad_TN.device).manual_seed(generator(self.seed, self.draws, self.name).initial_seed())
        self.draws += 1
        return torch.cat([mvue_24(grad_TN[:whole].T, draw).T, grad_TN[whole:]])

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        self.draws = int(state)


def mvue(model: nn.Module, *, exclude: tuple[str, ...] = (), seed: int = 0) -> nn.Module:
    """Prune the neural gradients of a model's Linear layers to 2:4 along the tokens, in place; returns the model.

    Parameters, their names and the optimizer that holds them stay, so that a `Sparsifier` goes with it. Evaluation is
    untouched. How many draws were made is in `state_dict`: resumed training draws what uninterrupted training would.
    `exact` goes back, as in the dense fine-tuning at the end.

    Args:
        exclude: names of layers whose gradients stay exact.

    Raises:
        SparsityError: `exclude` names no layer; the model has no Linear layer left.

    Differs: the draws' probabilities, see `mvue_24`. The product is a dense one of a pruned matrix: it shows what the
    estimator does to training, not its speed.

    >>> model = mvue(nn.Sequential(nn.Linear(8, 4)))
    >>> model(torch.randn(4, 8)).sum().backward()
    >>> model[0].weight.grad.shape
    torch.Size([4, 8])
    """
    names = dict(model.named_modules())
    if unknown := [name for name in exclude if name not in names]:
        raise SparsityError(f"`exclude` names `{unknown[0]}`, which is no layer of the model.")
    layers = {name: module for name, module in names.items() if type(module) is nn.Linear and name not in exclude}
    if not layers:
        raise SparsityError("`mvue` prunes the gradients of Linear layers; the model has none besides `exclude`.")
    for name, layer in layers.items():
        layer.__class__ = MvueLinear
        assert isinstance(layer, MvueLinear)
        layer.name, layer.seed, layer.draws = name, seed, 0
    return model


def exact(model: nn.Module) -> nn.Module:
    """Back to ordinary layers with exact gradients, in place; returns the model."""
    for module in list(_layers(model)):
        del module.name, module.seed, module.draws
        module.__class__ = nn.Linear  # type: ignore[assignment]
    return model


def _layers(model: nn.Module) -> Iterator[MvueLinear]:
    return (module for module in model.modules() if isinstance(module, MvueLinear))
