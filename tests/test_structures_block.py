"""Blocks: worked tables, a loop over blocks as second implementation, keep, pooling, messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselearn import Sparsifier, SparsityError, static
from sparselearn.distributions import budgets, uniform
from sparselearn.structures import Block, Unstructured, top_indices

quick = settings(max_examples=50, deadline=None, derandomize=True)
VALUES = torch.tensor([-1.0, -0.0, 0.0, 0.5, 2.0, 2.0, math.inf])


def loop_block(structure, score, n_blocks, keep):
    """Whole blocks by (holds kept weights, sum over these or all, kernel position, row, column); None if too few."""
    h, w = structure.h, structure.w
    flat = score.reshape(*score.shape[:2], -1)
    kept = torch.zeros_like(flat, dtype=torch.bool) if keep is None else keep.reshape(flat.shape)
    ranked = []
    for p in range(flat.shape[2]):
        for top in range(0, flat.shape[0], h):
            for left in range(0, flat.shape[1], w):
                cells = [(i, j, p) for i in range(top, top + h) for j in range(left, left + w)]
                values = [float(flat[c]) for c in cells]
                held = [float(flat[c]) for c in cells if kept[c]]
                if min(values) > -math.inf:
                    ranked.append((not held, -sum(held or values), cells))
    if len(ranked) < n_blocks:
        return None
    mask = torch.zeros_like(kept)
    for *_, cells in sorted(ranked)[:n_blocks]:
        for cell in cells:
            mask[cell] = True
    return mask.view(score.shape)


@quick
@given(
    st.sampled_from([(1, 1), (2, 2), (1, 4), (4, 1), (3, 2)]),
    st.sampled_from([(), (3,), (2, 2)]),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.05]),
)
def test_block_is_the_loop_over_blocks(size, kernel, seed, tied, with_keep, never):
    g = torch.Generator().manual_seed(seed)
    structure = Block(*size)
    shape = torch.Size([2 * size[0], 3 * size[1], *kernel])
    score = torch.randn(shape, generator=g)
    if tied:
        score = VALUES[torch.randint(len(VALUES), shape, generator=g)]
    score[torch.rand(shape, generator=g) < never] = -math.inf
    keep = torch.rand(shape, generator=g) < 0.15 if with_keep else None
    area = structure.unit(shape)
    for n_blocks in (0, 1, 3, shape.numel() // area):
        expected = loop_block(structure, score, n_blocks, keep)
        if expected is None:
            with pytest.raises(SparsityError, match="that may be chosen"):
                structure.topk(score, n_blocks * area, keep)
            continue
        mask = structure.topk(score, n_blocks * area, keep)
        assert torch.equal(mask, expected)
        structure.check(mask, n_blocks * area)
        strided = score.transpose(0, -1).contiguous().transpose(0, -1)
        assert torch.equal(structure.topk(strided, n_blocks * area, keep), mask)


@quick
@given(st.integers(0, 2**31), st.integers(0, 24), st.booleans())
def test_blocks_of_one_weight_are_unstructured(seed, nnz, with_keep):
    g = torch.Generator().manual_seed(seed)
    score = VALUES[torch.randint(len(VALUES), (4, 6), generator=g)]
    keep = torch.rand(4, 6, generator=g) < 0.3 if with_keep else None
    assert torch.equal(Block(1, 1).topk(score, nnz, keep), Unstructured().topk(score, nnz, keep))


def test_by_hand():
    score = torch.tensor([[9.0, 0.0, 3.0, 3.0], [0.0, 0.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert Block(2, 2).topk(score, 8).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert Block(2, 2).topk(score, 4).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert Block(4, 1).topk(score, 4)[0].tolist() == [True, False, False, False]
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[2, 0] = keep[3, 1] = keep[2, 2] = True  # kept sums 2 and 1, over 9 and 12
    assert Block(2, 2).topk(score, 4, keep).int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    forbidden = score.clone()
    forbidden[0, 2] = -math.inf
    assert Block(2, 2).topk(forbidden, 4).int().tolist()[0] == [1, 1, 0, 0]


def test_the_order_of_summation_makes_no_ties():
    values = torch.tensor([0.1, 0.2, 0.3, 0.7])
    score = torch.stack([values[p] for p in torch.tensor([[3, 2, 1, 0], [0, 1, 2, 3], [1, 3, 0, 2]])])
    for first in range(3):
        assert Block(1, 4).topk(score.roll(first, 0), 4)[0].all()


def test_budget_and_unit():
    shape = torch.Size([8, 12])
    assert Block(2, 4).unit(shape) == 8
    assert [Block(2, 4).budget(shape, d) for d in (1.0, 0.5, 0.25, 0.01)] == [96, 48, 24, 8]
    shapes = {"a": torch.Size([16, 16]), "b": torch.Size([32, 16, 3])}
    nnz = budgets(Block(4, 4), shapes, uniform(shapes, 0.3))
    assert all(n % 16 == 0 for n in nnz.values())
    assert abs(sum(nnz.values()) - 0.3 * (256 + 1536)) < 16


def test_pool_gives_the_mean_of_a_block():
    score = torch.arange(16.0).view(4, 4)
    pooled = Block(2, 2).pool(score)
    assert pooled.tolist()[0] == [2.5, 2.5, 4.5, 4.5]
    assert pooled.tolist()[3] == [10.5, 10.5, 12.5, 12.5]
    score[0, 0] = -math.inf
    assert Block(2, 2).pool(score)[:2, :2].tolist() == [[-math.inf] * 2] * 2
    conv = torch.randn(4, 6, 3, 3)
    for y in range(3):
        for x in range(3):
            torch.testing.assert_close(Block(2, 3).pool(conv)[..., y, x], Block(2, 3).pool(conv[..., y, x]))


def test_pooled_scores_let_blocks_move():
    """Kept weights chosen one by one hold on to every block; by pooled scores whole blocks are dropped."""
    torch.manual_seed(0)
    structure, shape = Block(4, 4), torch.Size([32, 32])
    mask = structure.topk(torch.rand(shape), 256)
    drop, grow = torch.rand(shape), torch.rand(shape)

    def moved(drop, grow):
        keep = top_indices(drop.masked_fill(~mask, -math.inf).flatten(), 192).view(shape)
        new = structure.topk(torch.where(keep, drop, grow), 256, keep)
        return int((new & ~mask).sum())

    grow[mask] = 0  # so that no dropped block returns
    assert moved(structure.pool(drop), structure.pool(grow)) == 64
    assert moved(drop, grow) == 0


def test_a_layer_of_the_sparsifier():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Flatten(), torch.nn.Linear(64, 8))
    sparsifier = Sparsifier(model, static(structure=Block(4, 4)), sparsity=0.75)
    for mask in sparsifier.masks.values():
        Block(4, 4).check(mask, int(mask.sum()))
    assert abs(sparsifier.sparsity - 0.75) < 16 / (16 * 72 + 512)


def test_messages():
    def raises(call, *args):
        with pytest.raises(SparsityError) as error:
            call(*args)
        return str(error.value)

    assert raises(Block(4, 4).budget, torch.Size([6, 8]), 0.5) == (
        "`Block(4, 4)` needs the fan-out to be a multiple of 4; it is 6 (shape [6, 8]). Exclude this layer with "
        "`exclude=`, or choose another h."
    )
    assert "number of input channels to be a multiple of 4; it is 3" in raises(
        Block(4, 4).topk, torch.zeros(8, 3, 3, 3), 16
    )
    too_few = torch.zeros(4, 4)
    too_few[0, 0] = -math.inf
    for nnz in (5, 16):
        assert raises(Block(2, 2).topk, too_few, nnz) == (
            f"`Block(2, 2)` was asked for {nnz} weights of a layer of shape [4, 4]; that must be a multiple of 4, and "
            "at most the 3 blocks that may be chosen. Lower the density, or widen the support."
        )
    partly = torch.tensor([[True, True, True, False], [True, True, False, False]])
    assert raises(Block(2, 2).check, partly, 5) == (
        "A mask of `Block(2, 2)` must have whole blocks; 1 of 2 are partly so."
    )
    assert raises(Block(2, 2).check, partly, 4) == "A mask must have 4 active weights; it has 5."
    assert raises(Block, 0, 4) == "`Block(0, 4)` needs blocks of at least one row and one column."
