"""Each drop-and-grow method's own example, worked by hand: a few weights, gradients, and the masks that follow."""

import math
from itertools import pairwise

import pytest
import torch
from method_list import (
    HALF,
    OneLayer,
    active,
    build,
    hard,
    layer_of,
    masks_after,
    snapshot,
    train,
)

import sparselearn as sl
from sparselearn import criteria
from sparselearn.methods.reallocation import adaptive_threshold, momentum_redistribution, share
from sparselearn.schedules import alternating, constant, harmonic_like

ALWAYS = {"stop": 10**9, "every": 1}

# ---- SNFS --------------------------------------------------------------------------------------------------


def with_momentum(layer, values):
    return layer._replace(optimizer_state={"momentum_buffer": torch.tensor(values)})


def test_snfs_moves_weights_to_the_layer_with_more_momentum():
    """Half of 4 + 4 weights go; mean |momentum| of active ones is 3 and 1, so 3 of the 4 return to the first.

    a keeps .9 and -.5; of the others |m| = 7, 5 and one of the 3s are highest. b keeps .4 and .3, and grows the 2.
    """
    a = layer_of([0.9, 0.1, -0.5, 0.2, 0, 0, 0, 0], name="a")
    b = layer_of([0.4, 0.3, -0.2, 0.1, 0, 0, 0, 0], name="b")
    a, b = with_momentum(a, [3.0, -3, 3, 3, 1, -7, 5, 2]), with_momentum(b, [1.0, -1, 1, 1, 2, 0.5, 0, 0])
    assert masks_after(sl.snfs(**ALWAYS, drop_fraction=HALF), a, b) == [[0, 1, 2, 5, 6], [0, 1, 4]]


def test_snfs_drops_little_from_a_nearly_dense_layer_that_is_about_to_grow():
    """a has 9 of 10 weights (sparsity .1) and the larger momentum: p = min(.1, .5), int(.1·9) = 0 weights go. b loses 2
    of 4. Shares of these 2 by 3:1 are 1.5 and .5; a has room for one."""
    a = with_momentum(layer_of([*range(1, 10), 0], name="a"), [3.0] * 10)
    b = with_momentum(layer_of([4, 3, 2, 1, *[0] * 6], name="b"), [1.0] * 10)
    budgets = momentum_redistribution(HALF)([a, b], [9, 4])
    assert budgets == [(9, 10), (2, 3)]
    weak = with_momentum(a, [0.5] * 10)  # not about to grow: the rule does not apply, int(.5·9) = 4 go
    assert momentum_redistribution(HALF)([weak, b], [9, 4])[0].keep == 5


@pytest.mark.parametrize(
    ("total", "weights", "most", "expected"),
    [
        (8, [0.75, 0.25], [10, 10], [6, 2]),  # the example of the algorithm sheet
        (10, [30, 10], [99, 99], [8, 2]),  # 7.5 and 2.5: the earlier of equal remainders
        (8, [0.75, 0.25], [5, 10], [5, 3]),
        (6, [8, 1, 1], [2, 9, 9], [2, 2, 2]),
        (3, [0, 0, 5], [2, 2, 1], [1, 1, 1]),  # what the only one with a weight cannot take goes to all
        (0, [1, 2], [3, 3], [0, 0]),
        (4, [0, 0], [0, 4], [0, 4]),
    ],
)
def test_shares_by_hand(total, weights, most, expected):
    assert share(total, weights, most) == expected


# ---- DSR ---------------------------------------------------------------------------------------------------

DSR_A = [0.5, 0.05, -0.3, 0.02, 0, 0, 0, 0]  # two below .1
DSR_B = [0.4, 0.6, 0.2, -0.7, 0, 0, 0, 0]  # none


def dsr_layers(threshold, a=DSR_A, b=DSR_B, seed=0):
    memory = {"threshold": torch.tensor(threshold, dtype=torch.float64)}
    return [layer_of(w, name=n, seed=seed, memory=memory) for n, w in (("a", a), ("b", b))]


