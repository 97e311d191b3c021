"""The exact text of what a user's mistakes answer."""

import copy

import pytest
import torch
from torch import nn

from sparselearn import (
    DropGrow,
    SparseOptimizer,
    Sparsifier,
    SparsityError,
    UpdateSchedule,
    criteria,
    gmp,
    rigl,
    set_,
    static,
)
from sparselearn.distributions import uniform
from sparselearn.schedules import constant, cosine, square_wave


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))


def message(function, *args, **kwargs):
    with pytest.raises(SparsityError) as error:
        function(*args, **kwargs)
    assert isinstance(error.value, ValueError)
    return str(error.value)


def build(method=None, **options):
    return Sparsifier(network(), method or static(), **{"sparsity": 0.5, **options})


# ---- building --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1.0, 90, -0.1, float("nan")])
def test_sparsity_out_of_range(sparsity):
    assert message(build, sparsity=sparsity) == (
        f"`sparsity` is the fraction of zeros and must lie in [0, 1); got {sparsity}. For 90 % write 0.9."
    )
    assert message(build, overrides={"0.*": sparsity}).endswith(f"got {sparsity}. For 90 % write 0.9.")


def test_sparsity_missing():
    assert message(build, sparsity=None) == (
        "`sparsity` is required with this method: the fraction of zeros, in [0, 1)."
    )


def test_init_unknown():
    assert message(build, init="xavier") == "`init` must be 'keep', 'density' or 'fan_in'; got 'xavier'."


def test_a_layer_without_a_weight():
    def empty_head(shapes, density):
        return {name: 0.0 if name == "2.weight" else density for name in shapes}

    assert message(build, distribution=empty_head) == (
        "`2.weight` (shape [4, 8]) would have 0 active weights; every layer needs at least one. Lower the sparsity, "
        "exclude the layer, or give it a sparsity in `overrides`."
    )


def test_no_distribution_leaves_a_tiny_layer_empty():
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 100), nn.Linear(100, 100))
    sparsifier = Sparsifier(model, static(), sparsity=0.99, distribution=uniform)
    assert sparsifier.state.layers["0.weight"].nnz == 1
    assert sparsifier.nnz == round(0.01 * (2 + 200 + 10000))


@pytest.mark.parametrize("factory", [rigl, set_])
def test_stop_before_start(factory):
    assert message(factory, stop=50) == (
        "`UpdateSchedule` needs 0 <= start < stop (optimizer steps); got start=100, stop=50. Choose a later stop or "
        "an earlier start."
    )
    assert message(factory, stop=50, start=60, every=10).startswith("`UpdateSchedule` needs 0 <= start < stop")


def test_schedules_out_of_range():
    assert message(cosine, 0.3, stop=5, start=5) == (
        "`cosine` needs 0 <= start < stop (optimizer steps); got start=5, stop=5. Choose a later stop or an earlier "
        "start."
    )
    assert message(square_wave, 1.0, 0.1, high_steps=0, low_steps=2, stop=9) == (
        "`square_wave` needs phases of at least one step; got high_steps=0, low_steps=2."
    )
    assert message(UpdateSchedule, every=0, stop=10) == "`every` must be at least 1 optimizer step; got 0."
    assert message(rigl, stop=1000, drop_fraction=30) == "`drop_fraction` must lie in [0, 1]; got 30."
    assert message(set_(stop=1000, drop_fraction=30).updates.fraction, 100) == (
        "`drop_fraction` must lie in [0, 1]; got 30 at step 100."
    )
    assert message(gmp, stop=80) == (
        "`gmp` needs an update step after step 0 to prune by magnitude; with start=0, every=100 and stop=80 there is "
        "none. Choose a later stop, or update more often."
    )


# ---- optimizers ------------------------------------------------------------------------------------------


def test_lbfgs_and_sparse_adam_are_refused():
    for kind in (torch.optim.LBFGS, torch.optim.SparseAdam):
        sparsifier = build()
        parameters = [w.parameter for w in sparsifier._weights.values()]
        text = (
            f"{kind.__name__} is not supported: its state is not one tensor per weight (LBFGS flattens its history and "
            "evaluates the loss within the step; SparseAdam needs sparse gradients). Use SGD, Adam, AdamW or another "
            "optimizer with element-wise state."
        )
        assert message(SparseOptimizer, kind(parameters), sparsifier) == text
        assert message(sparsifier.before_step, kind(parameters)) == text


def test_an_optimizer_without_sparse_weights():
    sparsifier = build()
    other = torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1)
    assert message(SparseOptimizer, other, sparsifier) == (
        "The optimizer trains none of the sparse weights. Give it the parameters of the model that the sparsifier was "
        "built with (it holds `0.weight` and 1 more)."
    )
    sparsifier.before_step(other)  # as one of several optimizers it is simply not ours
    sparsifier.after_step(other)


def test_wrapping():
    model = network()
    sparsifier = Sparsifier(model, static(), sparsity=0.5)
    wrapped = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    assert message(SparseOptimizer, wrapped, sparsifier) == (
        "`optimizer` is a SparseOptimizer already; wrap the base optimizer once."
    )
    assert message(SparseOptimizer, model, sparsifier) == "`optimizer` must be a torch.optim.Optimizer; got Sequential."


# ---- steps -----------------------------------------------------------------------------------------------


