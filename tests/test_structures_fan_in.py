"""Constant fan-in: SRigL's worked table, a loop over rows as second implementation, ablation, groups, messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselearn import Sparsifier, SparsityError, rigl
from sparselearn.distributions import budgets, uniform
from sparselearn.structures import ConstantFanIn, Unstructured, rows, top_indices

quick = settings(max_examples=60, deadline=None, derandomize=True)
VALUES = torch.tensor([-1.0, -0.0, 0.0, 0.5, 2.0, 2.0, math.inf])


def loop_fan_in(structure, score, nnz, keep):
    """Rows with a score share nnz; each group picks by (kept by one, sum, lower index). None where it cannot."""
    matrix = rows(score)
    kept = torch.zeros_like(matrix, dtype=torch.bool) if keep is None else rows(keep)
    active = [i for i in range(len(matrix)) if max(matrix[i].tolist()) > -math.inf]
    if not active or nnz % len(active) or nnz // len(active) > matrix.shape[1]:
        return None
    fan_in = nnz // len(active)
    mask = torch.zeros_like(kept)
    for top in range(0, len(matrix), structure.group):
        members = [i for i in active if top <= i < top + structure.group]
        ranked = []
        for j in range(matrix.shape[1]):
            values = [float(matrix[i, j]) for i in members]
            if members and min(values) > -math.inf:
                ranked.append((not any(bool(kept[i, j]) for i in members), -sum(values), j))
        if members and len(ranked) < fan_in:
            return None
        for *_, j in sorted(ranked)[:fan_in]:
            mask[members, j] = True
    return mask.view(score.shape)


@quick
@given(
    st.sampled_from([1, 2, 3, 8]),
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.3]),
    st.data(),
)
def test_fan_in_is_the_loop_over_rows(group, shape, seed, tied, with_keep, never, ablated, data):
    g = torch.Generator().manual_seed(seed)
    structure = ConstantFanIn(group)
    score = torch.randn(shape, generator=g)
    if tied:
        score = VALUES[torch.randint(len(VALUES), shape, generator=g)]
    score[torch.rand(shape, generator=g) < never] = -math.inf
    score[torch.rand(shape[0], generator=g) < ablated] = -math.inf
    keep = torch.rand(shape, generator=g) < 0.3 if with_keep else None
    n_active = int((rows(score) > -math.inf).any(1).sum())
    nnz = data.draw(st.integers(0, rows(score).shape[1])) * max(n_active, 1)
    expected = loop_fan_in(structure, score, nnz, keep)
    if expected is None:
        with pytest.raises(SparsityError):
            structure.topk(score, nnz, keep)
        return
    mask = structure.topk(score, nnz, keep)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)
    structure.check(mask, nnz)
    strided = score.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(structure.topk(strided, nnz, keep), mask)


def test_srigl_by_hand():
    """ALGORITHMS section 4: after the ablation of row 2, K = 6 / 2; kept by |w|, grown by |g|."""
    weight = torch.tensor([[0.9, 0.8, 0.0, 0.0], [0.5, 0.4, 0.0, 0.0], [0.05, 0.01, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 0.0, 0.3, 0.2], [0.0, 0.0, 0.9, 0.1], [0.01, 0.01, 0.02, 0.01]])
    keep = top_indices(weight.flatten(), 4).view(3, 4)
    score = torch.where(keep, weight, gradient)
    score[2] = -math.inf
    mask = ConstantFanIn().topk(score, 6, keep)
    assert mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    ConstantFanIn().check(mask, 6)


def test_surplus_kept_weights_go_by_score():
    """Defect 1 of SRigL's code: which surplus weights of a row are trimmed is arbitrary there."""
    score = torch.tensor([[0.1, 0.9, 0.5, 0.7], [5.0, 0.0, 6.0, 0.2]])
    keep = torch.tensor([[True, True, True, True], [False, True, False, False]])
    assert ConstantFanIn().topk(score, 4, keep).int().tolist() == [[0, 1, 0, 1], [0, 1, 1, 0]]


