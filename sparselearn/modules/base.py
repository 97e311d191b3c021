"""What sparse modules share: how they are built from a dense layer and a mask, and taken back to them."""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from sparselearn.errors import SparsityError


class SparseModule(nn.Module):
    """A module that takes the place of a dense layer and holds its masked weight in another form.

    `from_dense` reads the MASK, never `weight != 0`: a weight that was just grown is zero and stays active.
    `from_dense` followed by `to_dense` gives back weight, bias and mask bit for bit.
    """

    replaces: ClassVar[type[nn.Module]]  # the dense layer
    way: str | None = None  # how to compute on a GPU, where there are several ways; None: the fastest measured

    @classmethod
    @abstractmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor) -> Self:
        """The module with the layer's active weights, on its device, in its dtype and training mode.

        Raises:
            SparsityError: the mask has another shape or type than the weight, hides weights that are not zero, or
                is not of the pattern that this module holds.
        """

    @abstractmethod
    def to_dense(self) -> tuple[nn.Module, Tensor]:
        """The dense layer, with zeros where the mask is False, and the mask (bool, like the weight)."""

    def measure(self, tokens: int) -> None:
        """Find out which way is the fastest for so many rows of input, where there are several."""

    @property
    @abstractmethod
    def nnz(self) -> int:
        """Active weights, those that happen to be zero included."""


def masked_weight(layer: nn.Module, mask: Tensor, kind: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """The layer's weight and the mask, checked, as two matrices [out, fan-in]."""
    if not isinstance(layer, kind):
        raise SparsityError(f"This module is built from a {kind.__name__}; got a {type(layer).__name__}.")
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise SparsityError(
            f"The mask must be bool and have the weight's shape {list(weight.shape)}, True = active; it is "
            f"{mask.dtype} of shape {list(mask.shape)}. Take it from `Sparsifier.masks`."
        )
    mask = mask.to(weight.device)
    hidden = int((weight.masked_fill(mask, 0) != 0).sum())
    if hidden:
        raise SparsityError(
            f"{hidden} weights outside the mask (shape {list(mask.shape)}) are not zero and would be lost. Zero them "
            "first, with `Sparsifier.apply_masks()` or `weight.data.masked_fill_(~mask, 0)`."
        )
    return weight.flatten(1), mask.flatten(1)


def copied(parameter: Tensor | None) -> nn.Parameter | None:
    """A parameter of its own with the same numbers, or None."""
    return None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def apply_product(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, values: Tensor, bias: Tensor | None
) -> Tensor:
    """`product(x, values, bias)` in the dtype that a dense layer would use: theirs, or that of autocast."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return product(x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype))
    if x.dtype != values.dtype:
        raise SparsityError(
            f"The sparse layer holds {values.dtype} and got an input of {x.dtype}. Convert one of them with `.to()`."
        )
    return product(x, values, bias)
