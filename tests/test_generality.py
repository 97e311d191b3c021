"""What a new method may need is there already: tiny methods of our own, none of which the engine knows."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sparselearn
from sparselearn import DropGrow, SparseOptimizer, Sparsifier, SparsityError, UpdateSchedule, criteria, gmp, rigl
from sparselearn.distributions import erk, uniform
from sparselearn.methods import global_ranking
from sparselearn.schedules import constant, cubic, linear, ramp, square_wave


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 6))


def batches(n, seed=9):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 12, generator=g), torch.randint(6, (8,), generator=g)) for _ in range(n)]


def build(method, *, lr=0.05, adam=False, **options):
    model = network()
    sparsifier = Sparsifier(model, method, **{"sparsity": 0.8, **options})
    base = (
        torch.optim.AdamW(model.parameters(), lr=lr)
        if adam
        else torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    )
    return model, sparsifier, SparseOptimizer(base, sparsifier)


def step(model, optimizer, batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def steps(model, optimizer, data):
    for batch in data:
        step(model, optimizer, batch)


def check_exact(model, sparsifier):
    for name, mask in sparsifier.masks.items():
        assert int(mask.sum()) == sparsifier.state.layers[name].nnz > 0
        assert not model.get_parameter(name)[~mask].any()


# ---- a density that changes with time --------------------------------------------------------------------

TOTAL = 12 * 16 + 16 * 10 + 10 * 6


@pytest.mark.parametrize("distribution", [erk, uniform])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gmp_follows_the_cubic_and_reaches_the_final_nnz(scope, distribution):
    model, sparsifier, optimizer = build(gmp(stop=50, every=1, scope=scope), distribution=distribution)
    assert sparsifier.nnz == TOTAL
    sparsity = cubic(0.0, 0.8, stop=49)
    seen = {n: m.clone() for n, m in sparsifier.masks.items()}
    for t, batch in enumerate(batches(55)):
        step(model, optimizer, batch)
        check_exact(model, sparsifier)
        assert sparsifier.nnz == round((1 - sparsity(t)) * TOTAL)
        for name, mask in sparsifier.masks.items():
            assert not (mask & ~seen[name]).any()  # masks only shrink
            seen[name] = mask.clone()
    assert sparsifier.nnz == round(0.2 * TOTAL)
    if scope == "layer":
        wanted = distribution({n: m.shape for n, m in seen.items()}, 0.2)
        assert all(abs(int(m.sum()) - wanted[n] * m.numel()) < 2 for n, m in seen.items())


@pytest.mark.parametrize("every", [1, 7, 30])
def test_gmp_with_any_period_reaches_the_final_nnz_at_the_last_update_before_stop(every):
    model, sparsifier, optimizer = build(gmp(stop=61, start=4, every=every, initial_density=0.7))
    assert sparsifier.nnz == round(0.7 * TOTAL)
    last = 4 + (60 - 4) // every * every
    for t, batch in enumerate(batches(62)):
        step(model, optimizer, batch)
        assert (sparsifier.nnz == round(0.2 * TOTAL)) == (t >= last) or sparsifier.nnz - round(0.2 * TOTAL) < 2


def test_gmp_with_one_update_prunes_by_magnitude_then():
    model, sparsifier, optimizer = build(gmp(stop=6, start=5, every=10))
    data = batches(7)
    for t in range(5):
        step(model, optimizer, data[t])
        assert sparsifier.nnz == TOTAL
    step(model, optimizer, data[5])
    assert sparsifier.nnz == round(0.2 * TOTAL)
    with pytest.raises(SparsityError, match=r"^`gmp` needs an update step after step 0 .* every=100 and stop=50"):
        gmp(stop=50)


def test_gmp_never_has_to_grow_a_rounded_weight():
    """Many equal layers on a slow slope: which of them are rounded up must not wander."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, 7, bias=False) for n in range(5, 14)))
    sparsifier = Sparsifier(model, gmp(stop=300, every=1), sparsity=0.85)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    total = sum(p.numel() for p in model.parameters())
    for _ in range(301):
        sparsifier.before_step(optimizer)
        optimizer.step()
        sparsifier.after_step(optimizer)
    assert sparsifier.nnz == round(0.15 * total)


