"""Random pruning with every distribution, and masks inside a fixed support with any method."""

import numpy as np
import pytest
import torch
from method_list import CLOCK, METHODS, Case, OneLayer, active, build, hard, network, snapshot, train

import sparselearn as sl
from sparselearn import distributions
from sparselearn.distributions import snip_scores, uniform

# ---- random pruning, and supports --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["uniform", "uniform_plus", "er", "erk", "balanced", "pyramidal", "by_score", "custom"]
)
def test_random_pruning_with_every_distribution(name):
    """The layers' counts are the distribution's, the total is exact, positions differ by seed, and nothing moves."""
    x = torch.randn(8, 4, 5, 5)
    if name == "by_score":
        scores = snip_scores(network(), lambda m: m(x).square().mean())
        distribution = lambda shapes, density: distributions.by_score(shapes, density, scores=scores)  # noqa: E731
    elif name == "custom":
        distribution = lambda shapes, density: dict(zip(shapes, (0.5, 0.1, 0.25), strict=True))  # noqa: E731
    else:
        distribution = getattr(distributions, name)
    model, sparsifier, optimizer = build(hard(sl.static()), distribution=distribution, sparsity=0.7)
    shapes = {n: m.shape for n, m in sparsifier.masks.items()}
    wanted = distribution(shapes, 0.3)
    for layer, mask in sparsifier.masks.items():
        assert abs(int(mask.sum()) - wanted[layer] * mask.numel()) <= 1
    assert sparsifier.nnz == round(sum(d * shapes[n].numel() for n, d in wanted.items()))
    start = snapshot(model, sparsifier)
    train(model, optimizer)
    assert all(torch.equal(m, start["masks"][n]) for n, m in sparsifier.masks.items())
    other = build(hard(sl.static()), distribution=distribution, sparsity=0.7, seed=1)[1]
    assert any(not torch.equal(m, start["masks"][n]) for n, m in other.masks.items())


def test_random_masks_are_uniform_over_positions():
    counts = np.zeros(20)
    for seed in range(400):
        counts[active(OneLayer([1.0] * 20, sl.static(), sparsity=0.75, seed=seed, initial=None).state.mask)] += 1
    assert counts.sum() == 400 * 5
    assert ((counts > 65) & (counts < 135)).all()  # 100 ± 4 standard deviations


SUPPORTED = {
    **{name: METHODS[name] for name in (
        "static", "set", "rigl", "rigl-stepping", "srigl-groups", "snfs", "snfs-lite", "dsr", "itop-rigl", "itop-set",
        "itop-unfired", "mest", "top-kast", "dst-ee", "static-reinit", "ste-fan-in",
    )},
    "granet": hard(sl.granet(**CLOCK, prune_stop=9)),
    "granet-uniform": hard(sl.granet(**CLOCK, prune_stop=9, scope="layer")),
    "gmp": hard(sl.gmp(**CLOCK, initial_density=0.5)),
    "gmp-global": hard(sl.gmp(**CLOCK, initial_density=0.5, scope="global")),
    "mest-soft": hard(sl.mest(**CLOCK, soft=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", SUPPORTED)
def test_masks_stay_inside_a_random_support_with_any_method(name):
    """Dense-to-sparse and dynamic training inside a support of half of the weights."""
    case = SUPPORTED[name]
    model, sparsifier, optimizer = build(Case(case.method, {"support": 0.5, "distribution": uniform}, 0.7))
    support = {n: layer.support.clone() for n, layer in sparsifier.state.layers.items()}
    for t in range(12):
        train(model, optimizer, t, t + 1)
        for layer, mask in sparsifier.masks.items():
            assert not (mask & ~support[layer]).any()
            assert not model.get_parameter(layer)[~support[layer]].any()
            assert int(mask.sum()) == sparsifier.state.layers[layer].nnz
            wider = sparsifier.state.layers[layer].memory.get("backward", mask)
            assert not (wider & ~support[layer]).any()
