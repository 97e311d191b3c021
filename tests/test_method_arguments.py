"""Bad arguments of methods, schedules and wrappers: each is refused where it is given, in words that say what to do."""

import pytest
import torch
from method_list import CLOCK, METHODS, STEPS, build, hard, network, train

import sparselearn as sl
from sparselearn import criteria
from sparselearn.distributions import uniform
from sparselearn.methods import global_ranking
from sparselearn.schedules import check_run, constant, harmonic_like, square_wave, stages
from sparselearn.wrappers import (
    ARTController,
    HyperSparse,
    activating_while_pruning,
    anytime_pruning,
    app_densities,
    global_masks,
    group_supports,
    random_search,
)


def message(function, *args, **kwargs):
    with pytest.raises(sl.SparsityError) as error:
        function(*args, **kwargs)
    return str(error.value)


# ---- a stop before a start -------------------------------------------------------------------------------------

LATE = {
    "set": lambda: sl.set_(stop=5, every=10),
    "rigl": lambda: sl.rigl(stop=5, start=6),
    "srigl": lambda: sl.srigl(stop=10, every=10),
    "snfs": lambda: sl.snfs(stop=10, every=10),
    "snfs_lite": lambda: sl.snfs_lite(stop=10, every=10),
    "dsr": lambda: sl.dsr(target=5, stop=10, every=10),
    "itop": lambda: sl.itop(stop=10, every=10),
    "granet": lambda: sl.granet(stop=10, every=10, prune_stop=5),
    "gmp": lambda: sl.gmp(stop=10, start=10),
    "mest": lambda: sl.mest(stop=10, every=10),
    "dst_ee": lambda: sl.dst_ee(c=0.1, epsilon=1.0, stop=10, every=10),
    "static_reinit": lambda: sl.static_reinit(stop=10, every=10),
    "g2gnet": lambda: sl.g2gnet(stop=10, every=10),
    "n_m_rigl": lambda: sl.n_m_rigl(2, 4, stop=10, every=10, grow=criteria.random),
}


@pytest.mark.parametrize("name", LATE)
def test_a_stop_that_no_update_precedes(name):
    assert message(LATE[name]).startswith("`UpdateSchedule` needs 0 <= start < stop (optimizer steps); got start=")


@pytest.mark.parametrize("factory", [sl.mdgf, lambda nm, **k: sl.sdgf(1, 4, **k)])
def test_a_stop_before_a_start_in_straight_through_methods(factory):
    assert "needs 0 <= start < stop (optimizer steps); got start=6, stop=5." in message(
        factory, sl.NM(1, 4), start=6, stop=5
    )


def test_pruning_that_stops_before_it_starts():
    assert message(sl.granet, **CLOCK, prune_start=6, prune_stop=6).startswith(
        "`inverse_power` needs 0 <= start < stop"
    )
    assert message(sl.granet, **CLOCK, prune_start=-1, prune_stop=6).startswith(
        "`inverse_power` needs 0 <= start < stop"
    )


# ---- densities and fractions out of range ---------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, 50, float("nan")])
def test_an_initial_density_out_of_range(density):
    text = f"`initial_density` must lie in (0, 1]; got {density}. It is a density: 0.1 for 90 % zeros."
    assert message(sl.granet, **CLOCK, prune_stop=6, initial_density=density) == text
    assert message(sl.gmp, **CLOCK, initial_density=density) == text


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.2])
@pytest.mark.parametrize("name", ["rigl", "granet", "acdc", "mest-soft", "top-kast", "harmonic", "ste-fan-in"])
def test_a_sparsity_out_of_range_with_any_method(name, sparsity):
    assert message(build, METHODS[name], sparsity=sparsity).startswith(
        "`sparsity` is the fraction of zeros and must lie"
    )


@pytest.mark.parametrize("fraction", [-0.1, 1.1, 30])
@pytest.mark.parametrize(
    "factory",
    [sl.rigl, sl.srigl, sl.snfs, sl.snfs_lite, sl.itop, sl.static_reinit, sl.g2gnet,
     lambda **k: sl.granet(prune_stop=6, **k), lambda **k: sl.dst_ee(c=0.1, epsilon=1.0, **k),
     lambda **k: sl.n_m_rigl(2, 4, grow=criteria.random, **k)],
    ids=["rigl", "srigl", "snfs", "snfs_lite", "itop", "static_reinit", "g2gnet", "granet", "dst_ee", "n_m_rigl"],
)  # fmt: skip
def test_a_drop_fraction_out_of_range(factory, fraction):
    assert message(factory, **CLOCK, drop_fraction=fraction) == f"`drop_fraction` must lie in [0, 1]; got {fraction}."


