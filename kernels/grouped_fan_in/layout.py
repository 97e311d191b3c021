"""Memory layouts of activations and of the transposed indices."""

import torch
from torch import Tensor

from sparselearn.kernels.condensed.reference import unsigned


def activations(like: Tensor, features: int, by_feature: bool) -> Tensor:
    """New memory [T, features] for as many tokens, of the dtype and on the device of `like` [T, ·].

    By feature: rows of one feature, of a multiple of 16 tokens, follow each other; so that wide loads are aligned.

    >>> activations(torch.zeros(5, 3), 7, True).stride(), activations(torch.zeros(5, 3), 7, False).stride()
    ((1, 16), (7, 1))
    """
    tokens = like.shape[0]
    if by_feature:
        return like.new_empty((features, (tokens + 15) // 16 * 16))[:, :tokens].mT
    return like.new_empty((tokens, features))


def is_by_feature(x: Tensor) -> bool:
    """Whether x [T, I] lies in memory as the kernels like it: by feature, in rows of a multiple of 16 tokens."""
    return x.stride(0) == 1 and x.stride(1) % 16 == 0


def by_input(indices: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """The places g·K + k sorted by their input [G·K], and where each input starts [I + 1]; int32.

    >>> by_input(torch.tensor([[0, 2], [1, 2]]), 4)
    (tensor([0, 2, 1, 3], dtype=torch.int32), tensor([0, 1, 2, 4, 4], dtype=torch.int32))
    """
    inputs, order = unsigned(indices).flatten().sort(stable=True)
    bounds = torch.arange(in_features + 1, device=indices.device)
    return order.int(), torch.searchsorted(inputs, bounds, out_int32=True)
