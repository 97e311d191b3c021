"""Transposable N:M: a mask that is N:M along the input, and along the output for the backward pass."""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import torch
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.structures.base import FixedCount, require_multiple, tiled, untiled


@dataclass(frozen=True)
class TransposableNM(FixedCount):
    """Every m×m tile of outputs × inputs has n active weights in each row and in each column (arXiv 2102.08124).

    Both W and its transpose are then N:M. Tiles of a convolution run over output and input channels at each kernel
    position. The paper maximises the sum of scores in each tile. Up to m = 4 all masks of a tile (90 for 2:4) are
    compared. Above, the paper's greedy 2-approximation visits weights by falling score and adds those whose row and
    column have room; swaps then fill the rows and columns that it leaves short.

    Args:
        exact: improve the masks of tiles larger than 4 up to the optimum, by cycles of swaps with a gain. On random
            scores this is about 1 to 3 % more, in 4 to 40 times the time.

    `keep` and `-inf` come before the sum: a tile has the fewest weights of score `-inf` (an error where it cannot do
    without), then the most kept ones.

    Differs: the paper's greedy masks are left with up to n weights in a row, ours have exactly n; the optimum is found
    by cycle cancelling, not by a linear programme.

    >>> TransposableNM(1, 2).topk(torch.tensor([[5.0, 3.0], [4.0, 1.0]]), nnz=2).int()
    tensor([[0, 1],
            [1, 0]], dtype=torch.int32)
    """

    n: int
    m: int
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise SparsityError(f"`{self}` keeps n of every m weights and needs 0 < n <= m.")

    def __str__(self) -> str:
        return f"TransposableNM({self.n}, {self.m})"

    def _count(self, shape: torch.Size) -> int:
        require_multiple(self, shape, 0, self.m, "choose another m")
        require_multiple(self, shape, 1, self.m, "choose another m")
        return shape.numel() // self.m * self.n

    def _choose(self, score: Tensor, keep: Tensor | None) -> Tensor:
        grid = tiled(score, self.m, self.m)
        tiles = grid.flatten(0, 2)
        never = tiles == -math.inf
        kept = tiles == math.inf
        if keep is not None:
            kept = (kept | tiled(keep, self.m, self.m).flatten(0, 2)) & ~never
        worth = _worth(tiles, never, kept)
        if self.m <= 4:
            every = _all_masks(self.n, self.m).to(worth.device)
            best = (worth.flatten(1) @ every.double().flatten(1).T).argmax(1)
            mask = every[best]
        else:
            mask = _repair(_greedy(worth, self.n), worth, self.n)
            # A greedy choice may need a forbidden weight, or leave a kept one out, where another tile mask does not.
            unsettled = (mask & never).flatten(1).any(1) | (kept & ~mask).flatten(1).any(1)
            _improve(mask, worth, torch.ones_like(unsettled) if self.exact else unsettled)
        if bool((mask & never).any()):
            tile = int((mask & never).flatten(1).any(1).int().argmax())
            raise SparsityError(
                f"`{self}` needs {self.n} weights that may be chosen in every row and column of its tiles; tile {tile} "
                "has no such mask. Widen the support, or let dropped weights return."
            )
        return untiled(mask.view(grid.shape), score.shape)

    def _wrong(self, mask: Tensor) -> str | None:
        tiles = tiled(mask, self.m, self.m)
        if bool((tiles.sum(-1) == self.n).all() and (tiles.sum(-2) == self.n).all()):
            return None
        return f"{self.n} active weights in every row and column of its tiles of {self.m}x{self.m}"


@lru_cache(maxsize=8)
def _all_masks(n: int, m: int) -> Tensor:
    """Every m×m bool mask with n in each row and column, those of lower indices first: 90 for 2:4. [masks, m, m]"""
    lines = [[i in chosen for i in range(m)] for chosen in combinations(range(m), n)]
    masks = torch.tensor(list(product(lines, repeat=m)))
    return masks[(masks.sum(1) == n).all(1)]


def _worth(tiles: Tensor, never: Tensor, kept: Tensor) -> Tensor:
    """Scores as float64 in [-1, 1], exactly scaled, plus a step that no sum of scores outweighs for kept weights, and
    minus one that no number of kept weights outweighs for forbidden ones. [tiles, m, m]"""
    m = tiles.shape[-1]
    score = tiles.double().masked_fill(tiles.isinf(), 0)
    largest = score.abs().amax((1, 2), keepdim=True)
    score = torch.ldexp(score, -torch.frexp(largest).exponent)
    step = 4.0 * m * m
    return score.masked_fill_(tiles == math.inf, 1.0) + step * kept - 2 * m * m * step * never


