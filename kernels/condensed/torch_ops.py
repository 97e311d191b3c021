"""The products of a condensed layer on torch's own operators: for machines without numba, and for comparison.

`embedding_bag` (FBGEMM's compiled SIMD code) from 16 rows on, CSR with 32-bit indices (MKL) below. Both run on torch's
thread pool.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BAG_ROWS = 16  # embedding_bag pays from here on; measured, see README.md


class TorchOps:
    """Indices [N, K] and their transposed form, as torch's operators want them. Float32 in and out."""

    def __init__(self, indices: Tensor, in_features: int) -> None:
        """`indices` is int64 and was checked."""
        self.neurons, self.fan_in = indices.shape
        self.in_features = in_features
        self.columns = indices.int().flatten()
        self.starts = torch.arange(0, self.columns.numel() + 1, self.fan_in, dtype=torch.int32)

    @functools.cached_property
    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order that sorts the weights by input [N·K], where each input starts [I + 1], their neurons [N·K]."""
        ordered, order = self.columns.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(self.in_features + 1, dtype=torch.int32))
        return order, starts.int(), (order // self.fan_in).int()

    @functools.cached_property
    def _bags(self) -> Tensor:
        """The neuron of each weight [N·K]."""
        return torch.arange(self.neurons, dtype=torch.int32).repeat_interleave(self.fan_in)

    def linear(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, I] -> [B, N], stored by feature."""
        y_NB = _product(self.starts, self.columns, values.flatten(), x.T, self.neurons)
        return y_NB.T if bias is None else y_NB.T + bias

    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad [B, N], x [B, I] -> [N, K]"""
        sampled = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad.T.contiguous(), x.T.contiguous(), self.columns, self.starts[:-1], self._bags, 0, -1
        )
        return sampled.view(self.neurons, self.fan_in)  # type: ignore[no-any-return]

    def grad_input(self, grad: Tensor, values: Tensor) -> Tensor:
        """grad [B, N] -> [B, I], stored by feature."""
        order, starts, neurons = self._transposed
        return _product(starts, neurons, values.flatten()[order], grad.T, self.in_features).T


def _product(starts: Tensor, columns: Tensor, values: Tensor, xT: Tensor, rows: int) -> Tensor:
    """A sparse matrix [R, C], given by rows, times xT [C, B]."""
    if xT.shape[1] >= MIN_BAG_ROWS:
        return F.embedding_bag(columns, xT.contiguous(), starts[:-1], per_sample_weights=values, mode="sum")
    _silence_beta_warning()
    shape = (rows, len(xT))
    matrix = torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
    if xT.shape[1] == 1:  # the matrix-vector call of MKL is twice as fast as its matrix-matrix call
        return (matrix @ xT[:, 0])[:, None]
    return matrix @ xT


@functools.cache
def _silence_beta_warning() -> None:
    """torch says once that CSR is in beta; users of this layer did not choose CSR."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()
