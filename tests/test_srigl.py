"""SRigL: its table by hand, a loop over neurons as second implementation, invariants at every step, resume, two
processes, and training in condensed form with neurons that come and go."""

import copy
import itertools
import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparselearn as sl
from sparselearn import SparsityError, criteria
from sparselearn.criteria import Layer
from sparselearn.distributions import uniform
from sparselearn.modules import convert
from sparselearn.modules.update import captured, update_condensed
from sparselearn.schedules import constant
from sparselearn.structures import ConstantFanIn, rows

quick = settings(max_examples=40, deadline=None, derandomize=True)
CLOCK = {"stop": 100, "every": 1, "start": 0}


def view(weight, gradient, mask, name="layer", step=5):
    return Layer(name, weight, gradient, mask, {}, step, torch.Generator().manual_seed(0))


# ---- the rule --------------------------------------------------------------------------------------------------


def loop_srigl(weight, gradient, mask, nnz, n_drop, gamma, group=1, permanent=False):
    """ALGORITHMS section 4 with lists, for distinct scores: which neurons stay, and the new mask; group = 1 only for
    the mask."""
    out, fan_in = weight.shape
    w, g, m = weight.abs().tolist(), gradient.abs().tolist(), mask.tolist()
    places = list(itertools.product(range(out), range(fan_in)))
    by_weight = sorted((p for p in places if m[p[0]][p[1]]), key=lambda p: -w[p[0]][p[1]])
    by_gradient = sorted(places, key=lambda p: -g[p[0]][p[1]])
    n_keep = len(by_weight) - n_drop
    salient = set(by_weight[:n_keep]) | set(by_gradient[:n_drop])
    members = [range(i, min(i + group, out)) for i in range(0, out, group)]
    count = [sum(p[0] in rows_ for p in salient) / len(rows_) for rows_ in members]
    if permanent:
        count = [c if any(any(m[i]) for i in rows_) else -1 for c, rows_ in zip(count, members, strict=True)]
    needed = gamma if gamma >= 1 else max(1, math.floor(gamma * (nnz // out) + 1e-6))
    held, best = 0, sorted(range(len(members)), key=lambda i: -count[i])
    for i in best:  # the threshold falls until the budget fits
        held += len(members[i]) * fan_in
        if held >= nnz:
            needed = min(needed, count[i])
            break
    awake = [i for rows_, c in zip(members, count, strict=True) for i in rows_ if c >= needed]
    size = nnz // len(awake)
    new = [[False] * fan_in for _ in range(out)]
    kept = [p for p in by_weight if p[0] in awake][:n_keep]
    for i in awake:
        stay = [p for p in kept if p[0] == i][:size]
        rest = [p for p in by_gradient if p[0] == i and p not in stay]
        for _, j in stay + rest[: size - len(stay)]:
            new[i][j] = True
    return awake, torch.tensor(new)


def test_the_table_by_hand():
    """ALGORITHMS section 4: keep 4, two salient gradients, counts (3, 3, 0): row 2 goes, K = 3."""
    weight = torch.tensor([[0.9, 0.8, 0.0, 0.0], [0.5, 0.4, 0.0, 0.0], [0.05, 0.01, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 0.0, 0.3, 0.2], [0.0, 0.0, 0.9, 0.1], [0.01, 0.01, 0.02, 0.01]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    method = sl.srigl(**CLOCK, drop_fraction=constant(1 / 3), gamma=0.3)
    ((new, kept),) = method.new_masks([view(weight, gradient, mask)], [6])
    assert new.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert kept.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    for spared in (sl.srigl(**CLOCK, drop_fraction=constant(1 / 3), gamma=0),
                   sl.srigl(**CLOCK, drop_fraction=constant(1 / 3), protect=["lay*"])):  # fmt: skip
        ((new, _),) = spared.new_masks([view(weight, gradient, mask)], [6])
        assert new.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]]  # row 2 lost its two, gets 0.02, 0.01


@quick
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.floats(0.0, 1.0),
    st.sampled_from([0.05, 0.3, 0.5, 0.95, 1, 2, 3, 50]), st.sampled_from([1, 2, 4]), st.booleans(), st.data(),
)  # fmt: skip
def test_neurons_and_masks_are_those_of_the_loop(out, fan_in, seed, fraction, gamma, group, permanent, data):
    g = torch.Generator().manual_seed(seed)
    size = data.draw(st.integers(1, fan_in))
    nnz = size * out
    asleep = [i for i in range(1, out) if torch.rand((), generator=g) < 0.3]
    awake = out - len(asleep)
    if nnz > awake * fan_in:
        asleep, awake = [], out
    score = torch.rand(out, fan_in, generator=g)
    score[asleep] = -math.inf
    mask = ConstantFanIn().topk(score, nnz // awake * awake)
    weight = torch.randn(out, fan_in, generator=g) * mask
    gradient = torch.randn(out, fan_in, generator=g)
    method = sl.srigl(**CLOCK, drop_fraction=constant(fraction), gamma=gamma, group=1, permanent_ablation=permanent)
    active = int(mask.sum())
    n_drop = active - method.kept(0, sl.methods.Budget(-1, nnz), active, mask.numel() - active)
    expected, expected_mask = loop_srigl(weight, gradient, mask, nnz, n_drop, gamma, 1, permanent)
    ((new, kept),) = method.new_masks([view(weight, gradient, mask)], [nnz])
    assert torch.equal(new, expected_mask)
    assert not bool((kept & ~mask).any())
    if permanent and asleep:
        assert not bool(new[asleep].any())
    # groups: the rule for neurons alone, since scores are pooled before it
    ablation = sl.srigl(**CLOCK, gamma=gamma, group=group, permanent_ablation=permanent).ablation
    keep_score = weight.abs().masked_fill(~mask, -math.inf)
    expected, _ = loop_srigl(weight, gradient, mask, nnz, n_drop, gamma, group, permanent)
    chosen = ablation(view(weight, gradient, mask), keep_score, gradient.abs(), nnz, n_drop)
    assert chosen.nonzero().flatten().tolist() == expected


def test_all_neurons_but_one_may_go():
    """One row holds every salient weight and the whole budget."""
    weight, gradient = torch.full((4, 8), 1e-3), torch.full((4, 8), 1e-3)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :2] = True
    weight[2], gradient[2] = 1.0, 1.0
    weight *= mask
    ((new, _),) = sl.srigl(**CLOCK, drop_fraction=constant(0.8), gamma=0.95).new_masks(
        [view(weight, gradient, mask)], [8]
    )
    assert new.sum(1).tolist() == [0, 0, 8, 0]


def test_where_the_budget_needs_more_neurons_all_that_are_as_good_as_the_next_best_stay():
    score = torch.full((4, 8), -math.inf)
    score[2] = torch.rand(8)
    layer = view(torch.zeros(4, 8), torch.zeros(4, 8), torch.ones(4, 8).bool())
    ablation = sl.srigl(**CLOCK, gamma=0.9).ablation
    assert ablation(layer, score, score, 8, 4).tolist() == [False, False, True, False]
    assert ablation(layer, score, score, 9, 4).tolist() == [True, True, True, True]
    score[1, 0] = 0
    assert ablation(layer, score, score, 9, 32).tolist() == [False, True, True, False]


@pytest.mark.parametrize("budget", [13, 14, 15, 16])
def test_a_budget_that_the_neurons_do_not_divide_is_rounded_down_and_not_forgotten(budget):
    mask = torch.eye(7).bool() | torch.eye(7).roll(1, 1).bool()  # K = 2
    weight = torch.eye(7)
    gradient = torch.rand(7, 7)
    weight[6], gradient[6] = 0, 0
    method = sl.srigl(**CLOCK, drop_fraction=constant(0.5), gamma=0.5)
    ((new, _),) = method.new_masks([view(weight, gradient, mask)], [budget])
    awake = int(new.any(1).sum())
    assert awake == 6
    assert new.sum(1).tolist() == [budget // 6] * 6 + [0]
    ((again, _),) = method.new_masks([view(weight, gradient.add(1), new)], [budget])  # all salient now
    assert int(again.sum()) == budget // int(again.any(1).sum()) * int(again.any(1).sum())


def test_a_whole_group_goes_or_stays():
    weight = torch.tensor([[9.0, 8, 0, 0], [0.1, 0.1, 0, 0], [0.1, 0.2, 0, 0], [0.1, 0.2, 0, 0], [7.0, 7, 0, 0]])
    mask = weight > 0
    gradient = torch.zeros(5, 4)
    method = sl.srigl(**CLOCK, drop_fraction=constant(0.4), gamma=0.5, group=2)
    ((new, _),) = method.new_masks([view(weight, gradient, mask)], [10])
    assert new.any(1).tolist() == [True, True, False, False, True]
    assert new.sum(1).tolist() == [3, 3, 0, 0, 3]
    ConstantFanIn(2).check(new, 9)


def test_neurons_without_a_gradient_grow_at_random():
    """A neuron that never fires has to grow too; by index it would get the first inputs, as all its like."""
    torch.manual_seed(0)
    weight = torch.randn(6, 40)
    mask = ConstantFanIn().topk(torch.rand(6, 40), 6 * 5)
    weight = weight * mask * torch.tensor([1.0, 1, 1, 1e-5, 1e-5, 1e-5])[:, None]  # three small, silent rows
    gradient = torch.randn(6, 40)
    gradient[3:] = 0
    for method in (sl.rigl(**CLOCK, drop_fraction=constant(0.5), structure=ConstantFanIn()),
                   sl.srigl(**CLOCK, drop_fraction=constant(0.5), gamma=0)):  # fmt: skip
        ((new, kept),) = method.new_masks([view(weight, gradient, mask)], [30])
        grown = new & ~kept
        assert grown[3:].sum(1).tolist() == [5, 5, 5]
        assert len({tuple(row.nonzero().flatten().tolist()) for row in grown[3:]}) == 3
        ((again, _),) = method.new_masks([view(weight, gradient, mask)], [30])
        assert torch.equal(new, again)  # from (seed, step, name) alone
        loud = gradient[:3].abs().masked_fill(kept[:3], -1)
        assert all(set(loud[i].topk(int(grown[i].sum())).indices.tolist()) == set(grown[i].nonzero().flatten().tolist())
                   for i in range(3))  # fmt: skip


# ---- invariants while training -----------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, a grouped one, attention projections of odd sizes, a Linear without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 10, 3)
        self.grouped = nn.Conv2d(10, 10, (1, 3), groups=2)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.fc = nn.Linear(10, 7, bias=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.grouped(torch.relu(self.conv(x))).flatten(2).mT  # [B, L, 10]
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.head(torch.relu(self.fc(x)))


def images(step, dtype=torch.float32, n=6):
    g = torch.Generator().manual_seed(step)
    return torch.randn(n, 3, 5, 6, generator=g).to(dtype), torch.randint(3, (n,), generator=g)


def step_once(model, optimizer, batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def check_invariants(sparsifier, method, budgets):
    for name, layer in sparsifier.state.layers.items():
        mask = rows(layer.mask)
        counts = set(mask.sum(1).tolist()) - {0}
        awake = int(mask.any(1).sum())
        assert len(counts) == 1, name
        assert counts == {budgets[name] // awake}, name  # K re-balanced exactly
        assert counts.pop() <= mask.shape[1]
        group = method.structure.group
        for top in range(0, len(mask), group):  # one index set for each group, whole groups ablated
            assert bool((mask[top : top + group] == mask[top]).all()), name


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.sampled_from([0.0, 0.3, 0.95, 2, 6]), st.sampled_from([1, 2, 3, 8, 100]), st.booleans(),
    st.sampled_from([0.5, 0.83, 0.9]), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
def test_invariants_hold_at_every_step(gamma, group, permanent, sparsity, seed, skip):
    model = Net()
    method = sl.srigl(
        stop=8, every=2, drop_fraction=0.5, gamma=gamma, group=group, permanent_ablation=permanent,
        protect=["head*"], skip_step=skip,
    )  # fmt: skip
    sparsifier = sl.Sparsifier(model, method, sparsity=sparsity, seed=seed)
    optimizer = sl.SparseOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), sparsifier)
    budgets = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    assert {"conv.weight", "grouped.weight", "attention.in_proj_weight", "fc.weight"} <= budgets.keys()
    check_invariants(sparsifier, method, budgets)
    dead = {name: ~rows(mask).any(1) for name, mask in sparsifier.masks.items()}
    for step in range(7):
        step_once(model, optimizer, images(step))
        check_invariants(sparsifier, method, budgets)
        for name, mask in sparsifier.masks.items():
            asleep = ~rows(mask).any(1)
            if gamma == 0 or name == "head.weight":
                assert not bool(asleep.any()), name
            if permanent:
                assert not bool((dead[name] & ~asleep).any()), name
            dead[name] = asleep
            weight = dict(model.named_parameters())[name]
            assert not bool(weight[~mask].any())


def test_neurons_may_revive_unless_ablation_is_permanent():
    def revived(permanent):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
        method = sl.srigl(stop=60, every=2, drop_fraction=0.5, gamma=0.8, permanent_ablation=permanent, protect=["2.*"])
        sparsifier = sl.Sparsifier(model, method, sparsity=0.8)
        optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.3), sparsifier)
        back, before = 0, sparsifier.masks["0.weight"].any(1)
        for step in range(40):
            g = torch.Generator().manual_seed(step)
            step_once(model, optimizer, (torch.randn(8, 20, generator=g), torch.randint(3, (8,), generator=g)))
            now = sparsifier.masks["0.weight"].any(1)
            back, before = back + int((now & ~before).sum()), now
        assert not bool(before.all())
        return back

    assert revived(False) > 0
    assert revived(True) == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_is_exact(optimizer):
    method = sl.srigl(stop=15, every=3, drop_fraction=0.5, gamma=0.7, group=2, protect=["head*"])

    def build():
        model = Net()
        sparsifier = sl.Sparsifier(model, method, sparsity=0.8)
        made = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        options = {"momentum": 0.9} if optimizer == "sgd" else {}
        return model, sparsifier, sl.SparseOptimizer(made(model.parameters(), lr=0.02, **options), sparsifier)

    model, sparsifier, wrapped = build()
    saved = {}
    for step in range(14):
        if step in (6, 7, 10):  # on an update step, and beside it
            saved[step] = copy.deepcopy((model.state_dict(), wrapped.state_dict()))
        step_once(model, wrapped, images(step))
    assert any(not bool(rows(mask).any(1).all()) for mask in sparsifier.masks.values())  # neurons are ablated
    for start, (weights, state) in saved.items():
        again, other, resumed = build()
        again.load_state_dict(weights)
        resumed.load_state_dict(state)
        for step in range(start, 14):
            step_once(again, resumed, images(step))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
        assert all(torch.equal(mask, other.masks[name]) for name, mask in sparsifier.masks.items())


# ---- two processes -----------------------------------------------------------------------------------------------

PARALLEL = {
    "plain": sl.srigl(stop=12, every=3, drop_fraction=0.5, gamma=0.6, protect=["head*"]),
    "groups": sl.srigl(stop=12, every=3, drop_fraction=0.5, gamma=0.6, group=2, protect=["head*"]),
}


def trained(method, part=slice(None), wrap=lambda model: model):
    model = Net().double()
    # In sparse attention some gradients are but rounding (1e-44), and masks follow from these.
    sparsifier = sl.Sparsifier(model, method, sparsity=0.7, exclude=["attention*"])
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), sparsifier)
    wrapped = wrap(model)
    for step in range(10):
        x, y = images(step, torch.float64)
        step_once(wrapped, optimizer, (x[part], y[part]))
    return {n: p.detach().clone() for n, p in model.named_parameters()}, dict(sparsifier.masks)


