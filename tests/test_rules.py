"""Every update rule against tables worked by hand, and against a second reference in NumPy, bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sparselearn import DropGrow, SparseOptimizer, Sparsifier, SparsityError, criteria, gmp, rigl, set_, static
from sparselearn.criteria import Layer, initial_weights
from sparselearn.distributions import balanced, erk, pyramidal, uniform
from sparselearn.methods import global_ranking
from sparselearn.schedules import UpdateSchedule, constant, cosine, cubic, inverse_power, linear, ramp, square_wave
from sparselearn.state import generator

ALWAYS = 10**9  # a stop that no test reaches


def view(weight, mask=None, grad=None, *, step=100, name="fc.weight", seed=0, **more):
    weight = torch.as_tensor(weight, dtype=torch.float32)
    mask = weight != 0 if mask is None else torch.as_tensor(mask).bool()
    grad = None if grad is None else torch.as_tensor(grad, dtype=torch.float32)
    return Layer(name, weight, grad, mask, {}, step, generator(seed, step, name), **more)


def new_mask(method, layer, nnz=None):
    nnz = int(layer.mask.sum()) if nnz is None else nnz
    return method.new_masks([layer], [nnz])[0][0]


def active(mask):
    return mask.flatten().nonzero().flatten().tolist()


def rigl_at(fraction, **options):
    return rigl(stop=ALWAYS, every=1, drop_fraction=constant(fraction), **options)


def make(weight, method, *, mask=None, optimizer="sgd", **options):
    """One bias-free layer with these weights and this mask, and its optimizer."""
    weight = torch.as_tensor(weight, dtype=torch.float32)
    weight = weight.view(1, -1) if weight.ndim == 1 else weight
    mask = (weight != 0) if mask is None else torch.as_tensor(mask).bool().view_as(weight)
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    density = float(mask.float().mean())
    sparsifier = Sparsifier(model, method, sparsity=1 - density)
    model.weight.data.copy_(weight)
    sparsifier.state.layers["weight"].set_mask(mask.clone(), int(mask.sum()))
    base = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    }[optimizer](model.parameters())
    return model, sparsifier, SparseOptimizer(base, sparsifier)


# ---- tables worked by hand -------------------------------------------------------------------------------

W = [0.9, 0.0, -0.2, 0.4, 0.0, 0.0, -0.7, 0.0]  # active: 0, 2, 3, 6; by magnitude: 2 (.2), 3 (.4), 6 (.7), 0 (.9)
G = [0.1, -0.5, 0.8, 0.3, 0.6, 0.05, -0.2, 0.7]  # inactive by |g|: 7 (.7), 4 (.6), 1 (.5), 5 (.05)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, [0, 2, 3, 6]),
        (0.24, [0, 2, 3, 6]),  # int(0.96) = 0
        (0.25, [0, 2, 3, 6]),  # drops 2, whose |g| of .8 is the highest: it returns
        (0.5, [0, 2, 6, 7]),  # drops 2 and 3; grows 2 (.8) and 7 (.7)
        (0.75, [0, 2, 4, 7]),  # drops 2, 3, 6; grows 2, 7, 4
        (0.99, [0, 2, 4, 7]),  # int(3.96) = 3
        (1.0, [1, 2, 4, 7]),  # drops all; the four highest |g|
    ],
)
def test_rigl_by_hand(fraction, expected):
    assert active(new_mask(rigl_at(fraction), view(W, grad=G))) == expected


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, [0, 2, 3, 6]),
        (0.25, [0, 3, 6, 7]),
        (0.5, [0, 4, 6, 7]),
        (0.75, [0, 1, 4, 7]),
        (1.0, [1, 4, 5, 7]),  # all four inactive ones
    ],
)
def test_rigl_exclude_dropped_by_hand(fraction, expected):
    assert active(new_mask(rigl_at(fraction, exclude_dropped=True), view(W, grad=G))) == expected


def test_exclude_dropped_drops_no_more_than_can_grow():
    w = [0.5, 0.1, 0.2, 0.3, 0.0, 0.4, 0.6, 0.7]  # one inactive weight, int(0.5·7) = 3 to drop
    mask = new_mask(rigl_at(0.5, exclude_dropped=True), view(w, grad=[1] * 8))
    assert active(mask) == [0, 2, 3, 4, 5, 6, 7]
    dense = view([1.0, 2.0, 3.0, 4.0], grad=[1] * 4)
    assert active(new_mask(rigl_at(0.5, exclude_dropped=True), dense)) == [0, 1, 2, 3]


def test_rigl_worked_example_of_the_algorithm_sheet():
    layer = view([0.9, 0.1, -0.5, 0, 0, 0], grad=[0.2, 0.8, 0.1, 0.3, 0.7, 0.05])
    assert active(new_mask(rigl_at(1 / 3), layer)) == [0, 1, 2]
    assert active(new_mask(rigl_at(1 / 3, exclude_dropped=True), layer)) == [0, 2, 4]


def test_dropped_weight_that_returns_keeps_value_and_state():
    model, _, optimizer = make(W, rigl_at(0.5), optimizer="momentum")
    optimizer.base.state[model.weight]["momentum_buffer"] = torch.full((1, 8), 2.0)
    optimizer.sparsifier.state.layers["weight"].step = 100
    model.weight.grad = torch.tensor([G])
    optimizer.step()
    assert model.weight.tolist()[0] == pytest.approx([0.9, 0, -0.2, 0, 0, 0, -0.7, 0])
    assert optimizer.base.state[model.weight]["momentum_buffer"].tolist() == [[2, 0, 2, 0, 0, 0, 2, 0]]


def test_excluded_weight_does_not_return_and_the_other_starts_at_zero():
    model, sparsifier, optimizer = make(W, rigl_at(0.25, exclude_dropped=True))
    sparsifier.state.layers["weight"].step = 100
    model.weight.grad = torch.tensor([G])
    optimizer.step()
    assert model.weight.tolist()[0] == pytest.approx([0.9, 0, 0, 0.4, 0, 0, -0.7, 0])
    assert active(sparsifier.masks["weight"]) == [0, 3, 6, 7]


def test_rigl_drops_active_zeros_before_weights_and_never_keeps_inactive_ones():
    # Weight 1 is active at exactly zero, weight 0 inactive: by magnitude alone they tie and 0 would win.
    layer = view([0.0, 0.0, 0.3, 0.4], mask=[0, 1, 1, 1], grad=[0.0, 0.0, 0.0, 0.9])
    assert active(new_mask(rigl_at(0.0), layer)) == [1, 2, 3]
    assert active(new_mask(rigl_at(1 / 3), layer)) == [0, 2, 3]  # of equal |g| the lower index
    assert active(new_mask(rigl_at(1 / 3, exclude_dropped=True), layer)) == [0, 2, 3]


def test_a_drop_score_of_minus_infinity_never_keeps_an_inactive_weight():
    def not_negative(layer):
        return layer.weight.abs().masked_fill(layer.weight < 0, criteria.NEVER)

    updates = UpdateSchedule(every=1, stop=ALWAYS, drop_fraction=constant(0.34))
    layer = view([0.0, 0.0, -1.0, -2.0, 3.0, 0.0], grad=[0.1, 0.2, 0.3, 0.4, 0.5, 0.9])
    # Two are to stay, but only weight 4 may; 5 and 3 have the highest gradients. Index 0 would win a tie of -inf.
    assert active(new_mask(DropGrow(not_negative, criteria.gradient, updates), layer)) == [3, 4, 5]


SIGNED = [0.1, 0.2, 0.3, -0.1, -0.4, -0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("weight", "fraction", "dropped"),
    [
        (SIGNED, 1 / 3, [0, 3]),  # the example of the algorithm sheet: .1 and -.1
        (SIGNED, 2 / 3, [0, 1, 3, 4]),
        (SIGNED, 0.0, []),
        ([0.01, 0.02, 0.03, 0.04, -5, -6, -7, -8], 0.5, [0, 1, 4, 5]),  # by |w| alone the four positive ones
        ([0.01, 0.02, 0.03, 0.04, 1, 2, -7, -8], 0.25, [0, 1]),  # 6 of +, 2 of -: 1/6 and 2/6 are below 1/2
    ],
)
def test_set_drops_each_sign(weight, fraction, dropped):
    layer = view(weight)
    only_drop = DropGrow(drop=criteria.signed_magnitude)
    n = int(layer.mask.sum()) - int(fraction * int(layer.mask.sum()))
    kept = new_mask(only_drop, layer, n)
    assert sorted(set(active(layer.mask)) - set(active(kept))) == dropped


def test_set_drops_exact_zeros_first():
    layer = view([0.0, 0.1, -0.1, 0.0, 0.2, -0.2], mask=[0, 1, 1, 1, 1, 1])
    kept = new_mask(DropGrow(drop=criteria.signed_magnitude), layer, 4)
    assert active(kept) == [1, 2, 4, 5]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.5, 0.99, 1.0])
def test_set_growth_is_exact_and_random(fraction):
    method = set_(stop=ALWAYS, every=1, drop_fraction=fraction)
    w = [*SIGNED, *[0.0] * 24]
    seen = set()
    for seed in range(12):
        mask = new_mask(method, view(w, seed=seed))
        assert int(mask.sum()) == 6
        kept = set(active(mask)) & set(range(6))
        assert len(kept) >= 6 - int(fraction * 6)
        seen.add(tuple(active(mask)))
    assert len(seen) == 1 if int(fraction * 6) == 0 else len(seen) > 3


def test_set_may_draw_a_weight_that_was_just_dropped():
    method = set_(stop=ALWAYS, every=1, drop_fraction=0.5)
    w = [0.1, 0.2, -0.3, -0.4, 0.0]
    results = {tuple(active(new_mask(method, view(w, seed=seed)))) for seed in range(40)}
    assert all({1, 3} <= set(r) for r in results)
    assert len(results) == 3  # two of {0, 2, 4}


def test_set_growth_is_uniform():
    method = set_(stop=ALWAYS, every=1, drop_fraction=1.0)
    counts = np.zeros(8)
    for seed in range(400):
        counts[active(new_mask(method, view([1.0, -1.0, 0, 0, 0, 0, 0, 0], seed=seed)))] += 1
    assert counts.sum() == 800
    assert ((counts > 65) & (counts < 135)).all()  # 100 ± 4 standard deviations


def test_gmp_by_layer_by_hand():
    layer = view([0.9, -0.1, 0.5, 0.2, -0.8, 0.3, 0.7, -0.4])
    method = gmp(stop=ALWAYS, every=1)
    assert active(new_mask(method, layer, 5)) == [0, 2, 4, 6, 7]
    assert active(new_mask(method, layer, 1)) == [0]
    assert active(new_mask(method, layer, 8)) == list(range(8))


def test_gmp_global_by_hand():
    a = view([0.9, -0.1, 0.5, 0.2], name="a")
    b = view([0.05, 0.3, 0.01, -0.6], name="b")
    method = gmp(stop=ALWAYS, every=1, scope="global")
    assert [active(m) for m, _ in method.new_masks([a, b], [2, 2])] == [[0, 2], [1, 3]]
    assert [active(m) for m, _ in method.new_masks([a, b], [3, 0])] == [[0, 2], [3]]
    assert [active(m) for m, _ in method.new_masks([a, b], [2, 0])] == [[0], [3]]
    small = view([0.05, 0.03, 0.01, -0.06], name="small")  # below all of a, yet it keeps its best weight
    assert [active(m) for m, _ in method.new_masks([a, small], [2, 1])] == [[0, 2], [3]]


def test_global_ranking_counts_only_active_weights():
    a = view([0.0, 0.1, 0.0, 0.2], name="a")
    b = view([0.05, 0.3, 0.0, 0.0], name="b")
    assert global_ranking()([a, b], [2, 2]) == [2, 2]
    assert global_ranking()([a, b], [2, 1]) == [2, 1]


def test_a_method_without_growth_says_so():
    with pytest.raises(SparsityError) as error:
        new_mask(gmp(stop=1000), view(W), 6)
    assert str(error.value) == (
        "`fc.weight` has to grow from 4 to 6 active weights at step 100, but the method only prunes. "
        "Give it a `grow` criterion."
    )


def test_static_never_changes():
    method = static()
    assert not any(method.due(t) for t in range(1000))
    layer = view(W)
    assert new_mask(method, layer) is layer.mask


# ---- schedules -------------------------------------------------------------------------------------------


def test_schedules_of_the_algorithm_sheet():
    f = cosine(0.3, stop=12)
    assert [f(t) for t in (0, 4, 6, 8, 12, 99)] == pytest.approx([0.3, 0.225, 0.15, 0.075, 0, 0])
    s = cubic(0.0, 0.9, stop=8)
    assert [round(s(t), 4) for t in (0, 2, 4, 6, 8, 99)] == [0, 0.5203, 0.7875, 0.8859, 0.9, 0.9]
    assert [linear(1.0, stop=20, start=10)(t) for t in (0, 10, 15, 20, 30)] == [1, 1, 0.5, 0, 0]
    assert inverse_power(0.8, stop=10, k=1)(5) == pytest.approx(linear(0.8, stop=10)(5))
    assert inverse_power(0.8, stop=10, k=3)(5) == pytest.approx(0.1)
    wave = square_wave(1.0, 0.1, high_steps=2, low_steps=3, stop=12, start=1)
    assert [wave(t) for t in range(14)] == [1, 1, 1, 0.1, 0.1, 0.1, 1, 1, 0.1, 0.1, 0.1, 1, 0.1, 0.1]
    assert ramp(constant(0.25), initial=0.5)(7, 0.1) == pytest.approx(0.2)


def test_update_steps():
    def steps(**options):
        return [t for t in range(25) if UpdateSchedule(**options).due(t)]

    assert steps(every=5, stop=20) == [5, 10, 15]  # 20 is excluded
    assert steps(every=5, stop=21) == [5, 10, 15, 20]
    assert steps(every=5, stop=20, start=0) == [0, 5, 10, 15]
    assert steps(every=5, stop=20, start=7) == [7, 12, 17]
    schedule = UpdateSchedule(every=5, stop=20, start=10, drop_fraction=0.4)
    assert schedule.fraction(10) == pytest.approx(0.2)  # half way from step 0 to stop


def test_distributions_of_the_algorithm_sheet():
    s = {"a": torch.Size([10, 10]), "b": torch.Size([100, 100])}
    assert list(erk(s, 0.1).values()) == pytest.approx([0.91818, 0.091818], rel=1e-4)
    assert list(erk(s, 0.2).values()) == pytest.approx([1.0, 0.192])
    n = {"a": torch.Size([10, 10]), "b": torch.Size([20, 20]), "c": torch.Size([40, 40])}
    assert list(balanced(n, 0.1).values()) == pytest.approx([0.7, 0.175, 0.04375])
    p = pyramidal(n, 0.1)
    assert p["a"] == pytest.approx(0.40301, abs=5e-6)
    assert sum(p[k] * n[k].numel() for k in n) == pytest.approx(210)


# ---- a second reference ----------------------------------------------------------------------------------


def numpy_top(score, k, candidates):
    """Flat indices of the k highest among candidates, the lower index first among equals."""
    return sorted(candidates, key=lambda i: (-score[i], i))[:k]


def numpy_signed(w, mask):
    score = np.full(w.size, 0.0)
    for members in (np.flatnonzero(mask & (w > 0)), np.flatnonzero(mask & (w < 0))):
        for rank, i in enumerate(sorted(members, key=lambda i: (abs(w[i]), i)), 1):
            score[i] = np.float32(rank) / np.float32(members.size)
    return score


def numpy_update(w, mask, fraction, drop_score, grow_score, exclude_dropped=False):
    """RigL's Algorithm 1 on flat arrays. Returns the mask and the weights."""
    n = int(mask.sum())
    k = int(fraction * n)
    kept = numpy_top(drop_score, n - k, np.flatnonzero(mask))
    candidates = [i for i in range(w.size) if i not in set(kept)]
    if exclude_dropped:
        candidates = [i for i in candidates if not mask[i]]
        if len(candidates) < k:
            kept = numpy_top(drop_score, n - len(candidates), np.flatnonzero(mask))
            k = len(candidates)
    grown = numpy_top(grow_score, k, candidates)
    new = np.zeros(w.size, bool)
    new[kept] = new[grown] = True
    return new, np.where(new & mask, w, np.float32(0))