@pytest.mark.parametrize("name", ["rigl", "set_", "snfs", "itop"])
def test_a_schedule_of_drop_fractions_out_of_range(name):
    model, _, optimizer = build(hard(getattr(sl, name)(**CLOCK, drop_fraction=constant(-0.5))))
    assert message(train, model, optimizer) == "`drop_fraction` must lie in [0, 1]; got -0.5 at step 3."


def test_update_steps_with_a_fraction_out_of_range():
    assert message(sl.UpdateSteps, (1, 2), -1.0) == "`drop_fraction` must lie in [0, 1]; got -1.0."


def test_parameters_of_scores_out_of_range():
    text = "`dst_ee` needs c >= 0 and epsilon > 0; got "
    assert message(sl.dst_ee, c=-1.0, epsilon=1.0, **CLOCK) == text + "c=-1.0, epsilon=1.0."
    assert message(sl.dst_ee, c=1.0, epsilon=0.0, **CLOCK) == text + "c=1.0, epsilon=0.0."
    for beta in (-0.1, 1.0):
        text = f"`beta` of a running mean must lie in [0, 1); got {beta}."
        assert message(sl.snfs_lite, **CLOCK, beta=beta) == text
        assert message(sl.g2gnet, **CLOCK, beta=beta) == text
    assert message(sl.mest, **CLOCK, weight=-1.0) == (
        "The weight of |g| in `magnitude_gradient` must be at least 0; got -1.0."
    )
    assert message(sl.harmonic, stop=11, every=2, amplitude=1.5) == (
        "`harmonic_like` needs an amplitude in [0, 1] and waves >= 0; got 1.5 and 4."
    )
    assert message(harmonic_like, 10, waves=-1).endswith("got 0.1 and -1.")


def test_parameters_of_top_kast_out_of_range():
    for exploration in (-0.1, 1.5):
        assert message(sl.top_kast, exploration=exploration) == (
            f"`exploration` is a density and must lie in [0, 1]; got {exploration}."
        )
    assert (
        message(sl.top_kast, exploration=0.1, penalty=-1.0) == "`penalty` of `top_kast` must be at least 0; got -1.0."
    )
    assert message(sl.top_kast, exploration=0.1, every=0) == "`every` must be at least 1 optimizer step; got 0."


def test_policies_that_do_not_exist():
    assert message(sl.DropGrow, optimizer_state="clear") == (
        "`optimizer_state` must be 'zero', 'keep' or 'reset'; got 'clear'."
    )
    assert message(sl.StraightThrough, sl.NM(2, 4), gradient="chained") == (
        "`gradient` must be 'ste' or 'chain'; got 'chained'."
    )


# ---- schedules that do not reach their end --------------------------------------------------------------------


def test_a_final_density_that_no_update_reaches():
    assert message(sl.granet, stop=11, every=3, prune_stop=10) == (
        "`granet` would never reach its final density: prune_stop is step 10, but the last update before stop=11 is at "
        "step 9. Choose a later stop, or update more often."
    )
    assert message(sl.mest, stop=100, every=70, soft=True) == (
        "`mest` would never reach its final density: the last stage is step 75, but the last update before stop=100 is "
        "at step 70. Choose a later stop, or update more often."
    )
    assert message(sl.harmonic, stop=10, every=10) == (
        "`harmonic` needs an update step before stop=10; with every=10 there is none."
    )
    assert message(sl.gmp, stop=10, every=10).startswith("`gmp` needs an update step after step 0")


@pytest.mark.parametrize(
    ("method", "steps", "seen"),
    [
        (sl.rigl(stop=101, every=10), 100, "`UpdateSchedule` has stop=101"),
        (sl.gmp(stop=101, every=10), 100, "`UpdateSchedule` has stop=101"),
        (sl.granet(stop=101, every=10, prune_stop=50), 100, "`UpdateSchedule` has stop=101"),
        (sl.acdc(switches=(10, 20, 100)), 100, "`UpdateSteps` has step 100"),
        (sl.mdgf(sl.NM(2, 4), stop=101), 100, "`decaying` has stop=101"),
        (sl.sdgf(1, 4, stop=100), 100, "`structure_stages` has step 100"),
        (sl.top_kast(exploration=0.1, stop_exploration=101), 100, "`until` has stop=101"),
        (sl.ste(sl.NM(2, 4), stop=101), 100, "`StraightThrough` has stop=101"),
    ],
    ids=["rigl", "gmp", "granet", "acdc", "mdgf", "sdgf", "top_kast", "ste"],
)
def test_times_past_the_end_of_the_run(method, steps, seen):
    assert message(check_run, method, steps) == (
        f"{seen}, past the end of a run of {steps} optimizer steps. Give the method times of this run, or train longer."
    )
    check_run(method, steps + 1)