def rank_main(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = slice(3 * rank, 3 * rank + 3)
    wrap = nn.parallel.DistributedDataParallel
    torch.save({name: trained(method, part, wrap) for name, method in PARALLEL.items()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(rank_main, args=(port, str(tmp_path)), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, method in PARALLEL.items():
        weights, masks = trained(method)
        for other_weights, other_masks in (ranks[0][name], ranks[1][name]):
            assert all(torch.equal(mask, other_masks[n]) for n, mask in masks.items())
            for n, weight in weights.items():
                torch.testing.assert_close(other_weights[n], weight)
        assert any(not bool(rows(mask).any(1).all()) for mask in masks.values())


# ---- in condensed form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("group", [1, 4])
def test_srigl_in_condensed_form_is_srigl_on_masked_dense_weights(group, permanent, bias):
    """Neurons are ablated and revive, so [A, K] changes; values, moments and step counts go along."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(30, 22, bias=bias), nn.ReLU(), nn.Linear(22, 17, bias=bias), nn.ReLU(), nn.Linear(17, 3)
    ).double()
    method = sl.srigl(stop=60, every=2, drop_fraction=0.5, gamma=0.8, group=group, permanent_ablation=permanent)
    sparsifier = sl.Sparsifier(dense, method, sparsity=0.8, distribution=uniform, exclude=["4.*"])
    model = copy.deepcopy(dense)
    convert(model, sparsifier, force=True)
    budgets = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    reference = sl.SparseOptimizer(torch.optim.RMSprop(dense.parameters(), 0.02, momentum=0.5), sparsifier)
    optimizer = torch.optim.RMSprop(model.parameters(), 0.02, momentum=0.5)
    shapes, back, before = set(), 0, sparsifier.masks["0.weight"].any(1)
    for step in range(58):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(12, 30, generator=g, dtype=torch.double), torch.randint(3, (12,), generator=g)
        step_once(dense, reference, (x, y))
        optimizer.zero_grad()
        with captured(model) as traffic:
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if method.due(step):
            update_condensed(model, method, optimizer, traffic, step=step, nnz=budgets)
        for name, module in (("0", model[0]), ("2", model[2])):
            weight = dense.get_submodule(name).weight
            assert torch.equal(module.mask, sparsifier.masks[f"{name}.weight"])
            torch.testing.assert_close(module.scatter(module.values), weight.detach())
            for key, value in reference.state[weight].items():
                mine = optimizer.state[module.values][key]
                torch.testing.assert_close(module.scatter(mine) if value.shape == weight.shape else mine, value)
        shapes.add(model[0].values.shape)
        now = model[0].mask.any(1)
        back, before = back + int((now & ~before).sum()), now
    assert len(shapes) > 1
    assert not (permanent and back)
    assert back or permanent or not bias
    assert not any(p.shape == dense[0].weight.shape for p in model.parameters())
    torch.testing.assert_close(model(x), dense(x))


def test_mistakes_are_named():
    with pytest.raises(SparsityError, match=r"groups of at least one neuron"):
        sl.srigl(stop=10, every=2, group=0)
    with pytest.raises(SparsityError, match=r"`gamma` of `srigl` must be at least 0; it is -0.1"):
        sl.srigl(stop=10, every=2, gamma=-0.1)
    with pytest.raises(SparsityError, match=r"`protect` pattern 'head.weigth' matched no parameter. Closest"):
        sl.Sparsifier(Net(), sl.srigl(stop=10, every=2, protect=["head.weigth"]), sparsity=0.5)
    assert criteria.gradient is sl.srigl(stop=10, every=2).grow