KINDS = ["normal", "ties", "equal", "zeros"]
SHAPES = [(8,), (5, 7), (4, 3, 3), (4, 2, 3, 3), (1, 31), (3, 2, 2, 1, 2)]


def random_layer(kind, shape, rng):
    w = rng.standard_normal(shape).astype(np.float32)
    g = rng.standard_normal(shape).astype(np.float32)
    if kind == "ties":
        w, g = np.round(w), np.round(g)
    elif kind == "equal":
        w, g = np.where(w > 0, 0.5, -0.5).astype(np.float32), np.ones_like(g)
    elif kind == "zeros":
        w, g = w * (rng.random(shape) < 0.3), g * (rng.random(shape) < 0.3)
        w, g = w.astype(np.float32), g.astype(np.float32)
    mask = rng.random(shape) < rng.choice([0.2, 0.5, 0.8])
    mask.flat[0] = True
    return w * mask, g, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rigl", "rigl_excluded", "set"])
def test_equals_the_numpy_reference(method, kind):
    rng = np.random.default_rng([KINDS.index(kind), len(method)])
    for trial, shape in enumerate(SHAPES * 4):
        w, g, mask = random_layer(kind, shape, rng)
        fraction = [0.0, 0.2, 0.3, 0.5, 0.75, 1.0][rng.integers(6)]
        layer = view(torch.from_numpy(w), mask, g, step=trial, seed=trial)
        if method == "set":
            ours = set_(stop=ALWAYS, every=1, drop_fraction=fraction)
            scores = numpy_signed(w.ravel(), mask.ravel()), view(w, seed=trial, step=trial).rand().numpy().ravel()
        else:
            ours = rigl_at(fraction, exclude_dropped=method == "rigl_excluded")
            scores = np.abs(w).ravel(), np.abs(g).ravel()
        expected, _ = numpy_update(w.ravel(), mask.ravel(), fraction, *scores, method == "rigl_excluded")
        seen = new_mask(ours, layer).numpy()
        np.testing.assert_array_equal(seen, expected.reshape(shape), err_msg=f"trial {trial}, shape {shape}")


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3)])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_whole_updates_in_training_equal_the_numpy_reference(method, shape):
    """Masks and weights over many updates of a real loop, the layer once channels_last."""
    rng = np.random.default_rng(1)
    layer = nn.Linear(5, 6, bias=False) if len(shape) == 2 else nn.Conv2d(3, 4, 3, bias=False)
    layer = layer.to(memory_format=torch.channels_last) if len(shape) == 4 else layer
    options = {"stop": 40, "every": 2, "drop_fraction": constant(0.4)}
    recipe = rigl(skip_step=False, **options) if method == "rigl" else set_(**options)
    sparsifier = Sparsifier(layer, recipe, sparsity=0.6, seed=5)
    optimizer = SparseOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), sparsifier)
    w, mask = layer.weight.detach().numpy().copy().ravel(), sparsifier.masks["weight"].numpy().copy().ravel()
    for step in range(20):
        g = rng.standard_normal(shape).astype(np.float32)
        layer.weight.grad = torch.tensor(g).contiguous(
            memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
        )
        optimizer.step()
        w = np.where(mask, w - np.float32(0.1) * g.ravel(), np.float32(0))
        if step in range(2, 40, 2):
            rand = torch.rand(shape, generator=generator(5, step, "weight")).numpy().ravel()
            drop, grow = (np.abs(w), np.abs(g.ravel())) if method == "rigl" else (numpy_signed(w, mask), rand)
            mask, w = numpy_update(w, mask, 0.4, drop, grow)
        np.testing.assert_array_equal(sparsifier.masks["weight"].numpy().ravel(), mask)
        np.testing.assert_allclose(layer.weight.detach().numpy().ravel(), w, rtol=1e-5, atol=1e-7)
        w = layer.weight.detach().numpy().copy().ravel()
        assert not w[~mask].any()


