"""Methods that must equal each other where their knobs are turned so: the cross-method oracles."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_list import CLOCK, HALF, Case, assert_equal, build, hard, network, snapshot, train, with_stepping
from torch import nn

import sparselearn as sl
from sparselearn import criteria, structures
from sparselearn.distributions import snip_scores, uniform
from sparselearn.methods import dense_then, global_ranking, then_dense
from sparselearn.methods.straight_through import until
from sparselearn.schedules import constant, cosine
from sparselearn.wrappers import (
    HyperSparse,
    NestedSubnets,
    activating_while_pruning,
    anytime_pruning,
    global_masks,
    group_supports,
)


def run(method: Any, *, optimizer: str = "sgd", steps: int = 12, sparsity: float | None = 0.7, **options: Any) -> dict:
    model, sparsifier, wrapped = build(Case(method, options, sparsity), optimizer)
    train(model, wrapped, stop=steps)
    return snapshot(model, sparsifier)


def dense_run(optimizer: str = "sgd") -> dict[str, torch.Tensor]:
    """Twelve steps without a sparsifier."""
    from method_list import OPTIMIZERS

    model = network()
    train(model, OPTIMIZERS[optimizer](model.parameters()))
    return dict(model.named_parameters())


def assert_dense(result: dict, optimizer: str = "sgd") -> None:
    for name, value in dense_run(optimizer).items():
        assert torch.equal(result["weights"][name], value), name


def moved(result: dict, method: Any, **options: Any) -> bool:
    first = build(Case(method, options))[1].masks
    return any(not torch.equal(mask, first[name]) for name, mask in result["masks"].items())


# ---- a drop fraction of zero is static ---------------------------------------------------------------------

NOTHING_MOVES = {
    "set": sl.set_(**CLOCK, drop_fraction=0.0),
    "rigl": with_stepping(sl.rigl(**CLOCK, drop_fraction=0.0)),
    "snfs": sl.snfs(**CLOCK, drop_fraction=0.0),
    "snfs-lite": with_stepping(sl.snfs_lite(**CLOCK, drop_fraction=0.0)),
    "dsr": sl.dsr(target=1, initial_threshold=1e-30, **CLOCK),
    "itop": sl.itop(**CLOCK, drop_fraction=0.0),
    "itop-unfired": sl.itop(**CLOCK, drop_fraction=0.0, grow=criteria.random_unfired()),
    "granet": sl.granet(**CLOCK, prune_stop=9, initial_density=0.3, drop_fraction=0.0),
    "granet-uniform": sl.granet(**CLOCK, prune_stop=9, initial_density=0.3, drop_fraction=0.0, scope="layer"),
    "gmp": sl.gmp(**CLOCK, initial_density=0.3),
    "gmp-global": sl.gmp(**CLOCK, initial_density=0.3, scope="global"),
    "mest": sl.mest(**CLOCK, factors=(1.0, 1.0, 1.0)),
    "mest-soft": sl.mest(**CLOCK, factors=(1.0, 1.0, 1.0), soft=True),
    "dst-ee": with_stepping(sl.dst_ee(c=0.1, epsilon=1.0, **CLOCK, drop_fraction=0.0)),
    "static-reinit": sl.static_reinit(**CLOCK, drop_fraction=0.0),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw-fused"])
@pytest.mark.parametrize("name", NOTHING_MOVES)
def test_a_zero_drop_fraction_is_static(name, optimizer):
    assert_equal(run(NOTHING_MOVES[name], optimizer=optimizer), run(sl.static(), optimizer=optimizer))


def test_a_zero_drop_fraction_is_static_within_a_structure():
    fan_in = sl.static(structure=sl.ConstantFanIn())
    assert_equal(run(sl.srigl(**CLOCK, drop_fraction=0.0, gamma=0.0)), run(fan_in))
    n_m = sl.n_m_rigl(2, 4, **CLOCK, drop_fraction=0.0, grow=criteria.gradient)
    assert_equal(run(n_m, sparsity=None), run(sl.asp(), sparsity=None))


def test_a_zero_drop_fraction_is_static_for_g2gnet():
    still = sl.g2gnet(**CLOCK, drop_fraction=0.0)
    assert_equal(run(still, exclude=["0.*"]), run(sl.static(), exclude=["0.*"]))


# ---- the RigL family ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam-foreach"])
def test_dst_ee_without_exploration_is_rigl(optimizer):
    rigl = sl.rigl(**CLOCK, drop_fraction=0.5)
    result = run(rigl, optimizer=optimizer)
    assert moved(result, rigl)
    assert_equal(run(sl.dst_ee(c=0.0, epsilon=1.0, **CLOCK, drop_fraction=0.5), optimizer=optimizer), result)
    with pytest.raises(AssertionError):
        assert_equal(run(sl.dst_ee(c=1.0, epsilon=1.0, **CLOCK, drop_fraction=0.5), optimizer=optimizer), result)


def test_dst_ee_with_endless_exploration_grows_the_least_visited_weights_first():
    model, sparsifier, optimizer = build(hard(sl.dst_ee(c=1e12, epsilon=1.0, **CLOCK, drop_fraction=HALF)))
    for step in range(10):
        before = snapshot(model, sparsifier)
        train(model, optimizer, step, step + 1)
        for name, mask in sparsifier.masks.items():
            grown, visits = mask & ~before["masks"][name], before["memory"][name]["visits"]
            passed_over = ~mask & ~before["masks"][name]
            if step in (3, 6, 9) and passed_over.any():
                assert visits[grown].max() <= visits[passed_over].min()


def test_snfs_lite_without_memory_is_rigl():
    rigl = sl.rigl(**CLOCK, drop_fraction=0.5)
    assert_equal(run(sl.snfs_lite(**CLOCK, drop_fraction=0.5, beta=0.0)), run(rigl))
    with pytest.raises(AssertionError):
        assert_equal(run(sl.snfs_lite(**CLOCK, drop_fraction=0.5, beta=0.9)), run(rigl))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_granet_at_one_density_is_rigl_in_each_layer(scope):
    granet = sl.granet(**CLOCK, prune_stop=9, initial_density=0.3, scope=scope)
    rigl = sl.rigl(**CLOCK, drop_fraction=cosine(0.5, stop=11, final=0.005), skip_step=False)
    result = run(rigl)
    assert moved(result, rigl)
    assert_equal(run(granet), result)


def test_granet_without_regeneration_is_gradual_pruning_over_all_layers():
    granet = sl.granet(**CLOCK, prune_stop=9, initial_density=0.8, drop_fraction=0.0)
    assert_equal(run(granet), run(sl.gmp(**CLOCK, initial_density=0.8, scope="global")))


def test_itop_with_gradient_growth_is_rigl_that_steps_and_with_random_growth_set_by_magnitude():
    fraction = cosine(0.5, stop=11, final=0.005)
    assert_equal(run(sl.itop(**CLOCK)), run(sl.rigl(**CLOCK, drop_fraction=fraction, skip_step=False)))
    by_magnitude = replace(sl.set_(**CLOCK, drop_fraction=fraction), drop=criteria.magnitude)
    assert_equal(run(sl.itop(**CLOCK, grow=criteria.random)), run(by_magnitude))


def test_itop_grows_only_weights_that_never_were_active_while_there_are_such():
    model, sparsifier, optimizer = build(hard(sl.itop(**CLOCK, grow=criteria.random_unfired())))
    expected = sparsifier.nnz
    before = {}
    for step in range(10):
        train(model, optimizer, step, step + 1)
        if step in (3, 6):
            fraction = cosine(0.5, stop=11, final=0.005)(step)
            expected += sum(
                min(int(fraction * layer.nnz), layer.mask.numel() - before[name])
                for name, layer in sparsifier.state.layers.items()
            )
            assert sum(int(x.memory["fired"].sum()) for x in sparsifier.state.layers.values()) == expected
        before = {name: int(layer.memory["fired"].sum()) for name, layer in sparsifier.state.layers.items()}


def test_srigl_without_ablation_is_rigl_where_there_is_one_row():
    class OneRow(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(40, 1, bias=False)

        def forward(self, x):
            return self.layer(x)

    def masks_of(method):
        model = OneRow()
        sparsifier = sl.Sparsifier(model, method, sparsity=0.7)
        optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
        g = torch.Generator().manual_seed(1)
        seen = []
        for _ in range(12):
            optimizer.zero_grad()
            (model(torch.randn(8, 40, generator=g)) - 1).square().mean().backward()
            optimizer.step()
            seen.append(sparsifier.masks["layer.weight"].clone())
        return torch.stack(seen), model.layer.weight.detach()

    options = {**CLOCK, "drop_fraction": HALF}
    masks, weight = masks_of(sl.srigl(**options, gamma=0.0))
    expected, expected_weight = masks_of(sl.rigl(**options, skip_step=False))
    assert torch.equal(masks, expected)
    assert torch.equal(weight, expected_weight)
    assert not torch.equal(masks[0], masks[-1])


def test_snfs_of_one_layer_has_nothing_to_redistribute():
    fraction = cosine(0.5, stop=11)
    plain = sl.DropGrow(
        grow=criteria.momentum, updates=sl.UpdateSchedule(3, 11, drop_fraction=fraction), optimizer_state="keep"
    )
    snfs = sl.snfs(**CLOCK)
    result = run(snfs, select=["3.weight"])
    assert moved(result, snfs, select=["3.weight"])
    assert_equal(result, run(plain, select=["3.weight"]))


def test_static_reinit_keeps_its_masks():
    method = sl.static_reinit(**CLOCK, drop_fraction=HALF)
    result, still = run(method), run(sl.static())
    assert_equal(result, still, ("masks",))
    assert not torch.equal(result["weights"]["3.weight"], still["weights"]["3.weight"])


@pytest.mark.parametrize(
    "method",
    [sl.rigl(**CLOCK), sl.set_(**CLOCK), sl.snfs(**CLOCK), sl.dsr(target=60, initial_threshold=0.02, **CLOCK),
     sl.granet(**CLOCK, prune_stop=9), sl.top_kast(exploration=0.2)],
    ids=["rigl", "set", "snfs", "dsr", "granet", "top_kast"],
)  # fmt: skip
def test_a_support_of_all_weights_changes_nothing(method):
    everywhere = {name: torch.ones_like(mask) for name, mask in build(hard(method))[1].masks.items()}
    assert_equal(run(method, support=everywhere), run(method))


def test_group_supports_with_all_links_are_all_weights():
    supports = group_supports({"a": torch.Size([16, 72]), "b": torch.Size([4, 16])}, groups=4, links=1.0)
    assert all(bool(mask.all()) for mask in supports.values())


# ---- densities that change ---------------------------------------------------------------------------------


def test_acdc_with_one_switch_is_one_shot_pruning_over_all_layers():
    model, sparsifier, optimizer = build(hard(sl.static()), sparsity=0.0)
    train(model, optimizer, 0, 6)  # a switch comes after the step of its number
    weights = {name: model.get_parameter(name) for name in sparsifier.masks}
    size = sum(w.numel() for w in weights.values())
    sparsifier.set_masks(global_masks({n: w.abs() for n, w in weights.items()}, round(0.3 * size)), optimizer.base)
    train(model, optimizer, 6, 12)
    assert_equal(run(sl.acdc(switches=(5,))), snapshot(model, sparsifier))


def test_acdc_by_layer_with_one_switch_is_gradual_pruning_in_one_update():
    one_update = sl.gmp(stop=6, start=5, every=10)
    assert_equal(run(sl.acdc(switches=(5,), scope="layer")), run(one_update))


def test_harmonic_without_waves_is_gradual_pruning():
    flat = sl.harmonic(stop=11, every=2, amplitude=0.0)
    assert_equal(run(flat, steps=12), run(sl.gmp(stop=11, every=2)))


def test_mest_without_a_soft_bound_or_gradients_drops_by_magnitude_and_grows_at_random():
    options = {"updates": sl.UpdateSchedule(3, 11, drop_fraction=constant(0.25)), "grow": criteria.random}
    assert_equal(run(sl.mest(**CLOCK, factors=(0.75, 0.75, 0.75))), run(sl.DropGrow(**options, reinit=True)))


# ---- straight through --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw-fused", "rmsprop"])
def test_sr_ste_without_decay_is_ste(optimizer):
    nm = sl.NM(2, 4)
    result = run(sl.sr_ste(nm, decay=0.0), optimizer=optimizer, sparsity=None)
    assert_equal(result, run(sl.ste(nm), optimizer=optimizer, sparsity=None))
    with pytest.raises(AssertionError):
        assert_equal(result, run(sl.sr_ste(nm, decay=0.5), optimizer=optimizer, sparsity=None))


def test_a_decaying_mask_at_zero_is_ste_and_at_one_dense():
    nm = sl.NM(2, 4)
    result = run(sl.StraightThrough(nm, residual=constant(0.0)), sparsity=None)
    assert_equal(result, run(sl.ste(nm), sparsity=None))
    assert_dense(run(sl.StraightThrough(nm, residual=constant(1.0)), sparsity=None))
    assert_dense(run(sl.StraightThrough(nm, residual=constant(1.0), gradient="chain"), sparsity=None))
    assert_dense(run(sl.mdgf(nm, start=50, stop=60), sparsity=None))


@pytest.mark.parametrize(
    "method",
    [sl.ste(sl.NM(4, 4)), sl.sr_ste(sl.NM(4, 4), decay=0.5), sl.ste(sl.TransposableNM(4, 4)),
     sl.asp(structure=sl.NM(4, 4)), sl.n_m_rigl(4, 4, **CLOCK, grow=criteria.random),
     dense_then(sl.ste(sl.NM(2, 4)), start=99)],
    ids=["ste", "sr_ste", "transposable", "asp", "n_m_rigl", "dense_then"],
)  # fmt: skip
def test_n_of_n_weights_is_dense(method):
    assert_dense(run(method, sparsity=None))


def test_then_dense_from_a_step_never_reached_is_the_method():
    method = sl.sr_ste(sl.NM(2, 4), decay=0.1)
    assert_equal(run(then_dense(method, stop=99), sparsity=None), run(method, sparsity=None))


def test_hard_masks_are_the_chain_rule_through_a_mask_that_stays():
    """With the true derivative and a mask chosen once, nothing is left of the straight-through estimator."""
    nm = sl.NM(2, 4)
    result = run(sl.StraightThrough(nm, gradient="chain", stop=0), sparsity=None)
    assert_equal(result, run(sl.asp(), sparsity=None, initial=criteria.magnitude), ("weights", "masks"))


@pytest.mark.parametrize("optimizer", ["sgd", "adam-foreach"])
def test_top_kast_without_exploration_is_a_hard_mask(optimizer):
    """B = A. The masks are chosen once: later ones would move where an active weight falls below a frozen one."""
    top = sl.top_kast(exploration=0.0, penalty=0.0, every=99)
    result = run(top, optimizer=optimizer)
    still = run(sl.static(), optimizer=optimizer, initial=criteria.magnitude)
    assert_equal(result, still, ("weights", "masks"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw-fused"])
def test_top_kast_on_all_weights_is_dense(optimizer):
    assert_dense(run(sl.top_kast(exploration=0.0, penalty=0.0), optimizer=optimizer, sparsity=0.0), optimizer)


def test_top_kast_that_explores_everything_is_ste():
    top = sl.top_kast(exploration=1.0, penalty=0.0)
    assert_equal(run(top), run(sl.ste(structures.Unstructured())))
    assert until(0.2, 5)(4) == 0.2
    assert until(0.2, 5)(5) == 0.0


# ---- wrappers ----------------------------------------------------------------------------------------------


def test_ap_without_activation_is_global_magnitude_pruning():
    weights = {n: p.detach() for n, p in network().named_parameters() if p.ndim > 1}
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    size = sum(w.numel() for w in weights.values())
    got = activating_while_pruning(weights, weights, masks, prune=0.25, activate=0.0)
    for name, mask in global_masks({n: w.abs() for n, w in weights.items()}, size - size // 4).items():
        assert torch.equal(got[name], mask)


def test_app_on_one_megabatch_is_global_snip():
    model = network()
    sparsifier = sl.Sparsifier(model, sl.static(), sparsity=0.0)
    x = torch.randn(8, 4, 5, 5)

    def loss(m):
        return m(x).square().mean()

    expected = global_masks(snip_scores(model, loss), round(0.8 * sparsifier.nnz))
    assert list(anytime_pruning(model, sparsifier, [loss], [0.8])) == [0]
    for name, mask in sparsifier.masks.items():
        assert torch.equal(mask, expected[name])


def test_hypersparse_without_strength_is_plain_training():
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), stop=1)
    weights = dict(model.named_parameters())
    before = {n: p.grad.clone() for n, p in weights.items()}
    HyperSparse(0.9, rate=0.0).add_gradient(weights, epoch=3)
    assert all(torch.equal(p.grad, before[n]) for n, p in weights.items())


def test_dress_with_one_subnet_is_the_sparse_model():
    case = hard(sl.static(structure=sl.ConstantFanIn()), distribution=uniform)
    plain, plain_sparsifier, plain_optimizer = build(case)
    train(plain, plain_optimizer)
    model, sparsifier, optimizer = build(case)
    train(NestedSubnets(model, sparsifier, [0.3]), optimizer)
    assert_equal(snapshot(model, sparsifier), snapshot(plain, plain_sparsifier))


def test_a_ranking_at_constant_total_changes_no_budget():
    _, sparsifier, _ = build(hard(sl.granet(**CLOCK, prune_stop=9)))
    views = [
        criteria.Layer(n, torch.randn(m.shape), None, m, {}, 3, torch.Generator()) for n, m in sparsifier.masks.items()
    ]
    nnz = [int(m.sum()) for m in sparsifier.masks.values()]
    assert global_ranking()(views, nnz) == nnz
