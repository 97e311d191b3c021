"""Constant fan-in: every active neuron has the same number of weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.structures.base import Structure, check_total, count, highest, require


def rows(weight: Tensor) -> Tensor:
    """[out, in, *kernel] -> [out, in·kernel]: one row for each neuron, or filter of a convolution."""
    return weight.reshape(weight.shape[0], -1)


@dataclass(frozen=True)
class ConstantFanIn(Structure):
    """Every active neuron, a row of [out, in·kernel], has exactly K weights; ablated neurons have none.

    SRigL's structure (arXiv 2305.02299). A density means K = ⌊nnz/out⌋ for every neuron, at least 1. `topk` takes rows
    whose scores are all `-inf` for ablated ones: they get none, and the others K = nnz/(active rows), which must be
    whole.

    Args:
        group: this many neighbouring neurons share the positions of their weights, chosen by the score summed over
            them; ablated neurons of a group take no part. Where `out` is no multiple the last group is smaller. With
            `keep`, positions kept by any neuron of a group rank first.
        balanced: groups begin with masks that use every input about as often; at random otherwise, where few groups
            leave many inputs unused. Neurons by themselves (group = 1) always begin at random.

    >>> score = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    >>> ConstantFanIn().topk(score, nnz=2).int()
    tensor([[0, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    >>> ConstantFanIn(group=2).topk(score, nnz=2).int()
    tensor([[0, 0, 1],
            [0, 0, 1]], dtype=torch.int32)
    """

    group: int = 1
    balanced: bool = True

    def __post_init__(self) -> None:
        if self.group < 1:
            raise SparsityError(f"`{self}` needs groups of at least one neuron.")

    def __str__(self) -> str:
        return "ConstantFanIn()" if self.group == 1 else f"ConstantFanIn({self.group})"

    def budget(self, shape: torch.Size, density: float) -> int:
        return max(count(1 - density, shape.numel()) // shape[0], 1) * shape[0]

    def unit(self, shape: torch.Size) -> int:
        return shape[0]

    def topk(self, score: Tensor, nnz: int, keep: Tensor | None = None) -> Tensor:
        matrix = rows(score)
        active = (matrix > -torch.inf).any(1)
        n_active = int(active.sum())
        fan_in, rest = divmod(nnz, max(n_active, 1))
        if rest or not n_active or fan_in > matrix.shape[1]:
            raise SparsityError(
                f"`{self}` gives every active neuron the same number of weights, {matrix.shape[1]} at most: nnz must "
                f"be a multiple of the {n_active} active neurons of {len(matrix)}; it is {nnz} (shape "
                f"{list(score.shape)}). Take nnz from `budget`, or a multiple of the rows that have a score."
            )
        mask = torch.zeros_like(matrix, dtype=torch.bool)
        if fan_in:
            worth = self._sums(matrix, active)
            candidates = self._any(active.unsqueeze(1)).squeeze(1)
            require(self, worth[candidates], fan_in, "active neuron" if self.group == 1 else "active group")
            kept = None if keep is None else self._any(rows(keep) & active.unsqueeze(1))[candidates]
            chosen = torch.zeros_like(worth, dtype=torch.bool)
            chosen[candidates] = highest(worth[candidates], fan_in, kept)
            mask = self._spread(chosen, len(matrix)) & active.unsqueeze(1)
        return mask.view(score.shape)

    def first(self, score: Tensor, nnz: int) -> Tensor:
        if self.group == 1 or not self.balanced:
            return self.topk(score, nnz)
        matrix = rows(score)
        worth = self._grouped(matrix)[:, 0].clone()  # of one neuron for its group; -inf stays
        uses = worth.new_zeros(worth.shape[1])
        fan_in = nnz // len(matrix)
        for i in range(len(worth)):  # deals out inputs like shuffled decks of cards: the least used first
            worth[i] -= uses
            uses += highest(worth[i], fan_in)
        return self.topk(self._spread(worth, len(matrix)).view(score.shape), nnz)

    def check(self, mask: Tensor, nnz: int) -> None:
        check_total(mask, nnz)
        matrix = rows(mask)
        counts = matrix.sum(1)
        fan_in = int(counts.max())
        uneven = (counts > 0) & (counts < fan_in)
        if bool(uneven.any()):
            row = int(uneven.int().argmax())
            raise SparsityError(
                f"A mask of `{self}` must have the same number of weights in every active row; row {row} has "
                f"{int(counts[row])}, row {int(counts.argmax())} has {fan_in}."
            )
        shared = self._spread(self._any(matrix), len(matrix))
        wrong = (matrix != shared).any(1) & (counts > 0)
        if bool(wrong.any()):
            raise SparsityError(
                f"A mask of `{self}` must have the same positions in all active rows of a group of {self.group}; row "
                f"{int(wrong.int().argmax())} has others than its neighbours."
            )

    def pool(self, score: Tensor) -> Tensor:
        if self.group == 1:
            return score
        matrix = rows(score)
        active = (matrix > -torch.inf).any(1)
        sizes = self._grouped(active.unsqueeze(1)).sum(1).clamp(min=1)  # [groups, 1]
        mean = (self._sums(matrix, active) / sizes).to(score.dtype)
        return self._spread(mean, len(matrix)).masked_fill(~active.unsqueeze(1), -torch.inf).view(score.shape)

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[out, n] -> [groups, group, n], the last group filled up with zeros."""
        missing = -len(matrix) % self.group
        grouped: Tensor = torch.nn.functional.pad(matrix, (0, 0, 0, missing)).unflatten(0, (-1, self.group))
        return grouped

    def _any(self, matrix: Tensor) -> Tensor:
        return matrix if self.group == 1 else self._grouped(matrix).any(1)

    def _sums(self, matrix: Tensor, active: Tensor) -> Tensor:
        """Scores [out, n] of active rows, summed over each group [groups, n]; `-inf` where one of them is.

        In float64 sums of float32 scores of like size have no rounding, whatever the order.
        """
        if self.group == 1:
            return matrix
        never = (matrix == -torch.inf) & active.unsqueeze(1)
        finite = matrix.double().masked_fill(matrix == -torch.inf, 0)
        return self._grouped(finite).sum(1).masked_fill(self._any(never), -torch.inf)

    def _spread(self, groups: Tensor, out: int) -> Tensor:
        """[groups, n] -> [out, n], every row with its group's values."""
        return groups if self.group == 1 else groups.repeat_interleave(self.group, 0)[:out]