# ---- optimizer state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_step", [True, False])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw", "rmsprop"])
def test_exactly_the_moved_positions_lose_their_state(optimizer, skip_step):
    torch.manual_seed(0)
    method = rigl(stop=100, every=3, drop_fraction=constant(0.5), skip_step=skip_step)
    model, sparsifier, wrapped = make(torch.randn(6, 10) * (torch.rand(6, 10) < 0.5), method, optimizer=optimizer)
    for step in range(4):
        model.weight.grad = torch.randn(6, 10)
        if step == 3:
            slots = [v for v in wrapped.state[model.weight].values() if torch.is_tensor(v) and v.shape == (6, 10)]
            assert slots
            for slot in slots:
                slot.fill_(1.0)
            wrapped.base.param_groups[0]["lr"] = 0.0
        before = sparsifier.masks["weight"].clone()
        wrapped.step()
    after = sparsifier.masks["weight"]
    assert int((before != after).sum()) > 4
    for slot in slots:
        if skip_step:
            torch.testing.assert_close(slot, (before & after).float(), rtol=0, atol=0)
        assert torch.equal(slot != 0, before & after)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_an_update_that_replaces_the_step_touches_nothing_that_stays(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 4))
    sparsifier = Sparsifier(model, rigl(stop=100, every=3, drop_fraction=0.5), sparsity=0.5, exclude=["1.*"])
    adam = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    base = adam if optimizer == "adam" else torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1)
    wrapped = SparseOptimizer(base, sparsifier)

    def snapshot():
        slots = {(i, k): v.clone() for i, s in enumerate(base.state.values()) for k, v in s.items()}
        return [p.detach().clone() for p in model.parameters()], slots

    for step in range(8):
        before, slots_before = snapshot()
        mask = sparsifier.masks["0.weight"].clone()
        model(torch.randn(4, 10)).square().sum().backward()
        wrapped.step()
        assert all(p.grad is None for p in model.parameters()) == (step in (3, 6))
        wrapped.zero_grad()
        after, slots_after = snapshot()
        stay = mask & sparsifier.masks["0.weight"]
        if step not in (3, 6):
            assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            continue
        assert not torch.equal(mask, sparsifier.masks["0.weight"])
        assert torch.equal(after[0], before[0] * stay)
        assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))
        assert slots_before.keys() == slots_after.keys()
        for key, value in slots_after.items():
            keep = stay if value.shape == stay.shape else 1
            assert torch.equal(value, slots_before[key] * keep), key


