"""Modules to compare `CondensedLinear` with: any mask as a CSR matrix, or as a dense weight and a mask."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearn.errors import SparsityError
from sparselearn.modules.base import SparseModule, apply_product, copied, masked_weight


class CsrLinear(SparseModule):
    """A linear layer with any mask, as a CSR matrix with 32-bit indices (which MKL multiplies 2.5 to 4 times faster
    than the 64-bit ones that `Tensor.to_sparse_csr` makes).

    Takes x [..., I] and returns [..., N]; values, bias and x get gradients. bfloat16 and float16 by conversion.

    >>> layer, mask = nn.Linear(4, 2), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool()
    >>> layer.weight.data.masked_fill_(~mask, 0).shape
    torch.Size([2, 4])
    >>> CsrLinear.from_dense(layer, mask)
    CsrLinear(in_features=4, out_features=2, nnz=3, bias=True)
    """

    replaces = nn.Linear
    values: nn.Parameter  # [nnz], row after row
    rows: Tensor  # [N + 1], int32: where each row begins
    columns: Tensor  # [nnz], int32, ascending in each row
    bias: nn.Parameter | None  # [N]

    def __init__(self, values: nn.Parameter, rows: Tensor, columns: Tensor, bias: nn.Parameter | None,
                 in_features: int) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, len(rows) - 1
        self._check(rows, columns, values)
        self.values = values
        self.bias = bias
        self.register_buffer("rows", rows.int())
        self.register_buffer("columns", columns.int())

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor) -> Self:
        """From an `nn.Linear` and any mask [N, I]."""
        weight, mask = masked_weight(layer, mask, nn.Linear)
        layer = cast(nn.Linear, layer)
        rows = F.pad(mask.sum(1).cumsum(0), (1, 0))
        parameter = nn.Parameter(weight[mask], layer.weight.requires_grad)
        made = cls(parameter, rows, mask.nonzero()[:, 1], copied(layer.bias), layer.in_features)
        return made.train(layer.training)

    def to_dense(self) -> tuple[nn.Linear, Tensor]:
        counts = self.rows.diff().long()
        owner = torch.repeat_interleave(torch.arange(self.out_features, device=counts.device), counts)
        weight = self.values.new_zeros(self.out_features, self.in_features)
        weight[owner, self.columns] = self.values.detach()
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[owner, self.columns] = True
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, self.values.requires_grad)
        layer.bias = copied(self.bias)  # type: ignore[assignment]
        return layer.train(self.training), mask

    @property
    def nnz(self) -> int:
        return self.values.numel()

    def _check(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """The product reads memory where the indices point, so what comes from outside is looked at first."""
        size = (self.out_features, self.in_features)
        _accept_beta()
        try:
            torch.sparse_csr_tensor(rows, columns, values.detach(), size, check_invariants=True)
        except RuntimeError as error:
            raise SparsityError(
                f"rows, columns and values are no CSR matrix {list(size)}: {error}. Build the layer with `from_dense`."
            ) from error

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = [state_dict.get(prefix + name) for name in ("rows", "columns", "values")]
        if all(isinstance(tensor, Tensor) for tensor in saved) and saved[0].shape == self.rows.shape:  # type: ignore[union-attr]
            self._check(*saved)  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise SparsityError(f"`CsrLinear` has {self.in_features} inputs; it got a tensor of shape {list(x.shape)}.")
        y_BN = apply_product(self._product, x.reshape(-1, self.in_features), self.values, self.bias)
        return y_BN.reshape(*x.shape[:-1], self.out_features)

    def _product(self, x_BI: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        _accept_beta()
        dtype = torch.float64 if x_BI.dtype == torch.float64 else torch.float32  # MKL knows no others
        size = (self.out_features, self.in_features)
        matrix = torch.sparse_csr_tensor(self.rows, self.columns, values.to(dtype), size, check_invariants=False)
        x = x_BI.to(dtype)
        y_BN = (matrix @ x[0]).unsqueeze(0) if len(x) == 1 and not torch.is_grad_enabled() else (matrix @ x.T).T
        return y_BN.to(x_BI.dtype) if bias is None else y_BN.to(x_BI.dtype) + bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nnz={self.nnz}, "
            f"bias={self.bias is not None}"
        )


@functools.cache
def _accept_beta() -> None:
    """torch says once per process that CSR is in beta; say it to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


class MaskedDenseLinear(SparseModule):
    """A linear layer that multiplies its dense weight by its mask at every call: the baseline that is never faster."""

    replaces = nn.Linear
    weight: nn.Parameter  # [N, I]
    mask: Tensor  # [N, I], bool
    bias: nn.Parameter | None  # [N]

    def __init__(self, weight: nn.Parameter, mask: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.register_buffer("mask", mask)

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor) -> Self:
        """From an `nn.Linear` and any mask [N, I]."""
        weight, mask = masked_weight(layer, mask, nn.Linear)
        layer = cast(nn.Linear, layer)
        parameter = nn.Parameter(weight.clone(), layer.weight.requires_grad)
        return cls(parameter, mask.clone(), copied(layer.bias)).train(layer.training)

    def to_dense(self) -> tuple[nn.Linear, Tensor]:
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight.detach().masked_fill(~self.mask, 0), self.weight.requires_grad)
        layer.bias = copied(self.bias)  # type: ignore[assignment]
        return layer.train(self.training), self.mask.clone()

    @property
    def nnz(self) -> int:
        return int(self.mask.sum())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, nnz={self.nnz}, bias={self.bias is not None}"