def _greedy(worth: Tensor, n: int) -> Tensor:
    """By falling worth, add each weight whose row and column have fewer than n. [tiles, m, m]"""
    n_tiles, m, _ = worth.shape
    order = worth.flatten(1).sort(dim=1, descending=True, stable=True).indices
    mask = torch.zeros(n_tiles, m * m, dtype=torch.bool, device=worth.device)
    in_row = torch.zeros(n_tiles, m, dtype=torch.int32, device=worth.device)
    in_column = torch.zeros_like(in_row)
    for position in order.T.unsqueeze(2):  # [tiles, 1], one rank after the other
        row, column = position // m, position % m
        fits = (in_row.gather(1, row) < n) & (in_column.gather(1, column) < n)
        mask.scatter_(1, position, fits)
        in_row.scatter_add_(1, row, fits.int())
        in_column.scatter_add_(1, column, fits.int())
    return mask.view_as(worth)


def _repair(mask: Tensor, worth: Tensor, n: int) -> Tensor:
    """Fill short rows and columns of greedy masks: (i, j') and (i', j) join, (i', j') leaves, at the best gain.

    i and j are the first row and column that are short. Greedy leaves no two such unjoined, so that row i has room in
    more than m - n columns j', all full, and column j in as many rows i': some (i', j') of them is active, and the swap
    leaves that rule intact.
    """
    while True:
        short_rows, short_columns = mask.sum(2) < n, mask.sum(1) < n
        tiles = short_rows.any(1).nonzero().view(-1)
        if not tiles.numel():
            return mask
        i, j = short_rows[tiles].int().argmax(1), short_columns[tiles].int().argmax(1)
        row, column = mask[tiles, i], mask[tiles, :, j]
        gain = worth[tiles, i].unsqueeze(1) + worth[tiles, :, j].unsqueeze(2) - worth[tiles]  # [tiles, i', j']
        possible = mask[tiles] & ~row.unsqueeze(1) & ~column.unsqueeze(2)
        best = gain.masked_fill(~possible, -math.inf).flatten(1).argmax(1)
        i_other, j_other = best // worth.shape[2], best % worth.shape[2]
        mask[tiles, i, j_other] = True
        mask[tiles, i_other, j] = True
        mask[tiles, i_other, j_other] = False


def _improve(mask: Tensor, worth: Tensor, chosen: Tensor) -> None:
    """Bring the masks of the chosen tiles to the highest sum of worth, in place, by cycles of swaps with a gain.

    In the graph whose nodes are a tile's rows, the edge i' -> i is the column that row i' may give up to row i at the
    best gain. A cycle changes no row's or column's count, and a mask that no cycle improves is optimal (cycle
    cancelling in a min-cost flow). Each round finds one cycle in every tile by Bellman-Ford.
    """
    tiles = chosen.nonzero().view(-1)
    while tiles.numel():
        current, value = mask[tiles], worth[tiles]
        gain, column = _best_moves(current, value)
        node, before = _gaining_cycle(gain, value)
        found = node >= 0
        tiles, node, before, column = tiles[found], node[found], before[found], column[found]
        here = torch.arange(len(tiles), device=tiles.device)
        start, open_ = node, torch.ones_like(node, dtype=torch.bool)
        for _ in range(mask.shape[1]):  # walk the cycle backwards, once round
            giver = before[here, node]
            moved = column[here, giver, node]
            mask[tiles[open_], giver[open_], moved[open_]] = False
            mask[tiles[open_], node[open_], moved[open_]] = True
            node = giver
            open_ = open_ & (node != start)


def _best_moves(mask: Tensor, worth: Tensor) -> tuple[Tensor, Tensor]:
    """For rows (giver, taker) the highest gain of moving an active weight along its column, and the column.

    [tiles, m, m] each; the gain is `-inf` where no column can move.
    """
    best = torch.full_like(worth, -math.inf)
    column = torch.zeros_like(worth, dtype=torch.int64)
    for j in range(mask.shape[2]):
        at, active = worth[:, :, j], mask[:, :, j]
        gain = at.unsqueeze(1) - at.unsqueeze(2)
        gain.masked_fill_(~active.unsqueeze(2) | active.unsqueeze(1), -math.inf)
        better = gain > best
        best = torch.where(better, gain, best)
        column.masked_fill_(better, j)
    return best, column


def _gaining_cycle(gain: Tensor, worth: Tensor) -> tuple[Tensor, Tensor]:
    """A node on a cycle of positive gain for every tile, -1 where there is none; and each node's predecessor there.

    Gains below rounding (2^-44 of the largest worth) do not count.
    """
    n_tiles, m, _ = gain.shape
    rounding = worth.abs().amax((1, 2)).unsqueeze(1) * (m * 2.0**-44)
    length = torch.zeros(n_tiles, m, dtype=gain.dtype, device=gain.device)
    before = torch.full((n_tiles, m), -1, dtype=torch.int64, device=gain.device)
    for _ in range(m):  # a walk of m edges that still gets longer has been round a cycle
        longest, giver = (length.unsqueeze(2) + gain).max(1)
        longer = longest > length + rounding
        length = torch.where(longer, longest, length)
        before = torch.where(longer, giver, before)
    node = torch.where(longer.any(1), longer.int().argmax(1), -1)
    for _ in range(m):
        node = torch.where(node >= 0, before.gather(1, node.clamp(min=0).unsqueeze(1)).squeeze(1), -1)
    return node, before