def test_dsr_drops_below_the_threshold_and_regrows_by_what_survived():
    """Two go, 2 and 4 stay; 2·2/6 = .67 and 2·4/6 = 1.33 are one each. What was just dropped does not return."""
    grown = set()
    for seed in range(20):
        first, second = masks_after(sl.dsr(target=2, **ALWAYS), *dsr_layers(0.1, seed=seed))
        assert len(first) == 3
        assert {0, 2} < set(first) <= {0, 2, 4, 5, 6, 7}
        assert len(second) == 5
        assert {0, 1, 2, 3} < set(second)
        grown |= set(first)
    assert grown == {0, 2, 4, 5, 6, 7}


@pytest.mark.parametrize(("target", "factor"), [(1, 0.5), (2, 1.0), (3, 2.0), (8, 2.0)])
def test_dsr_threshold_follows_the_number_that_was_dropped(target, factor):
    """Two dropped: above 1.1·1 it halves, within .9·2 to 1.1·2 it stays, below .9·3 it doubles."""
    layers = [x._replace(memory={k: v.clone() for k, v in x.memory.items()}) for x in dsr_layers(0.1)]
    adaptive_threshold(target)(layers, [4, 4])
    assert [float(x.memory["threshold"]) for x in layers] == pytest.approx([0.1 * factor] * 2)


def test_dsr_leaves_each_layer_a_weight_and_drops_no_more_than_find_a_place():
    assert adaptive_threshold(2)(dsr_layers(9.0, a=DSR_A), [4, 4]) == [(1, 4), (1, 4)]
    full = [0.5, 0.05, -0.3, 0.02, 0.01, 0.03, 0, 0]  # four are below .1, two places are free here and none in b
    budgets = adaptive_threshold(4)(dsr_layers(0.1, a=full, b=[1] * 8), [6, 8])
    assert budgets == [(4, 6), (8, 8)]
    (first, _) = masks_after(sl.dsr(target=4, **ALWAYS), *dsr_layers(0.1, a=full, b=[1] * 8), nnz=[6, 8])
    assert first == [0, 1, 2, 5, 6, 7]  # 4 (.01) and 3 (.02) gave way


# ---- ITOP --------------------------------------------------------------------------------------------------


def test_itop_counts_weights_that_were_ever_active():
    """One of three weights moves per step: to 4, then 4 (still zero) back to 2, then 2 (zero now) to 7."""
    layer = OneLayer([0.9, 0.5, 0.1, 0, 0, 0, 0, 0], sl.itop(**ALWAYS, drop_fraction=constant(1 / 3)))
    seen = []
    for best in (0, 4, 2, 7):  # the first step is no update
        mask = layer.step([float(i == best) for i in range(8)])
        seen.append((mask, layer.sparsifier.metrics()["sparsity/exploration_rate"]))
    assert seen == [([0, 1, 2], 3 / 8), ([0, 1, 4], 4 / 8), ([0, 1, 2], 4 / 8), ([0, 1, 7], 5 / 8)]
    assert active(layer.state.memory["fired"]) == [0, 1, 2, 4, 7]


def test_itop_grows_unfired_weights_first_and_then_any():
    fired = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0]).bool()
    method = sl.itop(**ALWAYS, drop_fraction=constant(1.0), grow=criteria.random_unfired())
    layers = [layer_of([1, 1, 1, 0, 0, 0, 0, 0], seed=s, memory={"fired": fired}) for s in range(30)]
    seen = [set(masks_after(method, layer)[0]) for layer in layers]
    assert all(mask <= {3, 5, 6, 7} for mask in seen)
    assert set().union(*seen) == {3, 5, 6, 7}
    more = [layer_of([1, 1, 1, 1, 1, 0, 0, 0], seed=s, memory={"fired": fired}) for s in range(30)]
    seen = [set(masks_after(method, layer)[0]) for layer in more]
    assert all(mask > {3, 5, 6, 7} for mask in seen)
    assert len(set(map(frozenset, seen))) == 4


