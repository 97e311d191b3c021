"""Per-layer densities and whole-number budgets."""

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sparselearn import Sparsifier, SparsityError, Unstructured, static
from sparselearn.criteria import Layer, snip
from sparselearn.distributions import (
    balanced,
    budgets,
    by_score,
    er,
    erk,
    explicit,
    grasp_scores,
    pyramidal,
    snip_scores,
    uniform,
    uniform_plus,
)
from sparselearn.state import generator

quick = settings(max_examples=60, deadline=None, derandomize=True)
one_shape = st.one_of(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 30), st.integers(1, 30), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
)
models = st.lists(one_shape, min_size=1, max_size=6).map(
    lambda shapes: {f"layer{i}.weight": torch.Size(s) for i, s in enumerate(shapes)}
)
densities = st.floats(0.01, 1.0)
ALL = {
    "uniform": uniform,
    "uniform_first": partial(uniform, first_dense=True, compensate=True),
    "uniform_plus": uniform_plus,
    "er": er,
    "erk": erk,
    "erk_half": partial(erk, power=0.5),
    "balanced": balanced,
    "pyramidal": pyramidal,
}


def size(shapes):
    return sum(s.numel() for s in shapes.values())


def total(shapes, result):
    return sum(result[name] * shape.numel() for name, shape in shapes.items())


@pytest.mark.parametrize("name", ALL)
@quick
@given(shapes=models, density=densities)
def test_the_global_density_holds(name, shapes, density):
    distribution = ALL[name]
    if name == "uniform_plus" and len(shapes) < 3:
        with pytest.raises(SparsityError, match="needs at least 3 layers"):
            distribution(shapes, density)
        return
    try:
        result = distribution(shapes, density)
    except SparsityError as error:
        assert name == "uniform_plus"  # the only one that may be impossible
        assert "the first and the last layer alone" in str(error)  # noqa: PT017
        return
    assert list(result) == list(shapes)
    assert all(0 <= d <= 1 for d in result.values())
    if name == "uniform_first" and (first := next(iter(shapes.values())).numel()) > density * size(shapes):
        assert total(shapes, result) >= first  # as documented: over the budget by itself
        return
    if name == "uniform_first" and len(shapes) == 1:
        return
    assert total(shapes, result) == pytest.approx(density * size(shapes), rel=1e-6)


@pytest.mark.parametrize("name", ["uniform", "er", "erk", "balanced", "pyramidal"])
@quick
@given(shapes=models, density=densities)
def test_budgets_are_whole_and_their_total_is_exact(name, shapes, density):
    result = ALL[name](shapes, density)
    nnz = budgets(Unstructured(), shapes, result)
    assert list(nnz) == list(shapes)
    for layer, shape in shapes.items():
        assert isinstance(nnz[layer], int)
        assert 0 <= nnz[layer] <= shape.numel()
        assert (nnz[layer] > 0) == (shape.numel() * result[layer] > 1e-6)
    wanted = round(total(shapes, result))
    if wanted >= len(shapes) * 2:
        least = sum(max(1, math.floor(result[k] * s.numel())) for k, s in shapes.items())
        assume(least <= wanted)
        assert sum(nnz.values()) == wanted
        for layer, shape in shapes.items():
            slack = max(1, sum(result[k] * s.numel() < 1 for k, s in shapes.items()))
            assert abs(nnz[layer] - result[layer] * shape.numel()) < 1 + slack


def test_tiny_layers_keep_one_weight_and_a_large_one_pays():
    shapes = {"big": torch.Size([10, 100])} | {f"tiny{i}": torch.Size([2, 2]) for i in range(10)}
    nnz = budgets(Unstructured(), shapes, uniform(shapes, 0.1))
    assert nnz == {"big": 94} | {f"tiny{i}": 1 for i in range(10)}
    tiny = {k: s for k, s in shapes.items() if k != "big"}
    assert set(budgets(Unstructured(), tiny, uniform(tiny, 0.1)).values()) == {1}


def test_budgets_bounded_by_most():
    shapes = {"a": torch.Size([5, 5]), "b": torch.Size([5, 5]), "c": torch.Size([5, 5])}
    assert budgets(Unstructured(), shapes, uniform(shapes, 0.41)) == {"a": 10, "b": 10, "c": 11}
    most = {"a": 11, "b": 10, "c": 10}
    assert budgets(Unstructured(), shapes, uniform(shapes, 0.41), most) == most