def test_gmp_override_dense_stays_dense():
    model, sparsifier, optimizer = build(gmp(stop=20, every=2, initial_density=0.5), overrides={"4.*": 0.0})
    for batch in batches(20):
        step(model, optimizer, batch)
        assert sparsifier.densities["4.weight"] == 1.0
    assert sparsifier.nnz - 60 == round(0.2 * (TOTAL - 60))


def test_square_wave_with_growth_and_reset():
    """AC/DC in five lines: dense and sparse phases, all optimizer state cleared when the density rises."""
    wave = square_wave(1.0, 0.0, high_steps=4, low_steps=4, stop=20)
    method = DropGrow(
        grow=criteria.gradient,
        updates=UpdateSchedule(every=4, stop=21, drop_fraction=constant(0.0)),
        density=ramp(wave, initial=1.0),
        optimizer_state="reset",
    )
    model, sparsifier, optimizer = build(method, distribution=uniform)
    densities = []
    for t, batch in enumerate(batches(24)):
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer, batch)
        check_exact(model, sparsifier)
        densities.append(round(sparsifier.nnz / TOTAL, 2))
        slots = {n: optimizer.state[model.get_parameter(n)]["momentum_buffer"] for n in sparsifier.masks}
        if t in (8, 16):  # sparse -> dense
            assert not any(slot.any() for slot in slots.values())
            assert optimizer.state[model[0].bias]["momentum_buffer"].any()  # not sparse, not reset
        else:
            assert all(slot.any() for slot in slots.values())
        for name, slot in slots.items():
            assert not slot[~sparsifier.masks[name]].any()
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert densities == [1.0] * 4 + [0.2] * 4 + [1.0] * 4 + [0.2] * 4 + [1.0] * 4 + [0.2] * 4


def test_density_that_rises_grows_where_the_gradient_says():
    method = DropGrow(
        grow=criteria.gradient,
        updates=UpdateSchedule(every=5, stop=11, drop_fraction=constant(0.0)),
        density=ramp(linear(1.0, stop=10), initial=0.1),
    )
    torch.manual_seed(0)
    layer = nn.Linear(20, 10, bias=False)
    sparsifier = Sparsifier(layer, method, sparsity=0.7)
    optimizer = SparseOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), sparsifier)
    counts = []
    for t in range(12):
        old, grad = sparsifier.masks["weight"].clone(), torch.randn(10, 20)
        layer.weight.grad = grad.clone()
        optimizer.step()
        new = sparsifier.masks["weight"]
        counts.append(int(new.sum()))
        assert not (old & ~new).any()
        if t in (5, 10):
            assert grad[new & ~old].abs().min() > grad[~new].abs().max()
    assert counts == [20] * 5 + [40] * 5 + [60] * 2


# ---- re-allocation ---------------------------------------------------------------------------------------


def test_global_ranking_with_growth():
    method = DropGrow(
        grow=criteria.gradient,
        updates=UpdateSchedule(every=3, stop=100, drop_fraction=0.3),
        reallocate=global_ranking(),
    )
    model, sparsifier, optimizer = build(method)
    with torch.no_grad():
        model[2].weight.mul_(1e-4)  # the ranking takes from this layer, but not all
    nnz, first = sparsifier.nnz, sparsifier.state.layers["2.weight"].nnz
    for batch in batches(20):
        step(model, optimizer, batch)
        check_exact(model, sparsifier)
        assert sparsifier.nnz == nnz
    assert 0 < sparsifier.state.layers["2.weight"].nnz <= first


@dataclass(frozen=True)
class Shift:
    """Moves weights from the layer with the smallest mean |w| to the one with the largest."""

    amount: int
    gift: int = 0  # breaks the total

    def __call__(self, layers, nnz):
        means = [float(layer.weight.abs().sum() / layer.mask.sum()) for layer in layers]
        result = list(nnz)
        result[means.index(min(means))] -= self.amount
        result[means.index(max(means))] += self.amount + self.gift
        return result