def test_groups_by_hand():
    score = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 4.0, 0.0, 5.5], [0.0, 0.0, 1.0, 2.0]])
    pair = ConstantFanIn(group=2)  # sums 6, 7, 2, 5.5; row 2 is a group of its own
    assert pair.topk(score, 6).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    keep = torch.tensor([[False, False, True, False], [False, False, False, False], [True, False, False, False]])
    assert pair.topk(score, 6, keep).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    score[0] = -math.inf  # ablated: takes no part in the choice of row 1
    assert pair.topk(score, 4).int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]]


@quick
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 8), st.sampled_from([0.0, -0.0, 3.0, math.inf]))
def test_equal_scores_take_the_first(out, size, fan_in, value):
    fan_in = min(fan_in, size)
    for group in (1, 2):
        mask = ConstantFanIn(group).topk(torch.full((out, size), value), fan_in * out)
        assert torch.equal(mask, (torch.arange(size) < fan_in).expand(out, size))


def test_one_neuron_is_unstructured():
    score = torch.randn(1, 50)
    assert torch.equal(ConstantFanIn().topk(score, 7), Unstructured().topk(score, 7))


def test_budget_and_unit():
    shape = torch.Size([10, 4, 3, 3])
    assert ConstantFanIn().unit(shape) == 10
    assert [ConstantFanIn().budget(shape, d) for d in (1.0, 0.5, 0.1, 0.001)] == [360, 180, 30, 10]
    assert ConstantFanIn(4).budget(shape, 0.5) == 180
    shapes = {"a": torch.Size([10, 33]), "b": torch.Size([7, 40]), "c": torch.Size([3, 5])}
    nnz = budgets(ConstantFanIn(), shapes, uniform(shapes, 0.3))
    assert all(nnz[name] % shape[0] == 0 for name, shape in shapes.items())
    assert abs(sum(nnz.values()) - 0.3 * (330 + 280 + 15)) < 7


@quick
@given(st.integers(2, 9), st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**31), st.data())
def test_groups_begin_with_every_input_used_about_as_often(group, out, size, seed, data):
    g = torch.Generator().manual_seed(seed)
    fan_in = data.draw(st.integers(1, size))
    score = torch.rand(out, size, generator=g)
    before = score.clone()
    mask = ConstantFanIn(group).first(score, fan_in * out)
    ConstantFanIn(group).check(mask, fan_in * out)
    uses = mask[::group].sum(0)  # a row of each group
    assert int(uses.max()) - int(uses.min()) <= 1
    assert torch.equal(score, before)
    at_random = ConstantFanIn(group, balanced=False)
    assert torch.equal(at_random.first(score, fan_in * out), at_random.topk(score, fan_in * out))
    assert torch.equal(ConstantFanIn().first(score, fan_in * out), ConstantFanIn().topk(score, fan_in * out))


def test_balanced_groups_by_hand_within_a_support():
    score = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.0] * 4, [0.9, 0.7, 0.1, 0.2], [0.0] * 4, [0.5, 0.6, 0.7, -math.inf]])
    score[1::2] = score[0::2][:2]
    mask = ConstantFanIn(2).first(score, 10)  # the third group may not use input 3
    assert mask[::2].int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]


def test_a_sparsifier_begins_balanced():
    def most(**options):
        method = rigl(stop=10, every=1, structure=ConstantFanIn(8, **options))
        mask = Sparsifier(torch.nn.Linear(100, 64), method, sparsity=0.9).masks["weight"]
        return int(mask[::8].sum(0).max())

    assert most() == 1  # 8 groups of 10 inputs, of 100
    assert most(balanced=False) > 1