def independent_erk(shapes, density):
    """Bisect on eps: Σ min(1, eps·raw)·n = density·Σ n. The fix-point's limit, found another way."""
    raw = {k: sum(s) / math.prod(s) for k, s in shapes.items()}
    low, high = 0.0, 1 / min(raw.values())
    for _ in range(200):
        eps = (low + high) / 2
        if sum(min(1, eps * raw[k]) * math.prod(s) for k, s in shapes.items()) < density * size(shapes):
            low = eps
        else:
            high = eps
    return {k: min(1.0, high * raw[k]) for k in shapes}


@quick
@given(shapes=models, density=densities)
def test_erk_equals_an_independent_solution(shapes, density):
    assert erk(shapes, density) == pytest.approx(independent_erk(shapes, density), rel=1e-6)


@quick
@given(shapes=models, density=densities)
def test_erk_power_zero_is_uniform_and_er_ignores_kernels(shapes, density):
    assert erk(shapes, density, power=0.0) == pytest.approx(uniform(shapes, density))
    flat = {k: torch.Size(s[:2]) for k, s in shapes.items()}
    if all(len(s) == 2 for s in shapes.values()):
        assert er(shapes, density) == pytest.approx(erk(flat, density))


S = {"a": torch.Size([10, 10]), "b": torch.Size([20, 20]), "c": torch.Size([40, 40])}


def test_uniform_options():
    assert uniform(S, 0.1, first_dense=True) == {"a": 1.0, "b": 0.1, "c": 0.1}
    rest = (210 - 100) / 2000
    assert uniform(S, 0.1, first_dense=True, compensate=True) == pytest.approx({"a": 1.0, "b": rest, "c": rest})
    # the first layer alone is over the budget of 42: the others keep the density (SRigL's fallback)
    assert uniform(S, 0.02, first_dense=True, compensate=True) == {"a": 1.0, "b": 0.02, "c": 0.02}


def test_uniform_plus_by_hand():
    s = {"first": torch.Size([5, 4]), "mid": torch.Size([20, 20]), "mid2": torch.Size([10, 40]), "last": S["a"]}
    result = uniform_plus(s, 0.15)  # 138 = 20 + 20 + 98 over 800
    assert result == pytest.approx({"first": 1.0, "mid": 0.1225, "mid2": 0.1225, "last": 0.2})
    assert uniform_plus(s, 0.5)["last"] == 0.5
    with pytest.raises(SparsityError) as error:
        uniform_plus(s, 0.03)
    assert str(error.value) == (
        "`uniform_plus` at density 0.03: the first and the last layer alone need more than the whole budget (the "
        "others would get -0.0155). Raise the density or use `erk`."
    )


def test_balanced_fills_small_layers_and_pyramidal_decreases():
    s = {"c": S["c"], "a": S["a"], "b": S["b"]}
    assert balanced(s, 0.5) == pytest.approx({"a": 1.0, "b": 1.0, "c": 550 / 1600})
    p = list(pyramidal(S, 0.3).values())
    assert p == pytest.approx([p[0], p[0] ** 2, p[0] ** 3])


@pytest.mark.parametrize("distribution", ALL.values())
@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_densities_out_of_range(distribution, density):
    with pytest.raises(SparsityError, match=r"^A density must lie in \(0, 1\], that is, a sparsity in \[0, 1\); got "):
        distribution(S, density)


# ---- explicit --------------------------------------------------------------------------------------------

E = {"enc.0.weight": S["b"], "enc.1.weight": S["b"], "head.weight": S["a"]}