# ---- grow inits ------------------------------------------------------------------------------------------


def grown_by(grow_init, seed=0):
    w = torch.tensor([[0.8, -0.6, 0.4, 0.2, 0, 0, 0, 0], [1.0, -1.0, 0.5, 0.1, 0, 0, 0, 0]])
    method = rigl_at(0.5, grow_init=grow_init, exclude_dropped=True)
    model, sparsifier, wrapped = make(w, method)
    sparsifier.state.seed = seed
    layer = sparsifier.state.layers["weight"]
    layer.step = 100
    if "initial_weights" in layer.memory:
        layer.memory["initial_weights"] = w.clone()
    g = torch.tensor([[0.1, 0.1, 0.1, 0.1, 1.0, -2.0, 3.0, -4.0]] * 2)
    model.weight.grad = g.clone()
    wrapped.step()
    new = sparsifier.masks["weight"] & (w == 0)
    assert active(new) == [6, 7, 14, 15]
    stay = sparsifier.masks["weight"] & (w != 0)
    assert active(stay) == [0, 1, 8, 9]
    assert torch.equal(model.weight[stay], w[stay])
    assert not model.weight[~(new | stay)].any()
    return w, g[new], model.weight.detach()[new]


def test_grow_inits():
    assert not grown_by(criteria.zeros)[2].any()
    _, g, seen = grown_by(criteria.gradient_scale(k=2.0))
    assert torch.equal(seen, -g / 2)
    _, g, seen = grown_by(criteria.gradient_sign(k=4.0))
    assert torch.equal(seen, -g.sign() / 4)
    for init in (criteria.random_normal, criteria.random_uniform, criteria.initial_distribution):
        w, _, one = grown_by(init())
        assert torch.equal(one, grown_by(init())[2])  # equal seeds, equal values
        torch.testing.assert_close(grown_by(init(k=10.0))[2], one / 10)
        assert not torch.equal(one, grown_by(init(), seed=1)[2])
        if init is criteria.random_uniform:
            assert (one.abs() <= w.abs().mean()).all()
        if init is criteria.initial_distribution:
            assert all(float(v) in w[w != 0].tolist() for v in one)


