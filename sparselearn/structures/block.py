"""Blocks: weights that are active together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.structures.base import (
    Structure,
    Unstructured,
    check_total,
    count,
    require_multiple,
    tiled,
    untiled,
)


@dataclass(frozen=True)
class Block(Structure):
    """Blocks of h outputs × w inputs are active as a whole, or not at all.

    The blocks of a convolution tile output and input channels at each kernel position, as the blocks of a Linear do:
    a channels-last convolution multiplies by such a matrix once for each position. The score of a block is the sum over
    its weights, and nnz is a multiple of h·w. A block with a weight that may never be active is never active.

    With `keep`, blocks that hold kept weights rank first, among themselves by the score of these weights.

    >>> score = torch.tensor([[9.0, 0.0, 3.0, 3.0], [0.0, 0.0, 3.0, 3.0]])
    >>> Block(2, 2).topk(score, nnz=4).int()
    tensor([[0, 0, 1, 1],
            [0, 0, 1, 1]], dtype=torch.int32)
    """

    h: int
    w: int

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1:
            raise SparsityError(f"`{self}` needs blocks of at least one row and one column.")

    def __str__(self) -> str:
        return f"Block({self.h}, {self.w})"

    def _check_shape(self, shape: torch.Size) -> None:
        require_multiple(self, shape, 0, self.h, "choose another h")
        require_multiple(self, shape, 1, self.w, "choose another w")

    def _expand(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """[kernel positions, block rows, block columns] -> [out, in, *kernel], every weight with its block's value."""
        return untiled(blocks[..., None, None].expand(*blocks.shape, self.h, self.w), shape)

    def budget(self, shape: torch.Size, density: float) -> int:
        self._check_shape(shape)
        size = self.h * self.w
        return count(1 - density, shape.numel() // size) * size

    def unit(self, shape: torch.Size) -> int:
        return self.h * self.w

    def topk(self, score: Tensor, nnz: int, keep: Tensor | None = None) -> Tensor:
        self._check_shape(score.shape)
        n_blocks, rest = divmod(nnz, self.h * self.w)
        blocks = tiled(score, self.h, self.w)
        worth = _total(blocks)
        candidates = int((worth > -torch.inf).sum())
        if rest or n_blocks > candidates:
            raise SparsityError(
                f"`{self}` was asked for {nnz} weights of a layer of shape {list(score.shape)}; that must be a "
                f"multiple of {self.h * self.w}, and at most the {candidates} blocks that may be chosen. Lower the "
                "density, or widen the support."
            )
        held = None
        if keep is not None:
            kept = tiled(keep, self.h, self.w)
            held = kept.flatten(-2).any(-1) & (worth > -torch.inf)
            worth = torch.where(held, _total(blocks.masked_fill(~kept, 0)), worth)
            held = held.movedim(0, -1)
        chosen = Unstructured().topk(worth.movedim(0, -1), n_blocks, held)  # in the order of the weights
        return self._expand(chosen.movedim(-1, 0), score.shape)

    def check(self, mask: Tensor, nnz: int) -> None:
        check_total(mask, nnz)
        self._check_shape(mask.shape)
        counts = tiled(mask, self.h, self.w).flatten(-2).sum(-1)
        if wrong := int(((counts > 0) & (counts < self.h * self.w)).sum()):
            raise SparsityError(
                f"A mask of `{self}` must have whole blocks; {wrong} of {counts.numel()} are partly so."
            )

    def pool(self, score: Tensor) -> Tensor:
        self._check_shape(score.shape)
        return self._expand((_total(tiled(score, self.h, self.w)) / (self.h * self.w)).to(score.dtype), score.shape)


def _total(blocks: Tensor) -> Tensor:
    """Sum over the last two dimensions; `-inf` where one of them is.

    In float64 sums of float32 scores of like size have no rounding: the order of summation makes no ties and no wins.
    """
    never = blocks == -torch.inf
    return blocks.double().masked_fill(never, 0).sum((-2, -1)).masked_fill(never.flatten(-2).any(-1), -torch.inf)