def test_explicit_patterns():
    assert explicit(E, 0.3, densities={"head*": 1.0, "enc.?.weight": 0.125}) == {
        "enc.0.weight": 0.125,
        "enc.1.weight": 0.125,
        "head.weight": 1.0,
    }
    first_wins = explicit(E, 0.3, densities={"enc.0.*": 0.5, "*": 0.1})
    assert list(first_wins.values()) == [0.5, 0.1, 0.1]
    shared = explicit(E, 0.3, densities={"head.weight": 0.9})
    assert total(E, shared) == pytest.approx(270)
    assert shared["enc.0.weight"] == shared["enc.1.weight"] == pytest.approx(180 / 800)


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        (
            {"hed.weight": 0.5},
            "`densities` pattern `'hed.weight'` matched no layer. Closest names: `head.weight`, `enc.1.weight`, "
            "`enc.0.weight`.",
        ),
        (
            {"enc.*": 0.9},
            "`explicit` at density 0.3 leaves -4.5000 for 1 unnamed layers (the first: `head.weight`); it must lie "
            "in (0, 1]. Name them too, or change the densities.",
        ),
        ({"enc.*": 0.0}, "A density must lie in (0, 1], that is, a sparsity in [0, 1); got density 0."),
    ],
)
def test_explicit_errors(given_, text):
    with pytest.raises(SparsityError) as error:
        explicit(E, 0.3, densities=given_)
    assert str(error.value) == text


# ---- ratios from saliencies ------------------------------------------------------------------------------


def tiny():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.double), torch.tensor([0, 1, 1, 0, 1])
    return model, lambda m: nn.functional.cross_entropy(m(x), y)


def test_snip_is_gradient_times_weight():
    model, loss = tiny()
    scores = snip_scores(model, loss)
    assert list(scores) == ["0.weight", "2.weight"]
    loss(model).backward()
    for name, score in scores.items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(score, (weight * weight.grad).abs().detach())
        layer = Layer(name, weight.detach(), weight.grad, weight != 0, {}, 0, generator(0, 0, name))
        torch.testing.assert_close(snip(layer), score)


def test_grasp_is_weight_times_hessian_times_gradient():
    model, loss = tiny()
    scores = grasp_scores(model, loss)
    names = ["0.weight", "2.weight"]
    weights = [model.get_parameter(n).detach() for n in names]
    sizes = [w.numel() for w in weights]

    def of(flat):
        parts = dict(zip(names, (p.view_as(w) for p, w in zip(flat.split(sizes), weights, strict=True)), strict=True))
        return loss(lambda x: torch.func.functional_call(model, parts, (x,)))

    flat = torch.cat([w.flatten() for w in weights])
    gradient = torch.autograd.functional.jacobian(of, flat)
    hessian = torch.autograd.functional.hessian(of, flat)
    expected = flat * (hessian @ gradient)
    torch.testing.assert_close(torch.cat([scores[n].flatten() for n in names]), expected)
    # w·Hg > 0: a step along the weight raises |g|², so that removing it lowers the gradient flow
    eps = 1e-6
    best = int(expected.argmax())
    shifted = flat.clone()
    shifted[best] *= 1 - eps
    after = torch.autograd.functional.jacobian(of, shifted)
    assert after.square().sum() - gradient.square().sum() == pytest.approx(-2 * eps * expected[best].item(), rel=1e-3)


@pytest.mark.parametrize("function", [snip_scores, grasp_scores])
def test_ratios_of_a_global_ranking(function):
    model, loss = tiny()
    scores = function(model, loss)
    shapes = {n: s.shape for n, s in scores.items()}
    for density in (0.2, 0.5, 0.9):
        ranked = sorted(((float(v), n) for n, s in scores.items() for v in s.flatten()), reverse=True)
        chosen = [n for _, n in ranked[: round(density * 20)]]
        expected = {n: max(chosen.count(n), 1) / shapes[n].numel() for n in shapes}
        assert by_score(shapes, density, scores=scores) == pytest.approx(expected)
    sparsifier = Sparsifier(model, static(), sparsity=0.5, distribution=partial(by_score, scores=scores))
    ratios = by_score(shapes, 0.5, scores=scores)
    assert sparsifier.densities == pytest.approx(ratios)


def test_by_score_keeps_one_weight_and_names_missing_scores():
    shapes = {"a": torch.Size([2, 2]), "b": torch.Size([2, 2])}
    scores = {"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}
    assert by_score(shapes, 0.25, scores=scores) == {"a": 0.5, "b": 0.25}
    with pytest.raises(SparsityError) as error:
        by_score(shapes, 0.5, scores={"a": torch.ones(2, 2)})
    assert str(error.value) == "`by_score` has no score for `b`. Scores were given for: ['a']."