# ---- GraNet ------------------------------------------------------------------------------------------------


def test_granet_prunes_over_all_layers_and_regenerates_in_each():
    """To 5 of 8: .9 .8 .7 .6 .3 stay, 3 and 2 of the layers. int(.4·3) = 1 and int(.4·2) = 0 move: a's .7 gives way to
    the .1 of the higher gradient."""
    a = layer_of([0.9, 0.8, 0.7, 0.1], grad=[0, 0, 0.1, 0.5], name="a")
    b = layer_of([0.2, 0.3, 0.6, 0.05], grad=[9, 0, 0, 9], name="b")
    method = sl.granet(**ALWAYS, prune_stop=500, drop_fraction=constant(0.4))
    assert masks_after(method, a, b, nnz=[3, 2]) == [[0, 1, 3], [1, 2]]
    assert masks_after(method, a, b, nnz=[1, 4]) == [[0, 1, 3], [1, 2]]  # only the total counts
    by_layer = sl.granet(**ALWAYS, prune_stop=500, drop_fraction=constant(0.4), scope="layer")
    assert masks_after(by_layer, a, b, nnz=[1, 4]) == [[0], [0, 1, 2, 3]]


def test_layers_of_fixed_density_take_no_part_in_a_reallocation():
    """Five weights by rank are b's four and a's best; with b fixed at one of its own, a keeps the other four."""
    a = layer_of([0.9, 0.8, 0.7, 0.1], grad=[0, 0, 0.1, 0.5], name="a")
    b = layer_of([9, 9, 9, 8, 0, 0], grad=[0, 0, 0, 0, 0, 1], name="b")
    method = sl.granet(**ALWAYS, prune_stop=500, drop_fraction=constant(0.3))
    assert [active(m) for m, _ in method.new_masks([a, b], [4, 1])] == [[0], [0, 1, 2, 5]]
    assert [active(m) for m, _ in method.new_masks([a, b], [4, 1], fixed={"b"})] == [[0, 1, 2, 3], [0]]
    assert [active(m) for m, _ in method.new_masks([a, b], [2, 1], fixed={"a", "b"})] == [[0, 1], [0]]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_granet_follows_the_cubic_and_goes_on_regenerating(scope):
    method = sl.granet(stop=40, every=2, prune_start=4, prune_stop=20, initial_density=0.8, scope=scope)
    model, sparsifier, optimizer = build(hard(method))
    total = sum(m.numel() for m in sparsifier.masks.values())
    moved_after = 0
    for t in range(40):
        train(model, optimizer, t, t + 1)
        last = t // 2 * 2  # the last update step; step 0 is none, but the density is the same
        tau = min(max((last - 4) / 16, 0), 1)
        assert sparsifier.nnz == round((0.3 + 0.5 * (1 - tau) ** 3) * total)
        moved_after += t > 20 and sparsifier.last_update["step"] == t and sparsifier.last_update["grown"]
    assert moved_after > 0


# ---- MEST --------------------------------------------------------------------------------------------------


def test_mest_drops_by_weight_and_gradient_and_grows_at_random_from_zero():
    """Ten of twenty weights, .1 to 1: EM drops int(.2·10) = 2, by |w| 0 and 1, with |w| + .5·|g| 2 and 3."""
    w, g = [*(i / 10 for i in range(1, 11)), *[0] * 10], [2, 2, *[0] * 18]
    for weight, dropped in ((0.0, {0, 1}), (0.5, {2, 3})):
        method = sl.mest(stop=1000, every=1, weight=weight)
        assert method.updates.fraction(100) == pytest.approx(0.2)
        for seed in range(10):
            (mask, kept), = method.new_masks([layer_of(w, grad=g, seed=seed)], [10])  # fmt: skip
            assert set(range(10)) - set(active(kept)) == dropped
            assert int(mask.sum()) == 10
    # whatever is drawn starts at zero, the two that just went included
    returned = 0
    for seed in range(20):
        layer = OneLayer(w, sl.mest(stop=1000, every=1), mask=[1] * 10 + [0] * 10, seed=seed)
        layer.step([0.0] * 20)
        mask = layer.step([0.0] * 20)
        assert all(layer.weight[i] == 0 for i in mask if i not in range(2, 10))
        returned += bool({0, 1} & set(mask))
    assert returned > 0


