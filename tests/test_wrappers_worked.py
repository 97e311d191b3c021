"""Worked by hand: Hebbian growth, and the outer loops (ART, AP, APP, DRESS, random search)."""

import numpy as np
import pytest
import torch
from method_list import CLOCK, HALF, active, batch, build, hard, layer_of, network, train
from torch import nn

import sparselearn as sl
from sparselearn.distributions import snip_scores, uniform
from sparselearn.methods.ensembles import hebbian, moments
from sparselearn.wrappers import (
    ARTController,
    HyperSparse,
    NestedSubnets,
    activating_while_pruning,
    anytime_pruning,
    app_densities,
    global_masks,
    group_supports,
    random_search,
)
from sparselearn.wrappers.nested import row_masks

# ---- Hebbian growth ----------------------------------------------------------------------------------------


def test_hebbian_score_is_the_correlation_of_output_and_input():
    """Two batches against NumPy: weighted moments .1·.9 and .1, normalised by their sum."""
    linear = nn.Linear(5, 3)
    xs = [torch.randn(40, 5), torch.randn(40, 5) + 1]
    for x in xs:
        x[:, 4] = 2.0  # constant
    ys = [linear(x).detach() for x in xs]
    tracker = moments()
    value = tracker.init(layer_of(linear.weight.detach()))
    for x, y in zip(xs, ys, strict=True):
        value = tracker.observe(linear, x, y, value)
    score = hebbian()(layer_of(linear.weight.detach(), memory={"moments": value}))
    weights = np.concatenate([np.full(40, 0.09), np.full(40, 0.1)]) / 40
    x, y = np.concatenate([x.numpy() for x in xs]), np.concatenate([y.numpy() for y in ys])
    covariance = np.cov(np.concatenate([y, x], 1).T.astype(np.float64), aweights=weights, ddof=0)
    deviation = np.sqrt(np.diag(covariance))
    deviation[-1] = np.inf
    expected = np.abs(covariance / np.outer(deviation, deviation))[:3, 3:]
    np.testing.assert_allclose(score.numpy(), expected, atol=1e-3)
    assert not score[:, 4].any()


def test_a_source_that_equals_the_target_is_grown_first():
    """Output 0 is input 2 (weight 1); input 5 is a copy of input 2 and is not connected: that edge comes first."""
    model = nn.Linear(8, 4, bias=False)
    model.weight.data.fill_(0.01)
    mask = torch.zeros(4, 8)
    mask[:, :3] = 1  # inputs 0, 1 and 2
    method = sl.g2gnet(stop=100, every=2, drop_fraction=sl.schedules.constant(0.09))  # int(.09·12) = 1
    sparsifier = sl.Sparsifier(model, method, sparsity=1 - 12 / 32, initial=lambda layer: mask)
    model.weight.data[0, 2] = 1.0
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), sparsifier)
    for _ in range(3):
        x = torch.randn(256, 8)
        x[:, 5] = x[:, 2]
        model.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    assert sparsifier.last_update["step"] == 2
    assert active(sparsifier.masks["weight"] & ~mask.bool()) == [5]


def test_hebbian_means_pass_over_a_batch_that_overflowed():
    linear, tracker = nn.Linear(5, 3), moments()
    x = torch.randn(8, 5)
    value = tracker.observe(linear, x, linear(x), tracker.init(layer_of(linear.weight.detach())))
    assert torch.equal(tracker.observe(linear, x * torch.inf, linear(x), value), value)
    assert not torch.equal(tracker.observe(linear, x, linear(x), value), value)


def test_hebbian_growth_is_for_linear_layers():
    with pytest.raises(sl.SparsityError, match=r"Hebbian growth is for Linear layers; `0.weight` has 4 dimensions"):
        build(hard(sl.g2gnet(**CLOCK, drop_fraction=HALF)))


def test_group_supports_are_blocks_with_the_diagonal():
    """3 groups of 6 outputs (2 each) and 7 inputs (3, 2, 2); 3 of 6 links besides the diagonal."""
    shapes = {"w": torch.Size([6, 7])}
    mask = group_supports(shapes, groups=3, links=0.5)["w"]
    rows, columns = [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2, 2]
    blocks = {}
    for i in range(6):
        for j in range(7):
            blocks.setdefault((rows[i], columns[j]), set()).add(bool(mask[i, j]))
    assert all(len(values) == 1 for values in blocks.values())
    on = {block for block, values in blocks.items() if values == {True}}
    assert {(0, 0), (1, 1), (2, 2)} < on
    assert len(on) == 6
    assert torch.equal(mask, group_supports(shapes, groups=3, links=0.5)["w"])
    only = group_supports(shapes, groups=3, links=0.0)["w"]
    assert int(only.sum()) == 2 * 3 + 2 * 2 + 2 * 2


