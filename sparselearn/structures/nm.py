"""N:M patterns: n of every m consecutive weights, alone and below a coarser choice."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.structures.base import (
    FixedCount,
    highest,
    kernel_first,
    kernel_last,
    require,
    require_multiple,
    tiled,
    untiled,
)


def _check_pattern(who: object, n: int, m: int) -> None:
    if not 0 < n <= m:
        raise SparsityError(f"`{who}` keeps n of every m weights and needs 0 < n <= m.")


@dataclass(frozen=True)
class NM(FixedCount):
    """n of every m consecutive weights along `dim` are active (arXiv 2102.04010; 2:4 is NVIDIA's).

    Args:
        n, m: how many weights are *kept* (several research codes prune n) of every m.
        dim: 1, the input, which is the reduction axis of a Linear or Conv forward; 0 that of its backward. The groups
            of a convolution run over channels at each kernel position, so that channels-last memory holds them in one
            piece. A transposed convolution has its input in dimension 0.
        remainder: where `dim` is no multiple of m: "error"; "dense" keeps the size % m last positions active;
            "padded" keeps n of them, as if zeros that are never active followed (all of them where there are fewer).

    Differs: SR-STE's code reshapes a channels-last convolution flat, so that groups of a 3-channel stem straddle kernel
    positions.

    >>> NM(2, 4).topk(torch.tensor([[1.0, 4.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0]]), nnz=4).int()
    tensor([[0, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.int32)
    """

    n: int
    m: int
    dim: int = 1
    remainder: Literal["error", "dense", "padded"] = "error"

    def __post_init__(self) -> None:
        _check_pattern(self, self.n, self.m)
        if self.remainder not in ("error", "dense", "padded"):
            raise SparsityError(f"`remainder` must be 'error', 'dense' or 'padded'; got {self.remainder!r}.")

    def __str__(self) -> str:
        return f"NM({self.n}, {self.m})"

    def _split(self, shape: torch.Size) -> tuple[int, int, int]:
        """Of one line along `dim`: its groups of m, the positions that remain, and the active ones among those."""
        if not -len(shape) <= self.dim < len(shape):
            raise SparsityError(f"`{self}` runs along dimension {self.dim}; a weight of shape {list(shape)} has none.")
        if self.remainder == "error":
            advice = "choose another m, or set `remainder=`"
            require_multiple(self, shape, self.dim % len(shape), self.m, advice)
        groups, rest = divmod(shape[self.dim], self.m)
        return groups, rest, rest if self.remainder == "dense" else min(self.n, rest)

    def _count(self, shape: torch.Size) -> int:
        groups, _, rest_active = self._split(shape)
        return shape.numel() // shape[self.dim] * (groups * self.n + rest_active)

    def _parts(self, weight: Tensor) -> list[tuple[Tensor, int]]:
        """(groups [..., groups, m], n) and, if something remains, (it [..., rest], how many of it)."""
        groups, rest, rest_active = self._split(weight.shape)
        line = weight.movedim(self.dim, -1)
        if not rest:
            return [(line.unflatten(-1, (groups, self.m)), self.n)]
        whole, tail = line.split([groups * self.m, rest], -1)
        return [(whole.unflatten(-1, (groups, self.m)), self.n), (tail, rest_active)]

    def _choose(self, score: Tensor, keep: Tensor | None) -> Tensor:
        parts, masks = self._parts(score), []
        kept = [None] * len(parts) if keep is None else [part for part, _ in self._parts(keep)]
        for (group, n), keep_group in zip(parts, kept, strict=True):
            require(self, group, n, "group")
            mask = highest(group, n, keep_group) if group.numel() else torch.zeros_like(group, dtype=torch.bool)
            masks.append(mask.reshape(*score.movedim(self.dim, -1).shape[:-1], -1))
        mask = (torch.cat(masks, -1) if len(masks) > 1 else masks[0]).movedim(-1, self.dim)
        return mask if mask.stride() == score.stride() else mask.contiguous()

    def _wrong(self, mask: Tensor) -> str | None:
        if all(bool((group.sum(-1) == n).all()) for group, n in self._parts(mask)):
            return None
        return f"{self.n} active weights in every group of {self.m} along dimension {self.dim}"


@dataclass(frozen=True)
class HierarchicalNM(FixedCount):
    """Of every M blocks of m consecutive inputs N are kept, and n of the m weights of each kept block.

    The two-rank hierarchical structured sparsity C1(N:M)→C0(n:m) of HighLight (arXiv 2305.12718): density N/M·n/m.
    As there, the lower rank goes first: a block is worth its n best weights, and this choice is optimal. The groups of
    a convolution run over input channels at each kernel position.

    With `keep`, blocks that hold kept weights rank before the others, among themselves by these weights.

    >>> HierarchicalNM(outer=(1, 2), inner=(1, 2)).topk(torch.tensor([[3.0, 0.0, 2.0, 2.0]]), nnz=1).int()
    tensor([[1, 0, 0, 0]], dtype=torch.int32)
    """

    outer: tuple[int, int]
    inner: tuple[int, int]

    def __post_init__(self) -> None:
        _check_pattern(self, *self.outer)
        _check_pattern(self, *self.inner)

    def __str__(self) -> str:
        return f"HierarchicalNM({self.outer}, {self.inner})"

    def _count(self, shape: torch.Size) -> int:
        size = self.outer[1] * self.inner[1]
        require_multiple(self, shape, 1, size, "choose another pattern")
        return shape.numel() // size * self.outer[0] * self.inner[0]

    def _blocks(self, weight: Tensor) -> Tensor:
        """[out, in, *kernel] -> [kernel positions, out, groups, M, m]"""
        blocks: Tensor = kernel_first(weight).unflatten(-1, (-1, self.outer[1], self.inner[1]))
        return blocks

    def _choose(self, score: Tensor, keep: Tensor | None) -> Tensor:
        blocks = self._blocks(score)
        kept = torch.zeros_like(blocks, dtype=torch.bool) if keep is None else self._blocks(keep)
        n_blocks, n = self.outer[0], self.inner[0]
        best = highest(blocks, n, None if keep is None else kept)
        holds_kept = (best & kept & (blocks > -torch.inf)).any(-1)
        counted = best & (kept | ~holds_kept.unsqueeze(-1))
        worth = blocks.double().masked_fill(~counted, 0).sum(-1)
        worth.masked_fill_((blocks > -torch.inf).sum(-1) < n, -torch.inf)
        require(self, worth, n_blocks, "group", f"blocks with {n} weights")
        chosen = highest(worth, n_blocks, holds_kept)
        return kernel_last((best & chosen.unsqueeze(-1)).flatten(-3), score.shape).contiguous()

    def _wrong(self, mask: Tensor) -> str | None:
        (n_blocks, m_blocks), (n, m) = self.outer, self.inner
        counts = self._blocks(mask).sum(-1)
        if bool(((counts == 0) | (counts == n)).all() and ((counts > 0).sum(-1) == n_blocks).all()):
            return None
        return f"{n_blocks} active blocks of every {m_blocks}, and {n} active weights in every active block of {m}"


@dataclass(frozen=True)
class VNM(FixedCount):
    """V:N:M: every v×m block (v outputs, m inputs) keeps 4 columns for all of its rows, and n of the 4 in each row.

    Density n/m on hardware that only knows n:4 (VENOM, arXiv 2310.02065; `VNM(64, 2, 8)` is 64:2:8). Blocks of a
    convolution run over output and input channels at each kernel position.

    The columns kept are those of the highest score summed over the v rows; those where fewer rows may choose a weight
    come after. With `keep`, columns that hold kept weights rank first, among themselves by these weights: a method
    that drops and grows moves a column once all of its weights have been dropped.

    Differs: VENOM's code tries every choice of 4 columns and sums what n:4 then keeps.
    """

    v: int
    n: int
    m: int

    def __post_init__(self) -> None:
        if self.v < 1 or not 0 < self.n <= 4 <= self.m:
            raise SparsityError(f"`{self}` keeps n of 4 columns of every m and needs v >= 1 and 0 < n <= 4 <= m.")

    def __str__(self) -> str:
        return f"VNM({self.v}, {self.n}, {self.m})"

    def _count(self, shape: torch.Size) -> int:
        require_multiple(self, shape, 0, self.v, "choose another v")
        require_multiple(self, shape, 1, self.m, "choose another m")
        return shape.numel() // self.m * self.n

    def _choose(self, score: Tensor, keep: Tensor | None) -> Tensor:
        blocks = tiled(score, self.v, self.m)
        allowed = blocks > -torch.inf
        kept = torch.zeros_like(allowed) if keep is None else tiled(keep, self.v, self.m) & allowed
        holds_kept = kept.any(-2)
        counted = allowed & (kept | ~holds_kept.unsqueeze(-2))
        worth = blocks.double().masked_fill(~counted, 0).sum(-2)
        rank = allowed.sum(-2).masked_fill(holds_kept, self.v + 1)  # kept, then the most rows, then the highest sum
        order = worth.sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, rank.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
        columns = torch.zeros_like(holds_kept).scatter(-1, order[..., :4], True).unsqueeze(-2)
        inside = blocks.masked_fill(~columns, -torch.inf)
        require(self, inside, self.n, "row of a block")
        mask = highest(inside, self.n, None if keep is None else kept & columns)
        return untiled(mask, score.shape)

    def _wrong(self, mask: Tensor) -> str | None:
        blocks = tiled(mask, self.v, self.m)
        if bool((blocks.sum(-1) == self.n).all() and (blocks.any(-2).sum(-1) <= 4).all()):
            return None
        return f"{self.n} active weights in every row of its blocks of {self.v}x{self.m}, in 4 columns at most"