def test_after_step_without_before_step():
    model = network()
    sparsifier = Sparsifier(model, static(), sparsity=0.5)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    text = "`after_step` came without `before_step`. Call before_step between backward and step."
    assert message(sparsifier.after_step, base) == text
    sparsifier.before_step(base)
    sparsifier.after_step(base)
    assert message(sparsifier.after_step, base) == text


@pytest.mark.parametrize("skip_step", [True, False])
def test_growth_by_gradient_without_a_gradient(skip_step):
    model = network()
    sparsifier = Sparsifier(model, rigl(stop=100, every=2, skip_step=skip_step), sparsity=0.5, distribution=uniform)
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    for _ in range(2):
        model[0](torch.randn(3, 10)).sum().backward()
        optimizer.step()
    model[0](torch.randn(3, 10)).sum().backward()
    assert message(optimizer.step) == (
        "Growth by `gradient` found no gradient for `2.weight` at step 2. The layer took no part in the loss; exclude "
        "it, or grow with `random`."
    )


def run_updates(method, steps=3):
    model = network()
    sparsifier = Sparsifier(model, method, sparsity=0.5, distribution=uniform)
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 10)).square().sum().backward()
        optimizer.step()


def method(**criteria_):
    updates = UpdateSchedule(every=2, stop=100, drop_fraction=constant(0.5))
    return DropGrow(**{"grow": criteria.gradient, "updates": updates, **criteria_})


def test_scores_of_another_shape_or_nan():
    assert message(run_updates, method(grow=lambda layer: layer.rand()[0])) == (
        "The grow criterion returned a score of shape [10] for `0.weight`; it must have the weight's shape [8, 10]."
    )
    assert message(run_updates, method(drop=lambda layer: layer.rand() * float("nan"))) == (
        "The drop criterion returned NaN for `0.weight` at step 2. Look for a loss that diverged, or return -inf for "
        "weights that must not be chosen."
    )


def test_too_few_weights_may_be_chosen():
    never = method(grow=lambda layer: torch.full_like(layer.weight, criteria.NEVER))
    assert message(run_updates, never) == (
        "`0.weight` at step 2: `Unstructured` was asked for 40 weights of a layer of shape [8, 10], but only 20 may be "
        "chosen. Lower the density, or widen the support."
    )


# ---- checkpoints -----------------------------------------------------------------------------------------


def test_a_state_of_another_model():
    sparsifier = build()
    names = Sparsifier(nn.Sequential(nn.Linear(10, 8)), static(), sparsity=0.5)
    assert message(names.load_state_dict, sparsifier.state_dict()) == (
        "`2.weight` is not among the sparse weights of this sparsifier (1 names differ). Build the sparsifier with the "
        "same model, `select` and `exclude`."
    )
    assert message(sparsifier.load_state_dict, names.state_dict()) == (
        "`2.weight` is not among the sparse weights of the checkpoint (1 names differ). Build the sparsifier with the "
        "same model, `select` and `exclude`."
    )
    shapes = Sparsifier(nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)), static(), sparsity=0.5)
    assert message(shapes.load_state_dict, sparsifier.state_dict()) == (
        "The saved mask of `0.weight` has shape [8, 10]; the model's weight has [8, 9]."
    )


def test_a_damaged_mask():
    sparsifier = build(distribution=uniform)
    saved = copy.deepcopy(sparsifier.state_dict())
    saved["layers"]["0.weight"]["mask"][3] ^= 0b10000
    seen = int(sum(bin(b).count("1") for b in saved["layers"]["0.weight"]["mask"].tolist()))
    assert seen in (39, 41)
    assert message(build().load_state_dict, saved) == (
        f"The saved mask of `0.weight` has {seen} active weights, but 40 were recorded. The file is damaged; take an "
        "earlier checkpoint."
    )
    saved["layers"]["0.weight"]["mask"] = saved["layers"]["0.weight"]["mask"][:-1]
    assert message(build().load_state_dict, saved) == "A packed mask of shape [8, 10] is 10 uint8; got 9 torch.uint8."


def test_an_unknown_version():
    saved = build().state_dict() | {"version": 99}
    assert message(build().load_state_dict, saved) == "A sparsifier state of version 99 cannot be read (known: 1)."


def test_loading_inside_a_step():
    model = network()
    sparsifier = Sparsifier(model, static(), sparsity=0.5)
    saved = sparsifier.state_dict()
    sparsifier.before_step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert message(sparsifier.load_state_dict, saved) == (
        "`load_state_dict` came between `before_step` and `after_step`. Close the step first."
    )


def test_masks_without_their_weights():
    one, two = build(seed=1), build(seed=2)
    two.load_state_dict(one.state_dict())  # but the model of `one` is not loaded
    base = torch.optim.SGD([w.parameter for w in two._weights.values()], lr=0.1)
    text = message(two.before_step, base)
    assert text.startswith("`0.weight` has ")
    assert text.endswith(
        "were saved. The model's weights are not those of the checkpoint: load them after building the Sparsifier, or "
        "pass `state_dict=` when building it for a model that is loaded already."
    )


def test_a_plain_optimizer_state():
    model = network()
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Sparsifier(model, static(), sparsity=0.5))
    assert message(optimizer.load_state_dict, optimizer.base.state_dict()) == (
        "The optimizer state has no `sparsifier`: it was saved by a plain optimizer, so its masks are not known. Load "
        "it into the base optimizer and the masks into the sparsifier."
    )


def test_apply_masks_to_another_model():
    assert message(build().apply_masks, nn.Linear(3, 3)) == (
        "`apply_masks` found no `0.weight` in the model it was given: is it a copy of ours?"
    )
