"""N:M training: the engine's swap of dense and forward weights against autograd, and methods against each other."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import sparselearn as sl
from sparselearn.methods import dense_then, then_dense
from sparselearn.methods.n_m import mvue_24, mvue_pairs, permutation_search

NM24 = sl.NM(2, 4)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2, foreach=False),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


def batches(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(8, 16, generator=generator) for _ in range(n)]


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x[:, :8].sin()).square().mean()


def train(method, steps: int = 12, optimizer: str = "sgd", model=None, **options):
    model = network() if model is None else model
    sparsifier = sl.Sparsifier(model, method, **options)
    wrapper = sl.SparseOptimizer(OPTIMIZERS[optimizer](model.parameters()), sparsifier)
    for x in batches(steps):
        wrapper.zero_grad()
        loss_of(model, x).backward()
        wrapper.step()
    return model, sparsifier, wrapper


def train_dense(steps: int = 12, optimizer: str = "sgd"):
    model = network()
    base = OPTIMIZERS[optimizer](model.parameters())
    for x in batches(steps):
        base.zero_grad()
        loss_of(model, x).backward()
        base.step()
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def best_two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """A second implementation: sort each group of four, ties to the lower index."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 4):
            group = sorted(range(start, start + 4), key=lambda i: (-abs(float(weight.detach()[row, i])), i))
            mask[row, group[:2]] = True
    return mask


class SRSTE(torch.autograd.Function):
    """SR-STE as its paper writes it: y uses W⊙M, W gets g + λ·(1 - M)⊙W."""

    @staticmethod
    def forward(ctx, weight, rate):
        mask = best_two_of_four(weight)
        ctx.save_for_backward(weight, mask)
        ctx.rate = rate
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        return grad + ctx.rate * (~mask * weight), None


@pytest.mark.parametrize("rate", [0.0, 0.01])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_swap_is_autograds_sr_ste_over_100_steps(optimizer, rate) -> None:
    model, sparsifier, _ = train(sl.sr_ste(NM24, decay=rate), 100, optimizer)
    other = network()
    base = OPTIMIZERS[optimizer](other.parameters())
    for x in batches(100):
        base.zero_grad()
        weights = [SRSTE.apply(other[i].weight, rate) for i in (0, 2)]
        hidden = nn.functional.linear(x, weights[0], other[0].bias).tanh()
        y = nn.functional.linear(hidden, weights[1], other[2].bias)
        (y - x[:, :8].sin()).square().mean().backward()
        base.step()
    with sparsifier.dense_weights():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    for i in (0, 2):
        mask = best_two_of_four(other[i].weight)
        assert torch.equal(sparsifier.masks[f"{i}.weight"], mask)
        assert not model[i].weight[~mask].any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sr_ste_without_decay_is_ste(optimizer) -> None:
    assert equal(train(sl.sr_ste(NM24, decay=0.0), 12, optimizer)[0], train(sl.ste(NM24), 12, optimizer)[0])
    assert not equal(train(sl.sr_ste(NM24, decay=1e-2), 12, optimizer)[0], train(sl.ste(NM24), 12, optimizer)[0])


def test_the_decay_is_added_once_a_step_and_once_for_each_micro_batch_where_that_is_asked() -> None:
    def dense(micro, k):
        model = network()
        sparsifier = sl.Sparsifier(model, sl.sr_ste(NM24, decay=0.1, micro_batches=k))
        wrapper = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
        x = batches(1)[0]
        for part in x.chunk(micro):
            (loss_of(model, part) / micro).backward()
        before = copy.deepcopy(dict(sparsifier.state.layers)["0.weight"].dense)
        grad, mask = model[0].weight.grad.clone(), sparsifier.masks["0.weight"].clone()
        wrapper.step()
        moved = before - sparsifier.state.layers["0.weight"].dense
        return moved, 0.1 * (grad + 0.1 * k * (~mask * before))

    for micro, k in ((1, 1), (2, 1), (2, 2)):
        moved, expected = dense(micro, k)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_n_of_n_is_dense(optimizer) -> None:
    for method in (sl.ste(sl.NM(4, 4)), sl.sr_ste(sl.NM(4, 4), decay=0.1), sl.mdgf(sl.NM(4, 4), stop=5)):
        assert equal(train(method, 12, optimizer)[0], train_dense(12, optimizer))