def moving(reallocate):
    return DropGrow(
        grow=criteria.random,
        updates=UpdateSchedule(every=2, stop=100, drop_fraction=constant(0.1)),
        reallocate=reallocate,
    )


def test_own_reallocation_conserves_the_total():
    model, sparsifier, optimizer = build(moving(Shift(3)), sparsity=0.5)
    counts = [tuple(layer.nnz for layer in sparsifier.state.layers.values())]
    for batch in batches(5):
        step(model, optimizer, batch)
        check_exact(model, sparsifier)
        counts.append(tuple(layer.nnz for layer in sparsifier.state.layers.values()))
    assert counts[0] == counts[1] == counts[2]
    assert sorted(b - a for a, b in zip(counts[2], counts[3], strict=True)) == [-3, 0, 3]
    assert {sum(c) for c in counts} == {round(0.5 * TOTAL)}


def test_reallocation_that_breaks_the_total_raises():
    model, _, optimizer = build(moving(Shift(3, gift=1)), sparsity=0.5)
    with pytest.raises(SparsityError) as error:
        steps(model, optimizer, batches(3))
    total = round(0.5 * TOTAL)
    assert str(error.value) == f"`reallocate` must keep the total of {total} weights; it gave {total + 1}."


def test_reallocation_that_empties_a_layer_raises():
    model, _, optimizer = build(moving(lambda layers, nnz: [nnz[0], nnz[1] + nnz[2], 0]), sparsity=0.5)
    with pytest.raises(SparsityError) as error:
        steps(model, optimizer, batches(3))
    assert str(error.value) == (
        "`reallocate` gave `4.weight` 0 active weights; it must give every layer at least one and at most its "
        "size, here 60."
    )


# ---- a criterion with its own state ----------------------------------------------------------------------


@dataclass(frozen=True)
class Visits:
    """How many mask periods each weight has been active."""

    key: str = "visits"

    def init(self, layer):
        return layer.mask.to(torch.int32)

    def after_step(self, layer, value):
        return value

    def after_update(self, layer, value):
        return value + layer.mask


@dataclass(frozen=True)
class Average:
    """A running mean of |g| of what the optimizer was given."""

    key: str = "average"

    def init(self, layer):
        return torch.zeros_like(layer.weight)

    def after_step(self, layer, value):
        return value if layer.grad is None else 0.9 * value + 0.1 * layer.grad.abs()

    def after_update(self, layer, value):
        return value * layer.mask


@dataclass(frozen=True)
class Ever:
    """A bool tracker, which is saved as bits."""

    key: str = "ever"

    def init(self, layer):
        return layer.mask.clone()

    def after_step(self, layer, value):
        return value

    def after_update(self, layer, value):
        return value | layer.mask


@dataclass(frozen=True)
class least_visited:
    trackers: tuple = (Visits(), Ever())

    def __call__(self, layer):
        return -layer.memory["visits"].float() + 0.5 * layer.rand()


@dataclass(frozen=True)
class average_gradient:
    trackers: tuple = (Average(), Visits())

    def __call__(self, layer):
        return layer.memory["average"]


def tracking():
    return DropGrow(
        drop=average_gradient(),
        grow=least_visited(),
        updates=UpdateSchedule(every=3, stop=100, drop_fraction=constant(0.4)),
    )


def test_trackers_count_and_are_shared():
    method = tracking()
    assert [t.key for t in method.trackers] == ["average", "visits", "ever"]
    model, sparsifier, optimizer = build(method)
    counts = {n: m.int() for n, m in sparsifier.masks.items()}
    ever = {n: m.clone() for n, m in sparsifier.masks.items()}
    for t, batch in enumerate(batches(13)):
        step(model, optimizer, batch)
        check_exact(model, sparsifier)
        for name, mask in sparsifier.masks.items():
            if t in (3, 6, 9, 12):
                counts[name] = counts[name] + mask
                ever[name] = ever[name] | mask
            memory = sparsifier.state.layers[name].memory
            assert torch.equal(memory["visits"], counts[name].int())
            assert torch.equal(memory["ever"], ever[name])
            assert not memory["average"][~mask].any()
    for name, layer in sparsifier.state.layers.items():  # least visited first: growth never returned to a weight
        assert int(ever[name].sum()) == layer.nnz + 4 * int(0.4 * layer.nnz)


