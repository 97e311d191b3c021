"""Structures: which masks are allowed, how many weights a density is, and the best mask for a score."""

import math
from typing import Protocol

import torch
from torch import Tensor

from sparselearn.errors import SparsityError


class Structure(Protocol):
    """A family of masks. Scores are higher = better, `-inf` = never."""

    def budget(self, shape: torch.Size, density: float) -> int:
        """The number of active weights (nnz) that this density means for a weight of this shape."""

    def unit(self, shape: torch.Size) -> int:
        """The least number of weights by which nnz can change; 0 where the structure fixes nnz."""

    def topk(self, score: Tensor, nnz: int, keep: Tensor | None = None) -> Tensor:
        """The allowed mask with exactly nnz active weights and the highest score.

        Weights of `keep` (bool) rank before all others, among themselves by score. Ties go to the lower flat
        index, so that equal scores give equal masks on every device. Raises `SparsityError` where fewer than
        nnz weights have a score above `-inf`.
        """

    def check(self, mask: Tensor, nnz: int) -> None:
        """Raises `SparsityError` where the mask is not of this structure or has another count."""


def count(sparsity: float, n: int) -> int:
    """nnz of n weights at this sparsity: n - floor(sparsity·n), RigL's rounding.

    The product is nudged by 1e-6 so that 0.9 of 1000 weights is 900 in floating point as on paper.
    """
    return n - math.floor(sparsity * n + 1e-6)


def top_indices(score: Tensor, k: int) -> Tensor:
    """Flat bool mask of the k highest of a flat score, lower index first among equals. O(n)."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    if k <= 0:
        return mask
    if k >= score.numel():
        return torch.ones_like(mask)
    threshold = torch.topk(score, k, sorted=False).values.min()
    mask = score > threshold
    missing = k - int(mask.sum())
    ties = (score == threshold).nonzero().view(-1)[:missing]
    mask[ties] = True
    return mask


class Unstructured:
    """Any mask: weights are chosen one by one within a layer."""

    def __repr__(self) -> str:
        return "Unstructured()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unstructured)

    def __hash__(self) -> int:
        return hash(type(self))

    def budget(self, shape: torch.Size, density: float) -> int:
        return count(1 - density, shape.numel())

    def unit(self, shape: torch.Size) -> int:
        return 1

    def topk(self, score: Tensor, nnz: int, keep: Tensor | None = None) -> Tensor:
        flat = score.reshape(-1)
        candidates = int((flat > -math.inf).sum())
        if nnz > candidates:
            raise SparsityError(
                f"`Unstructured` was asked for {nnz} weights of a layer of shape {list(score.shape)}, but only "
                f"{candidates} may be chosen. Lower the density, or widen the support."
            )
        if keep is None:
            return top_indices(flat, nnz).view(score.shape)
        kept = keep.reshape(-1) & (flat > -math.inf)
        n_kept = int(kept.sum())
        if n_kept >= nnz:
            return top_indices(flat.masked_fill(~kept, -math.inf), nnz).view(score.shape)
        rest = top_indices(flat.masked_fill(kept, -math.inf), nnz - n_kept)
        return (kept | rest).view(score.shape)

    def check(self, mask: Tensor, nnz: int) -> None:
        seen = int(mask.sum())
        if seen != nnz:
            raise SparsityError(f"A mask must have {nnz} active weights; it has {seen}.")