def test_rows():
    assert torch.equal(rows(torch.arange(24).view(2, 3, 4)), torch.arange(24).view(2, 12))
    strided = torch.arange(24).view(2, 4, 3).transpose(1, 2)
    assert rows(strided)[0].tolist() == strided[0].flatten().tolist()


def test_pool():
    score = torch.tensor([[1.0, 3.0], [5.0, 4.0], [0.0, 7.0]])
    assert ConstantFanIn().pool(score) is score
    assert ConstantFanIn(2).pool(score).tolist() == [[3.0, 3.5], [3.0, 3.5], [0.0, 7.0]]
    score[0] = -math.inf
    assert ConstantFanIn(2).pool(score).tolist() == [[-math.inf] * 2, [5.0, 4.0], [0.0, 7.0]]
    score = torch.tensor([[1.0, -math.inf], [5.0, 4.0], [0.0, 7.0]])
    assert ConstantFanIn(2).pool(score).tolist() == [[3.0, -math.inf], [3.0, -math.inf], [0.0, 7.0]]
    conv = torch.randn(4, 2, 3, 3)
    assert ConstantFanIn(4).pool(conv).shape == conv.shape
    torch.testing.assert_close(ConstantFanIn(4).pool(conv), conv.mean(0, keepdim=True).expand(4, 2, 3, 3))


@pytest.mark.parametrize("group", [1, 4])
def test_rigl_moves_within_the_structure(group):
    torch.manual_seed(0)
    structure = ConstantFanIn(group)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.Flatten(), torch.nn.Linear(24, 7))
    method = rigl(stop=10, every=1, start=0, drop_fraction=0.5, structure=structure)
    sparsifier = Sparsifier(model, method, sparsity=0.7)
    nnz = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    moved = 0
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().sum().backward()
        sparsifier.before_step(optimizer)
        optimizer.step()
        sparsifier.after_step(optimizer)
        moved += sparsifier.last_update["grown"]
        for name, mask in sparsifier.masks.items():
            structure.check(mask, nnz[name])
    assert moved > 20


def test_messages():
    def raises(call, *args):
        with pytest.raises(SparsityError) as error:
            call(*args)
        return str(error.value)

    assert raises(ConstantFanIn().topk, torch.zeros(4, 6), 10) == (
        "`ConstantFanIn()` gives every active neuron the same number of weights, 6 at most: nnz must be a multiple of "
        "the 4 active neurons of 4; it is 10 (shape [4, 6]). Take nnz from `budget`, or a multiple of the rows that "
        "have a score."
    )
    score = torch.zeros(4, 6)
    score[0] = -math.inf
    assert "a multiple of the 3 active neurons of 4; it is 8" in raises(ConstantFanIn(2).topk, score, 8)
    assert "6 at most" in raises(ConstantFanIn().topk, torch.zeros(4, 6), 28)
    assert "of the 0 active neurons of 4; it is 0" in raises(ConstantFanIn().topk, torch.full((4, 6), -math.inf), 0)
    score[2, :4] = -math.inf
    assert raises(ConstantFanIn().topk, score, 9) == (
        "`ConstantFanIn()` needs 3 weights that may be chosen in every active neuron; active neuron 1 has 2. Widen the "
        "support, or let dropped weights return."
    )
    uneven = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert raises(ConstantFanIn().check, uneven, 3) == (
        "A mask of `ConstantFanIn()` must have the same number of weights in every active row; row 2 has 1, row 0 "
        "has 2."
    )
    ablated = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    ConstantFanIn().check(ablated, 4)
    ConstantFanIn(2).check(ablated, 4)
    assert raises(ConstantFanIn(3).check, ablated, 4) == (
        "A mask of `ConstantFanIn(3)` must have the same positions in all active rows of a group of 3; row 0 has "
        "others than its neighbours."
    )
    assert raises(ConstantFanIn().check, ablated, 5) == "A mask must have 5 active weights; it has 4."
    assert raises(ConstantFanIn, 0) == "`ConstantFanIn(0)` needs groups of at least one neuron."