@pytest.mark.parametrize("stop_at", [3, 4, 7])
def test_trackers_resume_bit_exactly(stop_at):
    data = batches(13)
    model, sparsifier, optimizer = build(tracking())
    for batch in data:
        step(model, optimizer, batch)

    first, _, optimizer1 = build(tracking())
    for batch in data[:stop_at]:
        step(first, optimizer1, batch)
    saved = {"model": first.state_dict(), "optimizer": optimizer1.state_dict()}
    second, sparsifier2, optimizer2 = build(tracking(), seed=77)
    second.load_state_dict(saved["model"])
    optimizer2.load_state_dict(saved["optimizer"])
    for batch in data[stop_at:]:
        step(second, optimizer2, batch)
    for name, layer in sparsifier.state.layers.items():
        other = sparsifier2.state.layers[name]
        assert torch.equal(layer.mask, other.mask)
        assert torch.equal(model.get_parameter(name), second.get_parameter(name))
        assert layer.memory.keys() == other.memory.keys()
        for key, value in layer.memory.items():
            assert value.dtype == other.memory[key].dtype
            assert torch.equal(value, other.memory[key]), key


def test_a_state_with_other_trackers_is_refused():
    _, with_trackers, _ = build(tracking())
    _, without, _ = build(rigl(stop=100, every=3))
    with pytest.raises(SparsityError) as error:
        without.load_state_dict(with_trackers.state_dict())
    assert str(error.value) == (
        "The checkpoint of `0.weight` and the method differ in what criteria remember: ['average', 'ever', "
        "'visits']. Build the sparsifier with the method that was saved."
    )


# ---- a fixed support -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "mapping"])
@pytest.mark.parametrize("grow", [criteria.gradient, criteria.random])
@pytest.mark.parametrize("exclude_dropped", [False, True])
def test_masks_never_leave_their_support(kind, grow, exclude_dropped):
    g = torch.Generator().manual_seed(3)
    support = 0.3
    if kind == "mapping":
        support = {"0.weight": torch.rand(16, 12, generator=g) < 0.4, "2.weight": torch.rand(10, 16, generator=g) < 0.5}
    method = DropGrow(
        grow=grow,
        updates=UpdateSchedule(every=2, stop=100, drop_fraction=constant(0.5)),
        exclude_dropped=exclude_dropped,
    )
    model, sparsifier, optimizer = build(method, support=support, distribution=uniform)
    supports = {n: layer.support for n, layer in sparsifier.state.layers.items()}
    assert (supports["4.weight"] is None) == (kind == "mapping")
    if kind == "float":
        assert sum(int(s.sum()) for s in supports.values()) == round(0.3 * TOTAL)
    nnz, seen = sparsifier.nnz, set()
    for batch in batches(14):
        step(model, optimizer, batch)
        check_exact(model, sparsifier)
        assert sparsifier.nnz == nnz
        for name, mask in sparsifier.masks.items():
            if supports[name] is not None:
                assert not (mask & ~supports[name]).any()
        seen.add(tuple(sparsifier.masks["0.weight"].flatten().tolist()))
    assert len(seen) > 1


def test_a_support_equal_to_the_mask_is_static():
    model, sparsifier, optimizer = build(rigl(stop=100, every=2), support=0.2, distribution=uniform)
    start = {n: m.clone() for n, m in sparsifier.masks.items()}
    for batch in batches(8):
        step(model, optimizer, batch)
    assert all(torch.equal(m, start[n]) for n, m in sparsifier.masks.items())


def test_support_survives_a_checkpoint():
    _, sparsifier, _ = build(rigl(stop=100, every=2), support=0.3, distribution=uniform)
    _, other, _ = build(rigl(stop=100, every=2), support=0.3, distribution=uniform, seed=5)
    before = other.state.layers["0.weight"].support
    assert not torch.equal(before, sparsifier.state.layers["0.weight"].support)
    other.load_state_dict(sparsifier.state_dict())
    assert torch.equal(other.state.layers["0.weight"].support, sparsifier.state.layers["0.weight"].support)