@pytest.mark.parametrize("gradient", ["ste", "chain"])
def test_a_decaying_mask_of_one_is_dense_and_of_zero_is_a_hard_mask(gradient) -> None:
    still_one = sl.mdgf(NM24, start=20, stop=30, gradient=gradient)
    assert equal(train(still_one)[0], train_dense())
    flat = sl.mdgf(NM24, stop=100, rate=0.0, gradient=gradient)  # β = 1 at all times
    assert equal(train(flat)[0], train_dense())
    gone = sl.mdgf(NM24, stop=1, gradient=gradient)
    if gradient == "ste":
        later = train(gone, 40)[0]
        assert all(torch.equal(later[i].weight != 0, best_two_of_four(later[i].weight)) for i in (0, 2))


def test_the_chain_gradient_is_autograds_through_the_decaying_mask() -> None:
    method = sl.mdgf(NM24, stop=10, gradient="chain")
    model = network()
    dense = [model[i].weight.detach().clone() for i in (0, 2)]
    sparsifier = sl.Sparsifier(model, method)
    wrapper = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    biases = [model[i].bias.detach().clone() for i in (0, 2)]
    for step, x in enumerate(batches(10)):
        beta = 1 - step / 10
        leaves = [w.clone().requires_grad_() for w in dense]
        b = [v.clone().requires_grad_() for v in biases]
        masks = [best_two_of_four(w) for w in dense]
        forward = [w * (m + beta * ~m) for w, m in zip(leaves, masks, strict=True)]
        hidden = nn.functional.linear(x, forward[0], b[0]).tanh()
        y = nn.functional.linear(hidden, forward[1], b[1])
        (y - x[:, :8].sin()).square().mean().backward()
        dense = [(w - 0.1 * w.grad).detach() for w in leaves]
        biases = [(v - 0.1 * v.grad).detach() for v in b]
        wrapper.zero_grad()
        loss_of(model, x).backward()
        wrapper.step()
        with sparsifier.dense_weights():
            torch.testing.assert_close(model[0].weight.detach(), dense[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(model[2].weight.detach(), dense[1], rtol=1e-5, atol=1e-6)


def test_the_linear_and_the_exponential_decay_by_hand() -> None:
    linear = sl.mdgf(NM24, start=10, stop=20).residual
    assert [linear(t) for t in (0, 9, 10, 15, 19, 20, 99)] == pytest.approx([1, 1, 1, 0.5, 0.1, 0, 0])
    exponential = sl.mdgf(NM24, start=0, stop=100, kind="exponential").residual
    assert [exponential(t) for t in (0, 50, 99, 100)] == pytest.approx([1, 0.1, 0.01 ** (99 / 100), 0])


def test_sdgf_goes_through_its_frames() -> None:
    stages = sl.sdgf(1, 8, start=4, stop=12).stage
    assert [stages(t) for t in (0, 3, 4, 6, 7, 9, 12, 50)] == [
        None, None, sl.NM(7, 8), sl.NM(7, 8), sl.NM(4, 8), sl.NM(2, 8), sl.NM(1, 8), sl.NM(1, 8),
    ]  # fmt: skip
    stages = sl.sdgf(2, 4, stop=9, kind="geometric").stage
    assert [stages(t) for t in (0, 3, 6, 9)] == [sl.NM(16, 32), sl.NM(8, 16), sl.NM(4, 8), sl.NM(2, 4)]


@pytest.mark.parametrize(
    ("method", "n", "m"),
    [
        (sl.ste(sl.NM(1, 4)), 1, 4), (sl.sr_ste(sl.NM(2, 4)), 2, 4), (sl.mdgf(sl.NM(1, 8), stop=8), 1, 8),
        (sl.sdgf(1, 8, stop=8), 1, 8), (sl.sdgf(1, 4, stop=8, kind="geometric"), 1, 4), (sl.s_ste(), 2, 4),
        (sl.cast(sl.NM(2, 4), decay=1e-3, stop=8), 2, 4), (dense_then(sl.ste(NM24), start=6), 2, 4),
        (sl.n_m_rigl(2, 4, stop=10, every=3, grow=sl.criteria.gradient), 2, 4),
    ],
)  # fmt: skip
def test_the_trained_model_has_exactly_n_of_m(method, n, m) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    exclude = ["0.*"] if method == sl.sdgf(1, 4, stop=8, kind="geometric") else []  # 8:32 needs a fan-in of 32
    model, sparsifier, _ = train(method, 12, "adamw", model, exclude=exclude)
    for name, mask in sparsifier.masks.items():
        groups = mask.view(mask.shape[0], -1, m).sum(-1)
        assert bool((groups == n).all())
        weight = dict(model.named_parameters())[name]
        assert not weight[~mask].any()


def test_fine_tuning_after_the_masks_is_dense() -> None:
    model, sparsifier, _ = train(then_dense(sl.ste(NM24), stop=6), 12)
    assert sparsifier.sparsity == 0
    assert int((model[0].weight == 0).sum()) == 0
    assert sl.pretrain_24(steps=60).stage(49) == sl.TransposableNM(2, 4)
    assert sl.pretrain_24(steps=60).stage(50) is None


def test_soft_thresholds_by_hand() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -2.0, 1.0, 3.0]]))
    sl.Sparsifier(model, sl.s_ste())
    soft = torch.tensor([[0.0, -1.0, 0.0, 2.0]])  # minus the third largest magnitude, 1
    beta = (2.0 * 1.0 + 3.0 * 2.0) / (1.0 + 4.0)  # <W, S(W)> / <S(W), S(W)>
    torch.testing.assert_close(model.weight.detach(), beta * soft)


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        (sl.sr_ste(NM24, decay=0.01, every=3, stop=8), (2, 3, 8)), (sl.mdgf(NM24, start=3, stop=9), (2, 3, 5, 9)),
        (sl.sdgf(1, 4, start=2, stop=8), (1, 2, 5, 8)), (sl.pretrain_24(steps=12, every=4), (3, 4, 10, 11)),
        (sl.s_ste(), (5,)), (sl.cast(NM24, decay=1e-3, stop=6), (5, 6)), (dense_then(sl.ste(NM24), start=5), (4, 5)),
    ],
)  # fmt: skip
def test_a_run_resumed_in_any_phase_is_bit_for_bit_the_whole_run(method, steps) -> None:
    whole, sparsifier, _ = train(method, 12, "adamw")
    for stop in steps:
        first, one, wrapper = train(method, stop, "adamw")
        with one.dense_weights():
            weights = copy.deepcopy(first.state_dict())
        saved, optimizer = one.state_dict(), copy.deepcopy(wrapper.base.state_dict())
        model = network(seed=5)
        model.load_state_dict(weights)
        again = sl.Sparsifier(model, method, state_dict=saved)
        base = OPTIMIZERS["adamw"](model.parameters())
        base.load_state_dict(optimizer)
        wrapper = sl.SparseOptimizer(base, again)
        for x in batches(12)[stop:]:
            wrapper.zero_grad()
            loss_of(model, x).backward()
            wrapper.step()
        assert equal(model, whole), stop
        assert all(torch.equal(again.masks[name], mask) for name, mask in sparsifier.masks.items())