# ---- HyperSparse and ART -----------------------------------------------------------------------------------


def test_hypersparse_gradient_is_that_of_its_regulariser_whose_value_is_zero():
    """R = Σ|w|·Σtanh(s|w|)/sg(Σtanh(s|w|)) - Σ|w| by autograd; the first factor is a constant of its product, too."""
    torch.manual_seed(0)
    w = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    got = HyperSparse(sparsity=0.75).gradient(w)
    flat = torch.cat([x.flatten() for x in w.values()]).double().requires_grad_()
    s = np.arctanh(1 / np.sqrt(3)) / flat.detach().abs().sort().values[16]  # floor(.75·22)
    total = torch.tanh(s * flat.abs()).sum()
    size = flat.abs().sum()
    regulariser = size * total / total.detach() - size
    assert float(regulariser.detach()) == pytest.approx(0, abs=1e-12)
    regulariser.backward()
    torch.testing.assert_close(torch.cat([x.flatten() for x in got.values()]), flat.grad.float())


def test_hypersparse_strength_grows_after_the_warm_up():
    art = HyperSparse(0.9, rate=1e-3, growth=2.0, warm_up=3)
    assert [art.strength(e) for e in (0, 3, 4, 6)] == pytest.approx([1e-3, 1e-3, 2e-3, 8e-3])
    w = {"w": nn.Parameter(torch.tensor([0.1, -0.2, 0.4, 1.0]))}
    w["w"].grad = torch.ones(4)
    HyperSparse(0.5, rate=0.1, growth=1.0).add_gradient(w, epoch=0)
    assert w["w"].grad.tolist() == pytest.approx([1.13712, 0.87336, 1.09391, 1.01947], abs=1e-5)


def test_hypersparse_of_weights_that_are_zero_is_finite():
    gradient = HyperSparse(0.5).gradient({"w": torch.tensor([0.0, 0.0, 0.0, 1.0])})["w"]
    assert gradient.isfinite().all()
    assert not HyperSparse(0.5).gradient({"w": torch.zeros(4)})["w"].any()


def test_art_stops_when_the_mean_beats_the_dense_model_and_keeps_the_middle_mask():
    """Means of 3: .70, .78, .86 > .85. The best buffer is epochs 2, 3, 4; worse ones change nothing."""
    art = ARTController(dense_accuracy=0.85, sparsity=0.5)
    seen = [art.observe(a, {"epoch": torch.tensor(i)}) for i, a in enumerate([0.6, 0.7, 0.8, 0.84, 0.94])]
    assert seen == [False, False, False, False, True]
    assert art.best == pytest.approx(0.86)
    assert int(art.masks["epoch"]) == 3
    assert art.observe(0.1, {"epoch": torch.tensor(5)})
    assert int(art.masks["epoch"]) == 3


def test_art_fixes_the_mask_on_trained_weights():
    """As its docstring says: a Sparsifier of sparsity 0, which changes nothing, then set_masks."""
    model = network()
    trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights = {n: p for n, p in trained.items() if p.ndim > 1}
    masks = ARTController(dense_accuracy=0.9, sparsity=0.9).prune(weights)
    size = sum(w.numel() for w in weights.values())
    assert sum(int(m.sum()) for m in masks.values()) == size - int(0.9 * size)
    sparsifier = sl.Sparsifier(model, sl.static(), sparsity=0.0)
    sparsifier.set_masks(masks)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), trained[name] * mask)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    train(model, optimizer, 0, 3)
    assert all(not model.get_parameter(n)[~m].any() for n, m in masks.items())
    assert sparsifier.nnz == size - int(0.9 * size)


# ---- AP and APP --------------------------------------------------------------------------------------------


