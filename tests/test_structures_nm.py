"""N:M, hierarchical N:M and V:N:M: worked tables, loops over groups as second implementation, messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselearn import DropGrow, Sparsifier, SparsityError, rigl
from sparselearn.structures import NM, VNM, HierarchicalNM

quick = settings(max_examples=40, deadline=None, derandomize=True)
VALUES = [-1.0, -0.0, 0.0, 0.5, 2.0, 2.0, math.inf]  # few values: many ties


def best(scores, kept, n):
    """The reference of one group: indices by (kept first, score, lower index)."""
    allowed = [i for i, s in enumerate(scores) if s > -math.inf]
    return sorted(allowed, key=lambda i: (not kept[i], -scores[i], i))[:n]


def random_case(shape, seed, tied, with_keep, never=0.0):
    g = torch.Generator().manual_seed(seed)
    score = torch.randn(shape, generator=g)
    if tied:
        score = torch.tensor(VALUES)[torch.randint(len(VALUES), shape, generator=g)]
    score[torch.rand(shape, generator=g) < never] = -math.inf
    return score, torch.rand(shape, generator=g) < 0.3 if with_keep else None


def lines_of(tensor, dim):
    return tensor.movedim(dim, -1).reshape(-1, tensor.shape[dim]).tolist()


# ---- NM --------------------------------------------------------------------------------------------------


def loop_nm(structure, score, keep):
    n, m, dim = structure.n, structure.m, structure.dim
    keep = torch.zeros_like(score, dtype=torch.bool) if keep is None else keep
    result = []
    for scores, kept in zip(lines_of(score, dim), lines_of(keep, dim), strict=True):
        line = [False] * len(scores)
        for start in range(0, len(scores), m):
            group = scores[start : start + m]
            k = len(group) if structure.remainder == "dense" and len(group) < m else n
            for i in best(group, kept[start : start + m], k):
                line[start + i] = True
        result.append(line)
    moved = score.movedim(dim, -1)
    return torch.tensor(result).reshape(moved.shape).movedim(-1, dim)


@quick
@given(
    st.sampled_from([(1, 1), (1, 4), (2, 4), (3, 4), (4, 4), (2, 8), (1, 3), (5, 7)]),
    st.sampled_from(["error", "dense", "padded"]),
    st.integers(0, 2),
    st.lists(st.integers(1, 9), min_size=3, max_size=4),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
)
def test_nm_is_the_loop_over_groups(pattern, remainder, dim, shape, seed, tied, with_keep):
    structure = NM(*pattern, dim=dim, remainder=remainder)
    if remainder == "error":
        shape[dim] *= structure.m
    score, keep = random_case(shape, seed, tied, with_keep)
    nnz = structure.budget(score.shape, 0.3)
    mask = structure.topk(score, nnz, keep)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, loop_nm(structure, score, keep))
    assert int(mask.sum()) == nnz
    structure.check(mask, nnz)
    strided = score.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(structure.topk(strided, nnz, keep), mask)


@quick
@given(st.integers(0, 2**31), st.booleans())
def test_nm_never_takes_minus_infinity(seed, with_keep):
    score, keep = random_case((4, 12), seed, True, with_keep, never=0.3)
    structure = NM(2, 4)
    enough = bool(((score > -math.inf).view(4, 3, 4).sum(-1) >= 2).all())
    if not enough:
        with pytest.raises(SparsityError, match="needs 2 weights that may be chosen in every group"):
            structure.topk(score, 24, keep)
        return
    mask = structure.topk(score, 24, keep)
    assert torch.equal(mask, loop_nm(structure, score, keep))
    assert bool((score[mask] > -math.inf).all())


def test_nm_by_hand():
    assert NM(2, 4).topk(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2).tolist() == [[False, False, True, True]]
    score = torch.tensor([[5.0, 1.0, 2.0, 5.0], [0.0, -0.0, 0.0, -0.0]])
    assert NM(1, 2).topk(score, 4).int().tolist() == [[1, 0, 0, 1], [1, 0, 1, 0]]
    assert NM(1, 2, dim=0).topk(score, 4).int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    keep = torch.tensor([[False, True, False, False], [True, True, False, False]])
    assert NM(1, 2).topk(score, 4, keep).int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_groups_of_a_convolution_run_over_input_channels():
    score = torch.zeros(1, 4, 1, 2)
    score[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    score[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask = NM(2, 4).topk(score, 4)
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 3), (4, 16, 3, 3), (2, 8, 1, 2, 3)])
@pytest.mark.parametrize("structure", [NM(4, 4), NM(8, 8), HierarchicalNM((2, 2), (2, 2)), VNM(1, 4, 4)])
def test_all_of_m_is_dense(structure, shape):
    nnz = structure.budget(torch.Size(shape), 0.1)
    assert nnz == math.prod(shape)
    assert bool(structure.topk(torch.randn(shape), nnz).all())


@pytest.mark.parametrize(
    ("size", "dense", "padded"), [(8, 4, 4), (9, 5, 5), (10, 6, 6), (11, 7, 6), (3, 3, 2), (1, 1, 1)]
)
def test_remainders(size, dense, padded):
    shape = torch.Size([5, size])
    score = torch.rand(shape)
    for remainder, expected in (("dense", dense), ("padded", padded)):
        structure = NM(2, 4, remainder=remainder)
        assert structure.budget(shape, 0.1) == 5 * expected
        mask = structure.topk(score, 5 * expected)
        structure.check(mask, 5 * expected)
        if remainder == "dense":
            assert bool(mask[:, size // 4 * 4 :].all())


def test_density_does_not_matter():
    shape = torch.Size([4, 8])
    for structure in (NM(2, 4), HierarchicalNM((1, 2), (2, 4)), VNM(2, 2, 8)):
        assert structure.unit(shape) == 0
        assert structure.budget(shape, 0.9) == structure.budget(shape, 0.01)


def test_nm_is_a_value():
    assert NM(2, 4) == NM(2, 4)
    assert NM(2, 4) != NM(2, 4, dim=0)
    assert hash(NM(2, 4)) == hash(NM(2, 4))
    assert repr(NM(2, 4)) == "NM(n=2, m=4, dim=1, remainder='error')"
    score = torch.randn(4, 4)
    assert NM(2, 4).pool(score) is score


def raises(call, *args):
    with pytest.raises(SparsityError) as error:
        call(*args)
    return str(error.value)


def test_messages_of_nm():
    assert raises(NM(2, 4).budget, torch.Size([64, 150]), 0.5) == (
        "`NM(2, 4)` needs the fan-in to be a multiple of 4; it is 150 (shape [64, 150]). Exclude this layer with "
        "`exclude=`, or choose another m, or set `remainder=`."
    )
    assert "needs the number of input channels to be a multiple of 4; it is 3" in raises(
        NM(2, 4).budget, torch.Size([64, 3, 7, 7]), 0.5
    )
    assert "the fan-out to be a multiple of 4; it is 6" in raises(NM(2, 4, dim=0).budget, torch.Size([6, 3]), 0.5)
    assert "size of dimension 3 to be a multiple of 4; it is 7" in raises(
        NM(2, 4, dim=-1).budget, torch.Size([64, 3, 7, 7]), 0.5
    )
    assert raises(NM(2, 4).topk, torch.zeros(2, 8), 9) == (
        "`NM(2, 4)` fixes 8 active weights for a layer of shape [2, 8]; it was asked for 9. Leave the sparsity of this "
        "layer to the structure, or exclude the layer."
    )
    score = torch.zeros(2, 8)
    score[1, 1:4] = -math.inf
    assert raises(NM(2, 4).topk, score, 8) == (
        "`NM(2, 4)` needs 2 weights that may be chosen in every group; group 2 has 1. Widen the support, or let "
        "dropped weights return."
    )
    mask = torch.tensor([[True, True, True, False, True, False, False, False]])
    assert raises(NM(2, 4).check, mask, 4) == (
        "A mask of `NM(2, 4)` must have 2 active weights in every group of 4 along dimension 1."
    )
    assert raises(NM(2, 4).check, mask, 3) == "A mask must have 3 active weights; it has 4."
    assert raises(NM(1, 4).check, mask, 4) == "`NM(1, 4)` fixes 2 active weights for shape [1, 8]; got 4."
    for n, m in ((0, 4), (5, 4), (-1, 2)):
        assert raises(NM, n, m) == f"`NM({n}, {m})` keeps n of every m weights and needs 0 < n <= m."
    assert raises(lambda: NM(2, 4, remainder="pad")) == ("`remainder` must be 'error', 'dense' or 'padded'; got 'pad'.")
    assert "runs along dimension 2; a weight of shape [4, 4] has none" in raises(
        NM(2, 4, dim=2).budget, torch.Size([4, 4]), 0.5
    )


# ---- hierarchical ----------------------------------------------------------------------------------------


def loop_hierarchical(structure, score, keep):
    (n_blocks, m_blocks), (n, m) = structure.outer, structure.inner
    keep = torch.zeros_like(score, dtype=torch.bool) if keep is None else keep
    result = []
    for scores, kept in zip(lines_of(score, 1), lines_of(keep, 1), strict=True):
        line = [False] * len(scores)
        for start in range(0, len(scores), m * m_blocks):
            blocks = []
            for first in range(start, start + m * m_blocks, m):
                chosen = [first + i for i in best(scores[first : first + m], kept[first : first + m], n)]
                of_kept = [scores[i] for i in chosen if kept[i]]
                worth = sum(of_kept) if of_kept else sum(scores[i] for i in chosen)
                if len(chosen) == n:
                    blocks.append((not of_kept, -worth, first, chosen))
            for *_, chosen in sorted(blocks)[:n_blocks]:
                for i in chosen:
                    line[i] = True
        result.append(line)
    return torch.tensor(result).reshape(score.movedim(1, -1).shape).movedim(-1, 1)


@quick
@given(
    st.sampled_from([((1, 2), (2, 4)), ((3, 4), (2, 4)), ((2, 3), (1, 2)), ((2, 2), (1, 4)), ((1, 4), (3, 3))]),
    st.sampled_from([(), (2,), (1, 3)]),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.2]),
)
def test_hierarchical_is_the_loop_over_groups(pattern, kernel, seed, tied, with_keep, never):
    structure = HierarchicalNM(*pattern)
    size = structure.outer[1] * structure.inner[1]
    score, keep = random_case((3, 2 * size, *kernel), seed, tied, with_keep, never)
    expected = loop_hierarchical(structure, score, keep)
    nnz = structure.budget(score.shape, 1.0)
    if int(expected.sum()) < nnz:
        with pytest.raises(SparsityError, match="that may be chosen in every group"):
            structure.topk(score, nnz, keep)
        return
    mask = structure.topk(score, nnz, keep)
    assert torch.equal(mask, expected)
    structure.check(mask, nnz)


def test_hierarchical_by_hand():
    score = torch.tensor([[4.0, 0.0, 0.0, 3.0, 3.0, 3.0, 1.0, 1.0]])
    assert HierarchicalNM((1, 2), (2, 4)).topk(score, 2).int().tolist() == [[1, 0, 0, 1, 0, 0, 0, 0]]
    assert HierarchicalNM((1, 2), (1, 2)).topk(score, 2).int().tolist() == [[1, 0, 0, 0, 1, 0, 0, 0]]
    keep = torch.zeros(1, 8, dtype=torch.bool)
    keep[0, 6] = True
    assert HierarchicalNM((1, 2), (2, 4)).topk(score, 2, keep).int().tolist() == [[0, 0, 0, 0, 1, 0, 1, 0]]
    wrong = torch.tensor([[True, False, False, False, True, False, False, False]])
    message = raises(HierarchicalNM((1, 2), (2, 4)).check, wrong, 2)
    assert message.endswith("1 active blocks of every 2, and 2 active weights in every active block of 4.")
    assert "`HierarchicalNM((3, 2), (1, 2))` keeps n of every m" in raises(HierarchicalNM, (3, 2), (1, 2))
    assert "multiple of 8; it is 12" in raises(HierarchicalNM((1, 2), (2, 4)).budget, torch.Size([2, 12]), 1.0)


# ---- V:N:M -----------------------------------------------------------------------------------------------


def loop_vnm(structure, score, keep):
    """One matrix [out, in]; None where a row of a block has too few candidates."""
    v, n, m = structure.v, structure.n, structure.m
    keep = torch.zeros_like(score, dtype=torch.bool) if keep is None else keep & (score > -math.inf)
    mask = torch.zeros_like(keep)
    for top in range(0, score.shape[0], v):
        for left in range(0, score.shape[1], m):
            ranked = []
            for j in range(left, left + m):
                column = [(float(score[i, j]), bool(keep[i, j])) for i in range(top, top + v)]
                held = [s for s, k in column if k]
                candidates = [s for s, _ in column if s > -math.inf]
                ranked.append((not held, 0 if held else -len(candidates), -sum(held or candidates), j))
            columns = sorted(j for *_, j in sorted(ranked)[:4])
            for i in range(top, top + v):
                chosen = best([float(score[i, j]) for j in columns], [bool(keep[i, j]) for j in columns], n)
                if len(chosen) < n:
                    return None
                for c in chosen:
                    mask[i, columns[c]] = True
    return mask


@quick
@given(
    st.sampled_from([(1, 2, 4), (2, 2, 8), (4, 1, 5), (3, 4, 6)]),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.2]),
)
def test_vnm_is_the_loop_over_blocks(pattern, seed, tied, with_keep, never):
    structure = VNM(*pattern)
    score, keep = random_case((2 * structure.v, 2 * structure.m), seed, tied, with_keep, never)
    nnz = structure.budget(score.shape, 1.0)
    expected = loop_vnm(structure, score, keep)
    if expected is None:
        with pytest.raises(SparsityError, match="in every row of a block"):
            structure.topk(score, nnz, keep)
        return
    mask = structure.topk(score, nnz, keep)
    assert torch.equal(mask, expected)
    structure.check(mask, nnz)
    both = torch.stack([score, score.flip(0)], -1)  # two kernel positions
    kept = None if keep is None else torch.stack([keep, keep.flip(0)], -1)
    flipped = loop_vnm(structure, score.flip(0), None if keep is None else keep.flip(0))
    if flipped is not None:
        assert torch.equal(structure.topk(both, 2 * nnz, kept), torch.stack([expected, flipped], -1))


def test_vnm_by_hand():
    score = torch.tensor([[9.0, 0.0, 1.0, 1.0, 1.0, 0.0], [0.0, 9.0, 1.0, 2.0, 1.0, 0.0]])
    # columns 0 and 1 (9), 3 (3), 2 (2, before 4)
    assert VNM(2, 2, 6).topk(score, 4).int().tolist() == [[1, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0]]
    assert VNM(2, 2, 6).budget(torch.Size([64, 60]), 1.0) == 64 * 20
    uneven = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()
    assert "must have 2 active weights in every row of its blocks of 2x6" in raises(VNM(2, 2, 6).check, uneven, 4)
    five = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    assert "in 4 columns at most" in raises(VNM(3, 2, 6).check, five, 6)
    assert "needs v >= 1 and 0 < n <= 4 <= m" in raises(VNM, 2, 5, 8)
    assert "fan-out to be a multiple of 4; it is 6" in raises(VNM(4, 2, 8).budget, torch.Size([6, 8]), 1.0)


def test_a_support_of_the_same_structure_is_the_mask():
    for structure in (NM(2, 4), HierarchicalNM((1, 2), (2, 4)), VNM(4, 2, 8)):
        shape = torch.Size([8, 16])
        nnz = structure.budget(shape, 1.0)
        support = structure.topk(torch.rand(shape), nnz)
        assert torch.equal(structure.topk(torch.rand(shape).masked_fill(~support, -math.inf), nnz), support)


# ---- through the engine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [NM(2, 4), NM(1, 4, dim=0), HierarchicalNM((1, 2), (2, 4)), VNM(2, 2, 8)])
def test_rigl_moves_within_the_structure(structure):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 8))
    method = rigl(stop=10, every=1, start=0, drop_fraction=0.5, structure=structure)
    sparsifier = Sparsifier(model, method)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    moved = 0
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 8, 4, 4)).square().sum().backward()
        sparsifier.before_step(optimizer)
        optimizer.step()
        sparsifier.after_step(optimizer)
        moved += sparsifier.last_update["grown"]
        for mask in sparsifier.masks.values():
            structure.check(mask, structure.budget(mask.shape, 1.0))
    assert moved > 20


def test_sparsity_may_be_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
    assert Sparsifier(model, DropGrow(structure=NM(1, 4))).sparsity == 0.75
