"""What every structure offers, the unstructured one, and the ranking that all of them share."""

import math
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from sparselearn.checks import check
from sparselearn.errors import SparsityError
from sparselearn.kernels.select import LONGEST, highest_of_lines


class Structure(Protocol):
    """A family of masks. Scores are higher = better, `-inf` = never."""

    def budget(self, shape: torch.Size, density: float) -> int:
        """The number of active weights (nnz) that this density means for a weight of this shape.

        Raises `SparsityError` where the structure cannot hold for a weight of this shape.
        """

    def unit(self, shape: torch.Size) -> int:
        """The least number of weights by which nnz can change; 0 where the structure fixes nnz."""

    def topk(self, score: Tensor, nnz: int, keep: Tensor | None = None) -> Tensor:
        """The allowed mask with exactly nnz active weights and the highest score.

        Weights of `keep` (bool) rank before all others, among themselves by score. Ties go to the lower flat
        index, so that equal scores give equal masks on every device. Raises `SparsityError` where fewer than
        nnz weights have a score above `-inf`, or where those do not hold an allowed mask.
        """

    def check(self, mask: Tensor, nnz: int) -> None:
        """Raises `SparsityError` where the mask is not of this structure or has another count."""

    def pool(self, score: Tensor) -> Tensor:
        """The score, averaged over weights that can only come and go together (the weights of a block).

        A method that selects single weights before `topk` (those to keep, say) ranks them by the pooled score:
        otherwise every block keeps some weight, and none ever moves.
        """
        return score

    def first(self, score: Tensor, nnz: int) -> Tensor:
        """The mask with nnz active weights that training begins with, from random scores in [0, 1)."""
        return self.topk(score, nnz)


def count(sparsity: float, n: int) -> int:
    """nnz of n weights at this sparsity: n - floor(sparsity·n), RigL's rounding.

    The product is nudged by 1e-6 so that 0.9 of 1000 weights is 900 in floating point as on paper.
    """
    return n - math.floor(sparsity * n + 1e-6)


def top_indices(score: Tensor, k: int) -> Tensor:
    """Flat bool mask of the k highest of a flat score, lower index first among equals. O(n)."""
    if k <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if k >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    threshold = torch.topk(score, k, sorted=False).values.min()
    above, ties = score > threshold, score == threshold
    missing = k - above.sum(dtype=torch.int32)
    return above | ties & (ties.cumsum(0, dtype=torch.int32) <= missing)


def highest(score: Tensor, k: int, keep: Tensor | None = None) -> Tensor:
    """Bool mask of the k highest along the last dimension (1 <= k <= its size), in every line by itself.

    Weights of `keep` rank first, then higher scores, then lower indices. `-inf` is chosen only where a line has
    fewer than k other weights; see `require`.
    """
    if keep is not None:
        first = highest(score.masked_fill(~keep, -math.inf), k) & keep & (score > -math.inf)
        score = score.clamp(max=torch.finfo(score.dtype).max).masked_fill(first, math.inf)
    size = score.shape[-1]
    if (mask := highest_of_lines(score, k)) is not None:
        return mask
    if size <= LONGEST:  # millions of tiny lines: counting who is ahead is 2 (CPU) to 50 times (GPU) faster than topk
        place = score.movedim(-1, 0).contiguous()
        ahead = torch.zeros_like(place, dtype=torch.uint8)
        for i in range(1, size):
            wins = place[i] > place[:i]
            ahead[:i].add_(wins)
            ahead[i] = i - wins.sum(0, dtype=torch.uint8)
        return (ahead < k).movedim(0, -1)
    threshold = score.topk(k, dim=-1).values[..., -1:]
    above, ties = score > threshold, score == threshold
    missing = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | ties & (ties.cumsum(-1, dtype=torch.int32) <= missing)


def require(who: object, score: Tensor, k: int, group: str, what: str = "weights") -> None:
    """Raises `SparsityError` where a line of the last dimension has fewer than k scores above `-inf`."""
    if score.numel():
        check(score.min(), _is_never, partial(_count_candidates, who, score, k, group, what), score.nbytes)


def _is_never(score: float) -> bool:
    return not score > -math.inf


def _count_candidates(who: object, score: Tensor, k: int, group: str, what: str) -> None:
    candidates = (score > -math.inf).sum(-1).reshape(-1)
    if (fewest := int(candidates.min())) < k:
        raise SparsityError(
            f"`{who}` needs {k} {what} that may be chosen in every {group}; {group} {int(candidates.argmin())} has "
            f"{fewest}. Widen the support, or let dropped weights return."
        )