def test_masked_weights_are_refused_where_dense_ones_are_needed() -> None:
    model, sparsifier, _ = train(sl.sr_ste(NM24), 4)
    other = network()
    other.load_state_dict(model.state_dict())  # the forward weights, not the dense ones
    with pytest.raises(sl.SparsityError, match="dense_weights"):
        sl.Sparsifier(other, sl.sr_ste(NM24), state_dict=sparsifier.state_dict())


def test_mvue_is_unbiased_by_enumeration() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.rand(2000, 4, generator=generator, dtype=torch.float64).pow(3)
    groups[:4] = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 5], [0, 0, 0, 0], [1, 1, 1, 9]])
    magnitude = groups.sort(-1).values
    probability, amount = mvue_pairs(magnitude)
    assert float((probability.sum(-1) - 1).abs().max()) < 1e-12
    assert float(probability.min()) >= 0
    assert float(((probability.unsqueeze(-1) * amount).sum(1) - magnitude).abs().max()) < 1e-12
    assert int((amount != 0).sum(-1).max()) <= 2
    drawn = mvue_24(groups.float() * torch.tensor([1, -1, 1, -1.0]))
    assert int((drawn.view(-1, 4) != 0).sum(-1).max()) <= 2


def test_mvue_has_the_least_variance_that_two_of_four_allow() -> None:
    """Where no value is above half the sum, each is kept at S/2 with probability 2a/S: variance Σ a·(S/2 - a)."""
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    probability, amount = mvue_pairs(a)
    second = (probability.unsqueeze(-1) * amount.square()).sum(1)
    assert float((second - a.square()).sum()) == pytest.approx(sum(v * (5 - v) for v in (1, 2, 3, 4)))