def test_sizes_of_random_inits():
    w = torch.randn(200, 100) * (torch.rand(200, 100) < 0.5)
    layer = view(w, grad=w)
    assert criteria.random_normal()(layer).std() == pytest.approx(w.std().item(), rel=0.05)
    uniform = criteria.random_uniform()(view(w, grad=w))
    assert uniform.abs().max() == pytest.approx(w.abs().mean().item(), rel=0.01)
    assert uniform.mean().item() == pytest.approx(0, abs=0.01)


def test_initial_distribution_remembers_the_start():
    assert criteria.initial_distribution().trackers == (initial_weights(),)
    model, sparsifier, _ = make(W, rigl_at(0.5, grow_init=criteria.initial_distribution()))
    memory = sparsifier.state.layers["weight"].memory["initial_weights"]
    assert memory.shape == model.weight.shape


# ---- equivalences over 50 steps of training --------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6), nn.LayerNorm(6))


def batches(n):
    g = torch.Generator().manual_seed(9)
    return [(torch.randn(8, 12, generator=g), torch.randint(6, (8,), generator=g)) for _ in range(n)]


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


def train(method, optimizer, steps=50, **options):
    model = network()
    sparsifier = Sparsifier(model, method, sparsity=0.7, seed=3, **options)
    wrapped = SparseOptimizer(OPTIMIZERS[optimizer](model.parameters()), sparsifier)
    for x, y in batches(steps):
        wrapped.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        wrapped.step()
    return model, sparsifier, wrapped


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_drop_fraction_zero_is_static(optimizer):
    expected, _, reference = train(static(), optimizer)
    still = {
        "rigl": rigl(stop=60, every=4, drop_fraction=0.0, skip_step=False),
        "set": set_(stop=60, every=4, drop_fraction=0.0),
    }
    for method in still.values():
        model, _, wrapped = train(method, optimizer)
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)
            for key, value in reference.state[b].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(wrapped.state[a][key]))


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w):
        return w * self.mask


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_place_equals_a_parametrization(optimizer):
    ours, sparsifier, _ = train(static(), optimizer)
    oracle = network()
    layers = {"0": oracle[0], "2": oracle[2]}
    for name, layer in layers.items():
        layer.weight.data.mul_(sparsifier.masks[f"{name}.weight"])
        parametrize.register_parametrization(layer, "weight", Masked(sparsifier.masks[f"{name}.weight"]))
    base = OPTIMIZERS[optimizer](oracle.parameters())
    for x, y in batches(50):
        base.zero_grad()
        nn.functional.cross_entropy(oracle(x), y).backward()
        base.step()
    for name in layers:
        assert torch.equal(oracle.get_submodule(name).weight, ours.get_submodule(name).weight)
        assert torch.equal(oracle.get_submodule(name).bias, ours.get_submodule(name).bias)
    assert torch.equal(oracle[3].weight, ours[3].weight)


def test_rigl_trains_with_an_exact_count_at_every_step():
    model = network()
    sparsifier = Sparsifier(model, rigl(stop=60, every=3, skip_step=False), sparsity=0.7, distribution=uniform)
    wrapped = SparseOptimizer(OPTIMIZERS["adamw"](model.parameters()), sparsifier)
    start = {n: m.clone() for n, m in sparsifier.masks.items()}
    nnz = {n: int(m.sum()) for n, m in start.items()}
    assert sum(nnz.values()) == round(0.3 * (12 * 16 + 16 * 6))
    for x, y in batches(30):
        wrapped.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        wrapped.step()
        for name, mask in sparsifier.masks.items():
            assert int(mask.sum()) == nnz[name] == sparsifier.state.layers[name].nnz
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            for slot in wrapped.state[weight].values():
                if slot.shape == weight.shape:
                    assert not slot[~mask].any()
    assert all(not torch.equal(start[n], m) for n, m in sparsifier.masks.items())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