def kernel_first(weight: Tensor) -> Tensor:
    """[out, in, *kernel] -> [kernel positions, out, in]: one matrix for each kernel position."""
    return weight.flatten(2).movedim(2, 0) if weight.ndim > 2 else weight.unsqueeze(0)


def kernel_last(matrices: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `kernel_first`, for a weight of this shape."""
    return matrices.movedim(0, -1).reshape(shape)


def tiled(weight: Tensor, h: int, w: int) -> Tensor:
    """[out, in, *kernel] -> [kernel positions, tile rows, tile columns, h, w]; out and in are multiples of h and w."""
    tiles: Tensor = kernel_first(weight).unflatten(2, (-1, w)).unflatten(1, (-1, h))
    return tiles.movedim(2, 3)


def untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `tiled`."""
    return kernel_last(tiles.movedim(3, 2).flatten(3).flatten(1, 2), shape).contiguous()


def require_multiple(who: object, shape: torch.Size, dim: int, m: int, advice: str) -> None:
    """Raises `SparsityError` where the size of this dimension of a weight [out, in, *kernel] is no multiple of m."""
    size = shape[dim]
    if size % m:
        names = ("number of output channels", "number of input channels") if len(shape) > 2 else ("fan-out", "fan-in")
        what = names[dim] if dim < 2 else f"size of dimension {dim}"
        raise SparsityError(
            f"`{who}` needs the {what} to be a multiple of {m}; it is {size} (shape {list(shape)}). Exclude this "
            f"layer with `exclude=`, or {advice}."
        )


class FixedCount(Structure, Protocol):
    """A structure whose pattern alone says nnz: it ignores density, and `sparsity` may be left out."""

    def _count(self, shape: torch.Size) -> int:
        """The nnz of this shape. Raises `SparsityError` where the shape does not fit."""

    def _choose(self, score: Tensor, keep: Tensor | None) -> Tensor:
        """`topk` at this nnz."""

    def _wrong(self, mask: Tensor) -> str | None:
        """What is wrong with a mask of the right nnz, for the end of a message; None where it is allowed."""

    def budget(self, shape: torch.Size, density: float) -> int:
        return self._count(shape)

    def unit(self, shape: torch.Size) -> int:
        return 0

    def topk(self, score: Tensor, nnz: int, keep: Tensor | None = None) -> Tensor:
        if nnz != (fixed := self._count(score.shape)):
            raise SparsityError(
                f"`{self}` fixes {fixed} active weights for a layer of shape {list(score.shape)}; it was asked for "
                f"{nnz}. Leave the sparsity of this layer to the structure, or exclude the layer."
            )
        return self._choose(score, keep)

    def check(self, mask: Tensor, nnz: int) -> None:
        check_total(mask, nnz)
        if nnz != (fixed := self._count(mask.shape)):
            raise SparsityError(f"`{self}` fixes {fixed} active weights for shape {list(mask.shape)}; got {nnz}.")
        if wrong := self._wrong(mask):
            raise SparsityError(f"A mask of `{self}` must have {wrong}.")


def check_total(mask: Tensor, nnz: int) -> None:
    """Raises `SparsityError` where the mask has another count."""
    seen = int(mask.sum())
    if seen != nnz:
        raise SparsityError(f"A mask must have {nnz} active weights; it has {seen}.")


class Unstructured(Structure):
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
        allowed = flat > -math.inf
        kept = allowed if keep is None else allowed & keep.reshape(-1)
        candidates, n_kept = torch.stack([allowed.sum(), kept.sum()]).tolist()
        if nnz > candidates:
            raise SparsityError(
                f"`Unstructured` was asked for {nnz} weights of a layer of shape {list(score.shape)}, but only "
                f"{candidates} may be chosen. Lower the density, or widen the support."
            )
        if keep is None:
            return top_indices(flat, nnz).view(score.shape)
        if n_kept >= nnz:
            return top_indices(flat.masked_fill(~kept, -math.inf), nnz).view(score.shape)
        rest = top_indices(flat.masked_fill(kept, -math.inf), nnz - n_kept)
        return (kept | rest).view(score.shape)

    def check(self, mask: Tensor, nnz: int) -> None:
        check_total(mask, nnz)