@pytest.mark.parametrize(
    ("soft", "counts", "kept"),
    [(False, [20] * 16, [16] * 8 + [18] * 3 + [20] * 4), (True, [30] * 9 + [25] * 3 + [20] * 4, [20] * 15)],
)
def test_mest_in_its_three_stages(soft, counts, kept):
    """80 weights at density 1/4, an update on every step from 1 to 15; stages from 9 and 12 on (9/16 and 12/16)."""
    method = sl.mest(stop=16, every=1, soft=soft)
    layer = OneLayer(torch.randn(4, 20), method, sparsity=0.75, initial=None)
    seen_counts, seen_kept = [], []
    for t in range(16):
        if t:
            view = layer_of(layer.model.weight.detach(), layer.state.mask, step=t)
            nnz = round(method.density(t, 0.25) * 80) if soft else 20
            seen_kept.append(int(method.new_masks([view], [nnz])[0][1].sum()))
        seen_counts.append(len(layer.step([0.1] * 80)))
    assert seen_counts == counts
    assert seen_kept == kept


# ---- AC/DC -------------------------------------------------------------------------------------------------


def test_acdc_in_its_phases():
    """Dense, from step 2 on sparse, from 4 dense, from 6 sparse: nnz, momentum, values and the dense models."""
    model, sparsifier, optimizer = build(hard(sl.acdc(switches=(2, 4, 6))), "sgd")
    size = sum(m.numel() for m in sparsifier.masks.values())
    dense_models = []
    sparsifier.on_update(lambda: dense_models.append(snapshot(model, sparsifier)), when="before")
    counts, masks = [], []
    for t in range(9):
        train(model, optimizer, t, t + 1)
        counts.append(sparsifier.nnz)
        masks.append(snapshot(model, sparsifier)["masks"])
        buffers = {n: optimizer.state[model.get_parameter(n)]["momentum_buffer"] for n in masks[-1]}
        if t == 4:  # dense again: pruned weights restart from zero, and momentum is cleared
            assert all(not b.any() for b in buffers.values())
            assert all(not model.get_parameter(n)[~m].any() for n, m in masks[3].items())
        else:
            assert all(b.any() for b in buffers.values())
    few = round(0.3 * size)
    assert counts == [size, size, few, few, size, size, few, few, few]
    for t, u in ((2, 3), (6, 7), (7, 8)):  # a mask stays for its phase
        assert all(torch.equal(masks[t][n], masks[u][n]) for n in masks[t])
    assert [sum(s["nnz"].values()) for s in dense_models] == [size, few, size]
    assert all(bool(w.all()) for n, w in dense_models[2]["weights"].items() if n in masks[0])
    # one-shot over all layers: what stays is the largest of the dense model
    ranked = torch.cat([w.abs().flatten() for n, w in dense_models[2]["weights"].items() if n in masks[0]])
    limit = ranked.sort(descending=True).values[few - 1]
    for name, mask in masks[6].items():
        assert torch.equal(mask, dense_models[2]["weights"][name].abs() >= limit)


def test_acdc_schedule_of_the_paper():
    method = sl.acdc(steps=1000)
    assert method.updates.steps == (100, 150, 200, 250, 300, 350, 400, 450, 500, 550, 600, 650, 700, 750, 850)
    density = [method.density(t, 0.1) for t in (0, 99, 100, 149, 150, 699, 700, 749, 750, 849, 850, 999)]
    assert density == [1, 1, 0.1, 0.1, 1, 1, 0.1, 0.1, 1, 1, 0.1, 0.1]
    assert alternating((5,))(4, 0.2) == 1.0