@pytest.mark.parametrize("name", METHODS)
def test_no_time_of_the_tested_methods_lies_past_their_run(name):
    check_run(METHODS[name].method, STEPS)


def test_a_schedule_scaled_by_no_whole_number():
    for k in (0, -1, 1.5):
        assert message(sl.scale_schedule, sl.rigl(stop=1000), k) == (
            f"`scale_schedule` needs a whole number k >= 1, since times are whole steps; got {k}."
        )


# ---- switches, stages, factors ---------------------------------------------------------------------------------


def test_switches_of_acdc():
    text = "`switches` must be odd in number, so that the run ends sparse; got {}."
    assert message(sl.acdc, switches=(3, 6)) == text.format(2)
    assert message(sl.acdc, switches=(1, 2, 3, 4)) == text.format(4)
    for switches in ((), (0, 3, 6), (3, 2, 6), (3, 3, 6), (-1,)):
        assert message(sl.acdc, switches=switches) == (
            f"`acdc` needs switches that ascend, from step 1 on (training begins dense); got {switches}."
        )
    assert message(sl.acdc, steps=5).endswith("since steps=5 is too short: give at least 20 steps.")
    for options in ({}, {"steps": 100, "switches": (3,)}):
        assert message(sl.acdc, **options) == "`acdc` needs either `steps`, the length of the run, or `switches`."
    assert len(sl.acdc(steps=20).updates.steps) == 15


def test_stages_and_factors_of_mest():
    for boundaries in ((0.5, 0.4), (0.0, 0.5), (0.5, 1.0)):
        assert message(sl.mest, stop=100, every=1, boundaries=boundaries) == (
            "`boundaries` of `mest` must part the run into three stages, as fractions of stop=100 that ascend within "
            f"(0, 1); got {boundaries}."
        )
    assert message(sl.mest, stop=100, every=1, factors=(1.2, 1.1, 1.0)) == (
        "`factors` of `mest` must be in (0, 1]; got (1.2, 1.1, 1.0)."
    )
    assert message(sl.mest, stop=100, every=1, soft=True, factors=(0.8, 0.9, 1.0)) == (
        "`factors` of `mest` must be at least 1; got (0.8, 0.9, 1.0)."
    )
    assert message(build, hard(sl.mest(**CLOCK, soft=True)), sparsity=0.2) == (
        "The soft memory bound of `mest` is 1.5 times the final density, which is 0.8: more than dense. Raise the "
        "sparsity, or give smaller `factors`."
    )
    assert message(stages, (0, 10), (1.0,)) == "`stages` needs a value for each of its 2 steps; got 1."
    assert message(square_wave, 1.0, 0.1, high_steps=2, low_steps=0, stop=9).startswith("`square_wave` needs phases")


def test_target_and_threshold_of_dsr():
    for target, limit in ((0, 1e-3), (5, 0.0), (5, -1.0)):
        assert message(sl.dsr, target=target, initial_threshold=limit, **CLOCK) == (
            f"`dsr` needs target >= 1 weights and initial_threshold > 0; got {target} and {limit}."
        )
    model, sparsifier, optimizer = build(hard(sl.dsr(target=10**6, **CLOCK)))
    assert message(train, model, optimizer) == (
        f"`dsr` is to move target=1000000 weights at each update, but only {sparsifier.nnz} are active. Choose a "
        "smaller target."
    )


def test_a_density_that_rises_under_a_global_ranking():
    """Which layers should get the weights is not for a ranking of active ones to say."""
    method = sl.granet(**CLOCK, prune_stop=6, initial_density=0.2)
    model, _, optimizer = build(hard(method), sparsity=0.5)
    text = message(train, model, optimizer)
    assert text.startswith("`global_ranking` ranks active weights, so it cannot say where to grow from ")
    assert text.endswith("(step 3). Start from a higher density, or re-allocate nothing while the density rises.")


