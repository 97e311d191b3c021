"""The plain formulas of a condensed layer, for every device and dtype: the meaning of the fast kernels.

Legend of shape suffixes: B rows of the input, I inputs, N neurons, K weights per neuron. Source: SRigL, arXiv
2305.02299, sec. 4.4 (the "condensed" form of constant fan-in).
"""

import torch
from torch import Tensor


def unsigned(indices: Tensor) -> Tensor:
    """Integer indices as int64. int16 is read as unsigned, so that two bytes can name 65,536 inputs.

    >>> unsigned(torch.tensor([3, -1], dtype=torch.int16))
    tensor([    3, 65535])
    """
    return indices.long() & 0xFFFF if indices.dtype == torch.int16 else indices.long()


def linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[b, n] = Σ_k values[n, k] · x[b, indices[n, k]] + bias[n]; x [B, I], values and indices [N, K] -> [B, N].

    Takes memory for B·N·K numbers: for checks, not for work. Differentiable in x, values and bias.

    >>> x, indices = torch.tensor([[1., 2., 3.]]), torch.tensor([[0, 2], [1, 2]])
    >>> linear(x, torch.tensor([[1., 10.], [1., 1.]]), indices, torch.tensor([0., 0.5]))
    tensor([[31.0000,  5.5000]])
    """
    y_BN = torch.einsum("bnk,nk->bn", x[:, unsigned(indices)], values)
    return y_BN if bias is None else y_BN + bias


def grad_values(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Σ_b grad[b, n] · x[b, indices[n, k]]: the dense gradient [N, I], sampled at the indices; grad [B, N] -> [N, K].

    >>> grad_values(torch.tensor([[2., 0.]]), torch.tensor([[1., 2., 3.]]), torch.tensor([[0, 2], [1, 2]]))
    tensor([[2., 6.],
            [0., 0.]])
    """
    return torch.einsum("bn,bnk->nk", grad, x[:, unsigned(indices)])


def grad_input(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Σ over (n, k) with indices[n, k] = i of grad[b, n] · values[n, k]; grad [B, N] -> [B, I].

    >>> values, indices = torch.tensor([[1., 10.], [1., 1.]]), torch.tensor([[0, 2], [1, 2]])
    >>> grad_input(torch.tensor([[2., 1.]]), values, indices, 3)
    tensor([[ 2.,  1., 21.]])
    """
    parts = (grad[:, :, None] * values).flatten(1)
    return parts.new_zeros(len(grad), in_features).index_add(1, unsigned(indices).flatten(), parts)