# ---- scaled schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "longer"),
    [
        (sl.rigl(stop=75, every=10), sl.rigl(stop=300, every=10)),
        (sl.set_(stop=75, every=10, start=5), sl.set_(stop=300, every=10, start=20)),
        (sl.snfs(stop=75, every=10), sl.snfs(stop=300, every=10)),
        (sl.gmp(stop=101, every=10, start=20), sl.gmp(stop=404, every=10, start=80)),
        (sl.granet(stop=90, every=5, prune_start=10, prune_stop=60),
         sl.granet(stop=360, every=5, prune_start=40, prune_stop=240)),
        (sl.mest(stop=160, every=5, soft=True), sl.mest(stop=640, every=5, soft=True)),
        (sl.acdc(steps=100), sl.acdc(steps=400)),
        (sl.harmonic(stop=101, every=10), sl.harmonic(stop=404, every=10)),
        (sl.top_kast(exploration=0.1, stop_exploration=50), sl.top_kast(exploration=0.1, stop_exploration=200)),
        (sl.mdgf(sl.NM(2, 4), start=2, stop=10), sl.mdgf(sl.NM(2, 4), start=8, stop=40)),
        (sl.mdgf(sl.NM(2, 4), stop=8, kind="exponential"), sl.mdgf(sl.NM(2, 4), stop=32, kind="exponential")),
        (sl.sdgf(1, 4, stop=10), sl.sdgf(1, 4, stop=40)),
        (sl.static(), sl.static()),
    ],
    ids=["rigl", "set", "snfs", "gmp", "granet", "mest", "acdc", "harmonic", "top_kast", "mdgf", "mdgf-exp", "sdgf",
         "static"],
)  # fmt: skip
def test_a_schedule_scaled_by_four_is_that_of_a_run_of_four_times_the_length(method, longer):
    assert sl.scale_schedule(method, 4) == longer
    assert sl.scale_schedule(method, 1) == method


# ---- DST-EE ------------------------------------------------------------------------------------------------


def test_dst_ee_score_of_the_algorithm_sheet():
    """g = (.5, .4), N = (9, 0), c·ln t = .2, ε = 1: S = .5 + .2/10 and .4 + .2/1."""
    score = criteria.gradient_exploration(0.2 / math.log(20), 1.0)
    layer = layer_of([0, 0], grad=[-0.5, 0.4], step=20, memory={"visits": torch.tensor([9, 0], dtype=torch.int32)})
    assert score(layer).tolist() == pytest.approx([0.52, 0.6])
    for step in (0, 1):  # ln t would be -inf, or is 0
        assert score(layer._replace(step=step)).tolist() == pytest.approx([0.5, 0.4])


def test_dst_ee_counts_mask_periods_and_visits_new_weights():
    """|g| alone would go back and forth between 2 and 3; the bonus 10·ln t/(N + 1) leads to weights never visited."""
    method = sl.dst_ee(c=10.0, epsilon=1.0, stop=10**9, every=2, drop_fraction=constant(1 / 2))
    layer = OneLayer([0.9, 0.1, 0, 0, 0], method)
    g = [0.0, 0.0, 0.3, 0.4, 0.1]
    # 1 goes to 3 (of the unvisited 2, 3 and 4 the highest |g|), then 3, still zero, to 2, then 2 to 4
    assert [layer.step(g) for _ in range(7)] == [[0, 1], [0, 1], [0, 3], [0, 3], [0, 2], [0, 2], [0, 4]]
    assert layer.state.memory["visits"].tolist() == [[4, 1, 1, 1, 1]]
    plain = OneLayer([0.9, 0.1, 0, 0, 0], sl.dst_ee(c=0.0, epsilon=1.0, stop=10**9, every=2, drop_fraction=HALF))
    assert [plain.step(g) for _ in range(5)][-1] == [0, 3]


# ---- harmonic ----------------------------------------------------------------------------------------------


