"""Transposable N:M: the 90 masks, greedy and repair, the optimum against other solvers, kept and forbidden weights."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselearn import Sparsifier, SparsityError, rigl
from sparselearn.structures import NM, TransposableNM
from sparselearn.structures.transposable import _all_masks, _greedy, _improve, _repair, _worth

quick = settings(max_examples=25, deadline=None, derandomize=True)
VALUES = torch.tensor([-1.0, -0.0, 0.0, 0.5, 2.0, 2.0])
# ALGORITHMS: the tile of which greedy keeps 7 weights
COUNTEREXAMPLE = torch.tensor([[3.0, 12, 4, 11], [1, 5, 8, 6], [15, 13, 7, 10], [14, 9, 2, 16]])


def every_mask(n, m):
    """All m×m masks with n in each row and column, from all choices of rows (no code of ours)."""
    lines = [np.isin(np.arange(m), chosen) for chosen in combinations(range(m), n)]
    masks = np.array(list(product(lines, repeat=m)))
    return torch.from_numpy(masks[(masks.sum(1) == n).all(1)])


def random_tiles(n_tiles, m, seed, tied=False):
    g = torch.Generator().manual_seed(seed)
    if tied:
        return VALUES[torch.randint(len(VALUES), (n_tiles, m, m), generator=g)]
    return torch.randn(n_tiles, m, m, generator=g)


def as_layer(tiles):
    """[tiles, m, m] -> [m, tiles·m], a Linear with one row of tiles."""
    return tiles.movedim(0, 1).flatten(1)


def both_ways(mask, n, m):
    nnz = mask.numel() // m * n
    NM(n, m, dim=1).check(mask, nnz)
    NM(n, m, dim=0).check(mask, nnz)
    TransposableNM(n, m).check(mask, nnz)


def test_there_are_90_masks_of_2_4():
    assert len(_all_masks(2, 4)) == 90
    assert {tuple(m.flatten().tolist()) for m in _all_masks(2, 4)} == {
        tuple(m.flatten().tolist()) for m in every_mask(2, 4)
    }
    assert [len(_all_masks(n, 4)) for n in (1, 3, 4)] == [24, 24, 1]
    assert [len(_all_masks(n, 3)) for n in (1, 2, 3)] == [6, 6, 1]
    numbers = [int("".join(str(int(b)) for b in m.flatten()), 2) for m in _all_masks(2, 4)]
    assert numbers == sorted(numbers, reverse=True)  # lower indices first: of equal masks the first wins


def loop_greedy(tile, n):
    m = len(tile)
    flat = tile.flatten().tolist()
    mask = torch.zeros(m, m, dtype=torch.bool)
    for position in sorted(range(m * m), key=lambda i: (-flat[i], i)):
        row, column = divmod(position, m)
        if mask[row].sum() < n and mask[:, column].sum() < n:
            mask[row, column] = True
    return mask


@quick
@given(st.sampled_from([(2, 4), (1, 4), (2, 5), (4, 8)]), st.integers(0, 2**31), st.booleans())
def test_greedy_is_the_loop(pattern, seed, tied):
    n, m = pattern
    tiles = random_tiles(6, m, seed, tied)
    assert torch.equal(_greedy(tiles.double(), n), torch.stack([loop_greedy(t, n) for t in tiles]))


def test_the_counterexample_of_greedy():
    tile = COUNTEREXAMPLE[None].double()
    greedy = _greedy(tile, 2)
    assert int(greedy.sum()) == 7
    repaired = _repair(greedy.clone(), tile, 2)
    both_ways(repaired[0], 2, 4)
    best = TransposableNM(2, 4).topk(COUNTEREXAMPLE, 8)
    both_ways(best, 2, 4)
    highest = max(float((COUNTEREXAMPLE * m).sum()) for m in every_mask(2, 4))
    assert float((COUNTEREXAMPLE * best).sum()) == highest
    assert float((tile * repaired).sum()) <= highest


def test_greedy_falls_short_in_about_one_tile_of_six():
    tiles = random_tiles(10_000, 4, 0).abs().double()
    greedy = _greedy(tiles, 2)
    short = greedy.flatten(1).sum(1) < 8
    assert 0.14 < short.double().mean() < 0.18
    exact = TransposableNM(2, 4).topk(as_layer(tiles).float(), 80_000).unflatten(1, (-1, 4)).movedim(1, 0)
    sums = [(tiles * m).flatten(1).sum(1) for m in (greedy, _repair(greedy.clone(), tiles, 2), exact)]
    assert bool((sums[2] >= sums[0] - 1e-12)[~short].all())  # fewer weights may add up to more
    assert bool((sums[2] >= sums[1] - 1e-12).all())
    assert 0.98 < float(sums[0].sum() / sums[2].sum()) < 0.99


def test_exact_is_at_least_greedy_on_large_tiles():
    tiles = random_tiles(10_000, 8, 1).abs()
    layer = as_layer(tiles)
    plain = TransposableNM(4, 8).topk(layer, 320_000)
    exact = TransposableNM(4, 8, exact=True).topk(layer, 320_000)
    both_ways(plain, 4, 8)
    both_ways(exact, 4, 8)
    sums = [(layer * m).unflatten(1, (-1, 8)).sum((0, 2), dtype=torch.float64) for m in (plain, exact)]
    assert bool((sums[1] >= sums[0] - 1e-6).all())
    assert float(sums[1].sum() / sums[0].sum()) > 1.007


@quick
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([(2, 5), (3, 5), (1, 5), (1, 6)]))
def test_exact_is_the_best_of_all_masks(seed, tied, pattern):
    n, m = pattern
    tiles = random_tiles(8, m, seed, tied)
    sums = tiles.double().flatten(1) @ every_mask(n, m).double().flatten(1).T
    mask = TransposableNM(n, m, exact=True).topk(as_layer(tiles), 8 * n * m)
    both_ways(mask, n, m)
    seen = (tiles * mask.unflatten(1, (-1, m)).movedim(1, 0)).double().sum((1, 2))
    torch.testing.assert_close(seen, sums.amax(1), rtol=0, atol=1e-6)


def test_exact_is_the_linear_programme_optimum():
    optimize = pytest.importorskip("scipy.optimize")
    n, m = 3, 8
    tiles = random_tiles(12, m, 5)
    mask = TransposableNM(n, m, exact=True).topk(as_layer(tiles), 12 * n * m).unflatten(1, (-1, m)).movedim(1, 0)
    sums = np.concatenate([np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))])
    for tile, chosen in zip(tiles.double(), mask, strict=True):
        found = optimize.linprog(-tile.flatten().numpy(), A_eq=sums, b_eq=np.full(2 * m, n), bounds=(0, 1))
        assert float((tile * chosen).sum()) == pytest.approx(-found.fun, abs=1e-9)


@quick
@given(
    st.sampled_from([(2, 4), (1, 3), (2, 5), (4, 8)]),
    st.booleans(),
    st.sampled_from([(), (2,), (1, 3)]),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_masks_are_valid_in_both_directions(pattern, exact, kernel, seed, tied):
    n, m = pattern
    g = torch.Generator().manual_seed(seed)
    shape = torch.Size([2 * m, m, *kernel])
    score = torch.randn(shape, generator=g)
    if tied:
        score = VALUES[torch.randint(len(VALUES), shape, generator=g)]
    structure = TransposableNM(n, m, exact)
    nnz = structure.budget(shape, 0.9)
    mask = structure.topk(score, nnz)
    both_ways(mask, n, m)
    assert torch.equal(structure.topk(score.clone(), nnz), mask)
    first = mask.reshape(2 * m, m, -1)[..., 0]  # every kernel position is a layer of its own
    assert torch.equal(structure.topk(score.reshape(2 * m, m, -1)[..., 0], first.numel() // m * n), first)
    kept = mask & (torch.rand(shape, generator=g) < 0.5)
    again = structure.topk(torch.randn(shape, generator=g), nnz, kept)
    both_ways(again, n, m)
    assert not bool((kept & ~again).any())  # what is part of an allowed mask stays, whatever the score


@quick
@given(st.integers(0, 2**31), st.floats(0.1, 0.7), st.sampled_from([(2, 4), (2, 5)]), st.booleans())
def test_forbidden_and_kept_come_before_the_sum(seed, share, pattern, exact):
    n, m = pattern
    g = torch.Generator().manual_seed(seed)
    score = torch.randn(m, m, generator=g)
    score[torch.rand(m, m, generator=g) < share] = -math.inf
    keep = torch.rand(m, m, generator=g) < 0.4
    masks = every_mask(n, m)
    allowed = masks[~(masks & (score == -math.inf)).flatten(1).any(1)]
    structure = TransposableNM(n, m, exact)
    if not len(allowed):
        with pytest.raises(SparsityError, match="tile 0 has no such mask"):
            structure.topk(score, n * m, keep)
        return
    mask = structure.topk(score, n * m, keep)
    both_ways(mask, n, m)
    assert bool((score[mask] > -math.inf).all())
    n_kept = (allowed & keep).flatten(1).sum(1)
    assert int((mask & keep).sum()) == int(n_kept.max())
    if exact or m <= 4:
        finite = score.masked_fill(score.isinf(), 0).double()
        best = (allowed[n_kept == n_kept.max()] * finite).sum((1, 2)).max()
        assert float((mask * finite).sum()) == pytest.approx(float(best), abs=1e-6)


def test_equal_scores_take_the_lower_indices():
    mask = TransposableNM(2, 4).topk(torch.zeros(4, 4), 8)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    large = TransposableNM(4, 8, exact=True).topk(torch.full((8, 8), 3.0), 32)
    assert torch.equal(large, torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool())


def test_infinite_scores_are_kept():
    score = torch.randn(8, 8)
    score[0, 3] = score[5, 5] = math.inf
    for exact in (False, True):
        mask = TransposableNM(1, 8, exact).topk(score, 8)
        assert bool(mask[0, 3])
        assert bool(mask[5, 5])


def test_scale_does_not_matter():
    tiles = random_tiles(50, 8, 3)
    expected = TransposableNM(4, 8, exact=True).topk(as_layer(tiles), 50 * 32)
    for scale in (2.0**-100, 2.0**90):
        assert torch.equal(TransposableNM(4, 8, exact=True).topk(as_layer(tiles * scale), 50 * 32), expected)


def test_improve_touches_chosen_tiles_alone():
    tiles = random_tiles(20, 8, 4).abs()
    worth = _worth(tiles, torch.zeros_like(tiles, dtype=torch.bool), torch.zeros_like(tiles, dtype=torch.bool))
    start = _repair(_greedy(worth, 4), worth, 4)
    mask = start.clone()
    _improve(mask, worth, torch.arange(20) < 10)
    assert torch.equal(mask[10:], start[10:])
    assert not torch.equal(mask[:10], start[:10])


@pytest.mark.parametrize("m", [2, 4, 8])
def test_all_of_m_is_dense(m):
    assert bool(TransposableNM(m, m).topk(torch.randn(16, 8, 3), 384).all())


def test_rigl_moves_within_the_structure():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    structure = TransposableNM(2, 8)
    sparsifier = Sparsifier(model, rigl(stop=10, every=1, start=0, drop_fraction=0.5, structure=structure))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    moved = 0
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        sparsifier.before_step(optimizer)
        optimizer.step()
        sparsifier.after_step(optimizer)
        moved += sparsifier.last_update["grown"]
        for mask in sparsifier.masks.values():
            both_ways(mask, 2, 8)
    assert moved > 5


def test_messages():
    def raises(call, *args):
        with pytest.raises(SparsityError) as error:
            call(*args)
        return str(error.value)

    shape = torch.Size([12, 10])
    assert raises(TransposableNM(2, 4).budget, shape, 0.5) == (
        "`TransposableNM(2, 4)` needs the fan-in to be a multiple of 4; it is 10 (shape [12, 10]). Exclude this layer "
        "with `exclude=`, or choose another m."
    )
    assert "needs the fan-out to be a multiple of 5; it is 12" in raises(TransposableNM(2, 5).budget, shape, 0.5)
    assert raises(TransposableNM(2, 4).topk, torch.zeros(4, 4), 9).startswith("`TransposableNM(2, 4)` fixes 8 active")
    score = torch.zeros(8, 4)
    score[4:7, 0] = -math.inf
    assert raises(TransposableNM(2, 4).topk, score, 16) == (
        "`TransposableNM(2, 4)` needs 2 weights that may be chosen in every row and column of its tiles; tile 1 has no "
        "such mask. Widen the support, or let dropped weights return."
    )
    rows_alone = torch.tensor([[True, True, False, False]]).expand(4, 4)
    assert raises(TransposableNM(2, 4).check, rows_alone, 8) == (
        "A mask of `TransposableNM(2, 4)` must have 2 active weights in every row and column of its tiles of 4x4."
    )
    assert raises(TransposableNM(2, 4).check, rows_alone.T, 8).endswith("of its tiles of 4x4.")
    assert raises(TransposableNM, 5, 4) == "`TransposableNM(5, 4)` keeps n of every m weights and needs 0 < n <= m."