def test_ap_removes_the_least_and_then_still_negative_weights():
    """Of 10, 30 % go: 20 % by |w| (.1 and -.2), then 10 % negative: -.5, -.6 and -.9 moved by .3, .1 and .2."""
    w = {"a": torch.tensor([0.1, -0.2, 0.3, 0.4, -0.5]), "b": torch.tensor([-0.6, 0.7, 0.8, -0.9, 1.0])}
    start = {"a": torch.tensor([0.0, 0.0, 0.3, 0.4, -0.2]), "b": torch.tensor([-0.5, 0.7, 0.8, -0.7, 0.0])}
    masks = {n: torch.ones(5, dtype=torch.bool) for n in w}
    got = activating_while_pruning(w, start, masks, prune=0.3, activate=0.1)
    assert {n: active(m) for n, m in got.items()} == {"a": [2, 3, 4], "b": [1, 2, 3, 4]}
    more = activating_while_pruning(w, start, masks, prune=0.4, activate=0.2)
    assert {n: active(m) for n, m in more.items()} == {"a": [2, 3, 4], "b": [1, 2, 4]}
    # more than there are: -.6 and -.9 go; -.5 is the largest of its layer and stays
    every = activating_while_pruning(w, start, masks, prune=0.5, activate=0.5)
    assert {n: active(m) for n, m in every.items()} == {"a": [0, 2, 3, 4], "b": [1, 2, 4]}
    second = activating_while_pruning(w, start, got, prune=1 / 7, activate=0.0)
    assert {n: active(m) for n, m in second.items()} == {"a": [3, 4], "b": [1, 2, 3, 4]}


def test_app_prunes_by_global_snip_before_each_megabatch():
    assert app_densities(4, last=10) == pytest.approx([0.8, 0.8**4, 0.8**7, 0.8**10])
    assert app_densities(1, last=10) == pytest.approx([0.8])
    model = network()
    sparsifier = sl.Sparsifier(model, sl.static(), sparsity=0.0)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
    size, losses = sparsifier.nnz, []
    for b in range(3):
        x, y = batch(50 + b)
        losses.append(lambda m, x=x, y=y: nn.functional.cross_entropy(m(x), y))
    before = sparsifier.masks
    for b in anytime_pruning(model, sparsifier, losses, app_densities(3, last=5), optimizer.base):
        now = {n: m.clone() for n, m in sparsifier.masks.items()}
        assert sparsifier.nnz == round(0.8 ** (1, 3, 5)[b] * size)
        assert all(not (m & ~before[n]).any() for n, m in now.items())
        assert all(not model.get_parameter(n)[~m].any() for n, m in now.items())
        train(model, optimizer, 4 * b, 4 * b + 4)
        before = now
        expected = global_masks(snip_scores(model, losses[min(b + 1, 2)]), round(0.8 ** (3, 5, 5)[b] * size), before)
        if b == 1:
            third = expected
    assert all(torch.equal(m, third[n]) for n, m in sparsifier.masks.items())
    for name, mask in sparsifier.masks.items():
        assert not optimizer.state[model.get_parameter(name)]["momentum_buffer"][~mask].any()


def test_app_needs_as_many_densities_as_megabatches():
    model = network()
    sparsifier = sl.Sparsifier(model, sl.static(), sparsity=0.0)
    loss = lambda m: m(batch(0)[0]).square().mean()  # noqa: E731
    for losses, densities, text in (
        ([loss], [0.8, 0.6], "there are 1 megabatches"),
        ([loss] * 2, [0.8], "1 densities"),
    ):
        with pytest.raises(sl.SparsityError, match=text):
            list(anytime_pruning(model, sparsifier, losses, densities))


# ---- DRESS -------------------------------------------------------------------------------------------------