def test_a_reallocation_within_a_structure_that_does_not_allow_it():
    assert message(sl.DropGrow, reallocate=global_ranking(), structure=sl.NM(2, 4)).startswith(
        "`reallocate` moves single weights between layers, which NM(2, 4) does not allow."
    )
    assert (
        message(sl.DropGrow, ablation=print) == "`ablation` needs the structure `ConstantFanIn`; it is Unstructured()."
    )


# ---- supports too small -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["static", "set", "rigl", "snfs", "itop-rigl", "mest", "top-kast"])
def test_a_support_too_small_for_the_budget(name):
    case = METHODS[name]
    text = message(build, case, support=0.1, distribution=uniform)
    assert text.startswith(
        "The support of `0.weight` must have shape [8, 4, 3, 3] and room for 86 active weights; it has"
    )
    assert text.endswith("Use a denser support.")


@pytest.mark.parametrize("name", ["gmp", "acdc", "harmonic", "granet", "mest-soft"])
def test_a_support_bounds_what_a_method_has_before_its_final_density(name):
    model, sparsifier, optimizer = build(METHODS[name], support=0.4, distribution=uniform)
    room = {key: int(layer.support.sum()) for key, layer in sparsifier.state.layers.items()}
    fullest = dict.fromkeys(room, 0)
    for _ in range(STEPS):
        train(model, optimizer, 1)
        for key, mask in sparsifier.masks.items():
            assert not bool((mask & ~sparsifier.state.layers[key].support).any())
            fullest[key] = max(fullest[key], int(mask.sum()))
    assert all(fullest[key] <= room[key] for key in room)
    assert abs(sparsifier.sparsity - METHODS[name].sparsity) < 0.01


def test_a_support_density_out_of_range():
    for support in (0.0, 1.5):
        assert message(build, METHODS["rigl"], support=support).startswith("A density must lie in (0, 1]")


# ---- wrappers -------------------------------------------------------------------------------------------------------


def test_arguments_of_one_shot_wrappers():
    scores = {"a": torch.ones(3), "b": torch.ones(3)}
    for nnz in (1, 7):
        assert message(global_masks, scores, nnz) == (
            f"`global_masks` was asked for {nnz} weights of 2 layers; it needs one for each layer, and there are 6 to "
            "choose from."
        )
    masks = {name: score.bool() for name, score in scores.items()}
    for prune, activate in ((0.1, 0.2), (1.0, 0.1), (0.2, -0.1)):
        assert message(activating_while_pruning, scores, scores, masks, prune=prune, activate=activate) == (
            f"AP needs 0 <= activate <= prune < 1; got activate={activate}, prune={prune}."
        )
    for arguments in ((0, 2, 0.8), (3, 0.5, 0.8), (3, 5, 1.0)):
        assert message(app_densities, arguments[0], last=arguments[1], base=arguments[2]).startswith(
            "APP needs batches"
        )
    sparsifier = sl.Sparsifier(model := network(), sl.static(), sparsity=0.0)
    assert message(list, anytime_pruning(model, sparsifier, [lambda m: m], [1.2])).startswith("`densities` must lie in")
    for density, trials in ((0.0, 3), (1.5, 3), (0.5, 0)):
        assert message(random_search, network(), lambda m: 0.0, density=density, trials=trials) == (
            f"`random_search` needs 0 < density <= 1 and trials >= 1; got {density}, {trials}."
        )
    for groups, links in ((0, 0.5), (2, -0.1), (2, 1.1)):
        assert message(group_supports, {}, groups=groups, links=links) == (
            f"`group_supports` needs groups >= 1 and links in [0, 1]; got {groups}, {links}."
        )
    assert "at least 4 each; `a`: torch.Size([8, 3])" in message(
        group_supports, {"a": torch.Size([8, 3])}, groups=4, links=0.5
    )


def test_arguments_of_hypersparse_and_art():
    for options in ({"sparsity": 1.0}, {"sparsity": 0.5, "rate": -1.0}, {"sparsity": 0.5, "growth": 0.0}):
        assert message(HyperSparse, **options).startswith(
            "`HyperSparse` needs a sparsity in [0, 1), rate >= 0, growth > 0"
        )
    for options in ({"sparsity": 1.0}, {"sparsity": 0.5, "buffer": 0}):
        assert message(ARTController, dense_accuracy=0.9, **options).startswith("`ARTController` needs a sparsity in")
    weight = torch.nn.Parameter(torch.ones(2))
    assert message(HyperSparse(0.5).add_gradient, {"w": weight}, 0) == (
        "HyperSparse found no gradient for `w`. Call it between backward and step."
    )