def test_harmonic_density_by_hand():
    """s_f = .9, K = 4, A = .1, 8 steps: at odd steps the cosine is -1 and the wave A·(1 - τ)·s_f, at even ones 0."""
    density = harmonic_like(stop=8)
    for t in range(9):
        tau = t / 8
        sparsity = 0.9 * (1 - (1 - tau) ** 3) - (0.1 * (1 - tau) * 0.9 if t % 2 else 0)
        assert density(t, 0.1) == pytest.approx(1 - sparsity)
    assert density(1, 0.1) == pytest.approx(1 - 0.2183203, abs=1e-6)
    assert density(99, 0.1) == pytest.approx(0.1)


def test_harmonic_regrows_where_the_density_rises_and_ends_at_the_budget():
    model, sparsifier, optimizer = build(hard(sl.harmonic(stop=31, every=2, amplitude=0.9, waves=3)))
    counts, regrown = [], 0
    for t in range(32):
        before = snapshot(model, sparsifier)
        train(model, optimizer, t, t + 1)
        counts.append(sparsifier.nnz)
        for name, mask in sparsifier.masks.items():
            new = mask & ~before["masks"][name]
            regrown += int(new.sum())
            assert not model.get_parameter(name)[new].any()
    assert regrown > 0
    assert any(b > a for a, b in pairwise(counts))
    assert counts[29] > counts[30] == counts[31] == round(0.3 * sum(m.numel() for m in sparsifier.masks.values()))


# ---- static re-initialisation, SNFS-lite -------------------------------------------------------------------


def test_static_reinit_renews_the_least_weights_in_place():
    """Two of four weights, .1 and -.2, get values that the layer began with; momentum starts anew there."""
    layer = OneLayer([0.9, 0.1, -0.2, 0.5, 0, 0, 0, 0], sl.static_reinit(**ALWAYS, drop_fraction=HALF), momentum=0.9)
    layer.step([1.0] * 8)
    assert layer.step([1.0] * 8) == [0, 1, 2, 3]
    initial = pytest.approx([0.9, 0.1, -0.2, 0.5])
    w = layer.weight
    assert [w[0], w[3], *w[4:]] == pytest.approx([0.9, 0.5, 0, 0, 0, 0])
    assert all(any(abs(w[i] - v) < 1e-7 for v in initial.expected) for i in (1, 2))
    assert [bool(m) for m in layer.momentum] == [True, False, False, True, False, False, False, False]
    seen = set()
    for seed in range(20):
        other = OneLayer([0.9, 0.1, -0.2, 0.5, 0, 0, 0, 0], sl.static_reinit(**ALWAYS, drop_fraction=HALF), seed=seed)
        other.step([0.0] * 8)
        other.step([0.0] * 8)
        seen.add(round(other.weight[1], 4))
    assert seen == {0.9, 0.1, -0.2, 0.5}


def test_static_reinit_of_a_layer_that_began_at_zero():
    layer = OneLayer([0.0] * 8, sl.static_reinit(**ALWAYS, drop_fraction=HALF), mask=[1, 1, 1, 1, 0, 0, 0, 0])
    layer.step([1.0] * 8)
    assert layer.step([1.0] * 8) == [0, 1, 2, 3]
    assert layer.weight == [0.0] * 8


def test_snfs_lite_grows_by_the_running_mean():
    """g of weight 2: 1, 1, .1; of weight 3: 0, 0, 1. Means at β = .9: .1·1·.9·.9 + .1·1·.9 + .1·.1 = .181 and .1."""
    method = sl.snfs_lite(stop=10**9, every=2, drop_fraction=HALF)
    layer = OneLayer([0.9, 0.1, 0, 0], method)
    gradients = [[0, 0, 1.0, 0], [0, 0, 1.0, 0], [0, 0, 0.1, 1.0]]
    assert [layer.step(g) for g in gradients] == [[0, 1], [0, 1], [0, 2]]
    assert layer.state.memory["gradient_average"].flatten().tolist() == pytest.approx([0, 0, 0.181, 0.1])
    rigl = OneLayer([0.9, 0.1, 0, 0], sl.rigl(stop=10**9, every=2, drop_fraction=HALF))
    assert [rigl.step(g) for g in gradients][-1] == [0, 3]
