"""The plain formulas of a linear layer whose neurons share their inputs in groups: the meaning of the fast kernels.

Groups of V neighbouring neurons read the same K inputs: neuron g·V + v has the weights values[g, v] at indices[g].

Legend of shape suffixes: T tokens (rows of the input), I inputs, N = G·V neurons, G groups, V neurons of a group,
K weights of a neuron.
"""

import torch
from torch import Tensor

from sparselearn.kernels.condensed.reference import unsigned


def linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t, g·V + v] = Σ_k values[g, v, k] · x[t, indices[g, k]] + bias; x [T, I], values [G, V, K] -> [T, N].

    `indices` [G, K] are integers; int16 is read as unsigned. Takes memory for T·G·K numbers.

    >>> x, indices = torch.tensor([[1., 2., 3.]]), torch.tensor([[0, 2]])
    >>> linear(x, torch.tensor([[[1., 10.], [1., 1.]]]), indices, torch.tensor([0., 0.5]))
    tensor([[31.0000,  4.5000]])
    """
    y_TN = torch.einsum("tgk,gvk->tgv", x[:, unsigned(indices)], values).flatten(1)
    return y_TN if bias is None else y_TN + bias


def grad_values(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Σ_t grad[t, g·V + v] · x[t, indices[g, k]]; grad [T, N], x [T, I] -> [G, V, K].

    >>> grad_values(torch.tensor([[2., 1.]]), torch.tensor([[1., 2., 3.]]), torch.tensor([[0, 2]]))
    tensor([[[2., 6.],
             [1., 3.]]])
    """
    grad_TGV = grad.unflatten(1, (len(indices), -1))
    return torch.einsum("tgv,tgk->gvk", grad_TGV, x[:, unsigned(indices)])


def grad_input(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Σ over (g, v, k) with indices[g, k] = i of grad[t, g·V + v] · values[g, v, k]; grad [T, N] -> [T, I].

    >>> values, indices = torch.tensor([[[1., 10.], [1., 1.]]]), torch.tensor([[0, 2]])
    >>> grad_input(torch.tensor([[2., 1.]]), values, indices, 3)
    tensor([[ 3.,  0., 21.]])
    """
    parts = torch.einsum("tgv,gvk->tgk", grad.unflatten(1, values.shape[:2]), values).flatten(1)
    return parts.new_zeros(len(grad), in_features).index_add(1, unsigned(indices).flatten(), parts)


def scores(grad: Tensor, x: Tensor, group: int) -> Tensor:
    """Σ_v |Σ_t grad[t, g·V + v] · x[t, i]|: |dL/dW| of the dense weight, summed over groups; -> [G, I].

    >>> scores(torch.tensor([[2., -1.]]), torch.tensor([[1., 2., -3.]]), group=2)
    tensor([[3., 6., 9.]])
    """
    return (grad.mT @ x).abs().view(-1, group, x.shape[1]).sum(1)


def dense(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """The dense weight [N, I], with zeros at the other places. Differentiable in values.

    >>> dense(torch.tensor([[[1., 10.], [2., 3.]]]), torch.tensor([[0, 2]]), 3)
    tensor([[ 1.,  0., 10.],
            [ 2.,  0.,  3.]])
    """
    places = unsigned(indices)[:, None].expand(values.shape).flatten(0, 1)
    return values.new_zeros(len(places), in_features).scatter(1, places, values.flatten(0, 1))