def test_support_errors():
    with pytest.raises(SparsityError) as error:
        build(rigl(stop=1000), support=0.1, distribution=uniform)
    assert str(error.value) == (
        "The support of `0.weight` must have shape [16, 12] and room for 38 active weights; it has shape [16, 12] "
        "and room for 19. Use a denser support."
    )
    with pytest.raises(SparsityError) as error:
        build(rigl(stop=1000), support={"4.weight": torch.ones(10, 6)}, distribution=uniform)
    assert str(error.value) == (
        "The support of `4.weight` must have shape [6, 10] and room for 12 active weights; it has shape [10, 6] "
        "and room for 60. Use a denser support."
    )
    with pytest.raises(SparsityError) as error:
        build(rigl(stop=1000), support={"5.weight": torch.ones(10, 6)})
    assert str(error.value) == "`support` names `5.weight`, which is not a sparse weight of the model."


# ---- sparse momentum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adam", [False, True])
def test_sparse_momentum_keeps_dense_state(adam):
    method = DropGrow(
        grow=criteria.momentum,
        updates=UpdateSchedule(every=3, stop=100, drop_fraction=constant(0.4)),
        optimizer_state="keep",
    )
    model, sparsifier, optimizer = build(method, adam=adam)
    for t, batch in enumerate(batches(7)):
        before = {n: m.clone() for n, m in sparsifier.masks.items()}
        step(model, optimizer, batch)
        check_exact(model, sparsifier)
        for name, mask in sparsifier.masks.items():
            state = optimizer.state[model.get_parameter(name)]
            if adam:
                score = (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)).abs()
            else:
                score = state["momentum_buffer"].abs()
            assert (score[~mask] != 0).float().mean() > 0.5  # dense, not zeroed by the update either
            grown = mask & ~before[name]
            assert bool(grown.any()) == (t in (3, 6))
            if t in (3, 6):
                assert score[grown].min() >= score[~mask & ~before[name]].max()


def test_momentum_without_momentum_says_so():
    method = DropGrow(grow=criteria.momentum, updates=UpdateSchedule(every=1, stop=9), optimizer_state="keep")
    model = network()
    sparsifier = Sparsifier(model, method, sparsity=0.8)
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    with pytest.raises(SparsityError) as error:
        steps(model, optimizer, batches(2))
    assert str(error.value) == (
        "`momentum` found neither `momentum_buffer` nor `exp_avg` in the optimizer's state of `0.weight` at step 1 "
        "(it has: nothing). Use SGD with momentum or Adam."
    )


REALLOCATING = {
    "gmp": lambda: sparselearn.gmp(stop=11, every=3, scope="global"),
    "granet": lambda: sparselearn.granet(stop=11, every=3, prune_stop=9),
    "dsr": lambda: sparselearn.dsr(target=20, stop=11, every=3),
    "snfs": lambda: sparselearn.snfs(stop=11, every=3),
    "acdc": lambda: sparselearn.acdc(switches=(3, 6, 9)),
}


@pytest.mark.parametrize("name", REALLOCATING)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_layers_of_overrides_are_outside_of_re_allocation(name, sparsity) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    method = REALLOCATING[name]()
    sparsifier = sparselearn.Sparsifier(model, method, sparsity=0.8, overrides={"4.*": sparsity})
    optimizer = sparselearn.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
    for _ in range(12):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(sparsifier.masks["4.weight"].sum()) == 128 * (1 - sparsity)
    others = [sparsifier.masks[key] for key in ("0.weight", "2.weight")]
    assert sum(int(m.sum()) for m in others) == pytest.approx(0.2 * 1024, abs=1)


def test_a_dense_phase_clears_the_momentum_of_layers_that_were_dense_already() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsifier = sparselearn.Sparsifier(
        model, sparselearn.acdc(switches=(2, 4, 6)), sparsity=0.8, overrides={"2.*": 0.0}
    )
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = sparselearn.SparseOptimizer(base, sparsifier)
    for step in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        cleared = not base.state[model[2].weight]["momentum_buffer"].any()
        assert cleared == (step == 4)