def test_dress_masks_by_hand():
    """Rows of 4 of 6; three quarters and a half of that; one row is ablated."""
    w = torch.tensor([[6.0, 5, 4, 3, 9, 9], [1, 9, -2, 9, 3, -4], [7, 7, 7, 7, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    wide, middle, thin = row_masks(w, mask, [0.6, 0.45, 0.3])
    assert torch.equal(wide, mask)
    assert [active(row) for row in middle] == [[0, 1, 2], [2, 4, 5], []]
    assert [active(row) for row in thin] == [[0, 1], [4, 5], []]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Linear(10, 4)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def nested_normed(**options):
    model = Normed()
    sparsifier = sl.Sparsifier(model, sl.static(structure=sl.ConstantFanIn()), sparsity=0.5, **options)
    nested = NestedSubnets(model, sparsifier, [0.5, 0.25, 0.1])
    return nested, sl.SparseOptimizer(torch.optim.SGD(nested.parameters(), lr=0.1), sparsifier)


def test_dress_subnets_are_nested_balanced_and_switched_at_run_time():
    nested, optimizer = nested_normed(distribution=uniform)
    data = torch.randn(64, 12), torch.randint(4, (64,))

    @torch.no_grad()
    def losses():
        return [float(nn.functional.cross_entropy(nested(data[0], subnet=k), data[1])) for k in range(3)]

    first = losses()
    for _ in range(20):
        optimizer.zero_grad()
        (sum(nn.functional.cross_entropy(nested(data[0], subnet=k), data[1]) for k in range(3)) / 3).backward()
        optimizer.step()
    nested.refresh()
    nested.eval()
    for k, fan_in in enumerate([(6, 5), (3, 2), (1, 1)]):  # of 12 and 10 inputs
        exported = nested.export(k)
        for name, n in zip(("first.weight", "last.weight"), fan_in, strict=True):
            counts = (exported.get_parameter(name) != 0).sum(1)
            assert counts.tolist() == [n] * len(counts)
            assert torch.equal(exported.get_parameter(name) != 0, nested.masks(k)[name])
        torch.testing.assert_close(nested(data[0], subnet=k), exported.eval()(data[0]))
    means = [nested.export(k).norm.running_mean for k in range(3)]
    assert not torch.equal(means[0], means[1])
    assert not torch.equal(means[1], means[2])
    assert all(now < then for now, then in zip(losses(), first, strict=True))


def test_dress_follows_the_layers_own_density_and_every_change_of_masks():
    nested, _ = nested_normed()  # erk gives each layer another density
    sparsifier = nested.sparsifier
    for name, mask in sparsifier.masks.items():
        assert torch.equal(nested.masks(0)[name], mask)
        fan_in = int(mask.sum(1)[0])
        assert nested.masks(1)[name].sum(1).tolist() == [round(fan_in / 2)] * len(mask)
    other = torch.zeros(4, 10, dtype=torch.bool)
    other[:, :2] = True
    sparsifier.set_masks({"last.weight": other})
    assert torch.equal(nested.masks(0)["last.weight"], other)
    assert not (nested.masks(1)["last.weight"] & ~other).any()


def test_dress_refuses_what_it_cannot_nest():
    nested, _ = nested_normed()
    for subnet in (3, -1):
        with pytest.raises(sl.SparsityError, match="`subnet` must be one of 0 to 2"):
            nested(torch.randn(4, 12), subnet=subnet)
    sparsifier = nested.sparsifier
    for densities in ([], [0.2, 0.5], [0.5, 0.5], [1.5, 0.1], [0.5, 0.0]):
        with pytest.raises(sl.SparsityError, match="`densities` must descend"):
            NestedSubnets(nested.model, sparsifier, densities)
    model = Normed()
    with pytest.raises(sl.SparsityError, match="needs a sparsifier with the structure"):
        NestedSubnets(model, sl.Sparsifier(model, sl.static(), sparsity=0.5), [0.5, 0.1])


# ---- random search -----------------------------------------------------------------------------------------


def test_random_search_takes_the_best_of_its_trials_and_leaves_the_model_as_it_was():
    model = Normed().train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    x, y = torch.randn(32, 12), torch.randint(4, (32,))
    seen = []

    def loss(m):
        value = nn.functional.cross_entropy(m(x), y)
        seen.append((float(value), (m.first.weight != 0).clone()))
        return value if len(seen) > 1 else value * torch.nan  # NaN never wins

    masks = random_search(model, loss, density=0.4, trials=5)
    assert len(seen) == 5
    assert torch.equal(masks["first.weight"], min(seen[1:], key=lambda trial: trial[0])[1])
    assert list(masks) == ["first.weight"]  # the last layer is left whole
    assert masks["first.weight"].any(1).sum() == 4  # nodes: whole rows
    assert torch.equal(masks["first.weight"].any(1), masks["first.weight"].all(1))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    sparsifier = sl.Sparsifier(model, sl.static(), sparsity=0.0)
    sparsifier.set_masks(masks)
    assert torch.equal(model.first.weight, state["first.weight"] * masks["first.weight"])


def test_random_search_restores_the_model_when_the_loss_fails():
    model = network()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        random_search(model, lambda m: 1 / 0, density=0.5, trials=2)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