def test_a_permutation_keeps_more_magnitude_and_the_network_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
    x = torch.randn(4, 8)
    weight = model[2].weight.detach()
    order = permutation_search(weight, NM24)
    assert sorted(order.tolist()) == list(range(32))

    def kept(w: torch.Tensor) -> float:
        return float((w.abs() * best_two_of_four(w)).sum())

    assert kept(weight[:, order]) > kept(weight) * 1.005
    before = model(x)
    with torch.no_grad():
        model[2].weight.copy_(weight[:, order])
        model[0].weight.copy_(model[0].weight[order].clone())
        model[0].bias.copy_(model[0].bias[order].clone())
    torch.testing.assert_close(model(x), before)


def test_the_exact_transposable_solver_is_never_worse_than_the_greedy_one() -> None:
    """By the list of all 90 masks that have two in every row and column of a tile."""
    rows = [torch.tensor([i in pair for i in range(4)]) for pair in itertools.combinations(range(4), 2)]
    masks = torch.stack([torch.stack(c) for c in itertools.product(rows, repeat=4)])
    masks = masks[(masks.sum(1) == 2).all(-1)]
    assert len(masks) == 90
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
    mask = sl.TransposableNM(2, 4).topk(weight.abs(), 800)
    tiles = weight.abs().unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).reshape(-1, 4, 4)
    best = (tiles.unsqueeze(1) * masks).sum((2, 3)).amax(1)
    chosen = (weight.abs() * mask).unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).reshape(-1, 4, 4)
    torch.testing.assert_close(chosen.sum((1, 2)), best)
    assert math.isclose(float(mask.sum()), 800)


def test_sr_ste_by_hand() -> None:
    """W = (1, 2, 3, 4), g = .1, λ = .1, 2:4: M = (0, 0, 1, 1) and the gradient is (.2, .3, .1, .1)."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    sparsifier = sl.Sparsifier(layer, sl.sr_ste(NM24, decay=0.1))
    optimizer = sl.SparseOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), sparsifier)
    assert layer.weight.tolist() == [[0, 0, 3, 4]]
    layer(torch.full((1, 4), 0.1)).sum().backward()
    optimizer.step()
    with sparsifier.dense_weights():
        torch.testing.assert_close(layer.weight.data, torch.tensor([[0.8, 1.7, 2.9, 3.9]]))
    torch.testing.assert_close(layer.weight.data, torch.tensor([[0, 0, 2.9, 3.9]]))
