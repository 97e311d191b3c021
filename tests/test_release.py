"""Gradients that are freed as soon as backward has made them: same numbers, less memory."""

import copy

import pytest
import torch
from torch import nn

import sparselearn as sl

METHODS = {
    "static": lambda: sl.static(),
    "rigl": lambda: sl.rigl(stop=100, every=3),
    "set": lambda: sl.set_(stop=100, every=3),
    "srigl": lambda: sl.srigl(stop=100, every=3),
    "granet": lambda: sl.granet(stop=100, prune_stop=50, every=3),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def wrapped(model, method="rigl", optimizer="sgd", release=True, **options):
    sparsifier = sl.Sparsifier(model, METHODS[method](), sparsity=0.75, **options)
    return sl.SparseOptimizer(OPTIMIZERS[optimizer](model.parameters()), sparsifier, release_gradients=release)


def train(method, optimizer, release, micro=1, **options):
    model = network()
    wrapper = wrapped(model, method, optimizer, release, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        wrapper.zero_grad()
        for _ in range(micro):
            model(torch.randn(8, 12, generator=generator)).square().mean().backward()
        wrapper.step()
    return model, wrapper


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_released_gradients_train_bit_for_bit_alike(method, optimizer, micro) -> None:
    plain, a = train(method, optimizer, False, micro)
    released, b = train(method, optimizer, True, micro)
    for one, two in zip(plain.parameters(), released.parameters(), strict=True):
        assert torch.equal(one, two)
    for p, q in zip(plain.parameters(), released.parameters(), strict=True):
        one, two = a.state[p], b.state[q]
        assert one
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key])) for key in one)


def test_density_scaling_goes_with_it() -> None:
    plain, _ = train("rigl", "adamw", False, density_scaling=True)
    released, _ = train("rigl", "adamw", True, density_scaling=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), released.parameters(), strict=True))


def test_between_backward_and_step_only_active_values_are_held() -> None:
    model = network()
    wrapper = wrapped(model)
    masks = wrapper.sparsifier.masks
    for step in range(5):
        wrapper.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        for name, parameter in model.named_parameters():
            dense = step == 3 or name not in masks  # RigL scores the gradients of step 3
            assert parameter.grad.untyped_storage().nbytes() == (parameter.nbytes if dense else 4)
        wrapper.step()


def test_a_gradient_thrown_away_is_gone() -> None:
    runs = []
    for extra in (False, True):
        model = network()
        wrapper = wrapped(model)
        if extra:
            model(torch.ones(8, 12)).square().mean().backward()
            wrapper.zero_grad()
        model(torch.full((8, 12), 0.5)).square().mean().backward()
        wrapper.step()
        runs.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_clipping_is_not_silently_wrong() -> None:
    model = network()
    wrapper = wrapped(model)
    model(torch.randn(8, 12)).square().mean().backward()
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(sl.SparsityError, match="no gradients left to clip"):
        wrapper.before_step()


def test_methods_that_use_every_gradient_are_refused() -> None:
    for method in (sl.sr_ste(sl.NM(2, 4)), sl.snfs(stop=100, every=3)):
        model = network()
        sparsity = None if isinstance(method, sl.StraightThrough) else 0.75
        sparsifier = sl.Sparsifier(model, method, sparsity=sparsity)
        with pytest.raises(sl.SparsityError, match="release_gradients"):
            sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier, release_gradients=True)
