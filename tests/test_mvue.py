"""Linear layers that prune their neural gradients to 2:4 without bias."""

import copy
import itertools

import pytest
import torch
from torch import nn

from sparselearn import SparseOptimizer, Sparsifier, SparsityError
from sparselearn.methods import pretrain_24
from sparselearn.methods.n_m import PAIRS, mvue_pairs
from sparselearn.modules import mvue as module
from sparselearn.modules.mvue import MvueLinear, exact, mvue


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def test_the_mean_of_the_weights_gradient_over_all_draws_is_exact(monkeypatch):
    torch.manual_seed(0)
    layer = mvue(nn.Sequential(nn.Linear(3, 2, bias=False))).double()
    x, grad = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    grad[4:, 1] = torch.tensor([5.0, 0.1, -0.2, 0.3])  # one that outweighs the others
    groups = grad.T.reshape(-1, 4)
    magnitude, order = groups.abs().sort(dim=-1)
    probabilities, amounts = mvue_pairs(magnitude)
    mean = torch.zeros(2, 3, dtype=torch.float64)
    total = 0.0
    for picks in itertools.product(range(len(PAIRS)), repeat=len(groups)):
        chosen = torch.stack([amounts[g, pick] for g, pick in enumerate(picks)])
        drawn = torch.zeros_like(groups).scatter(1, order, chosen) * groups.sign()
        weight = float(torch.stack([probabilities[g, pick] for g, pick in enumerate(picks)]).prod())
        if weight == 0:
            continue
        monkeypatch.setattr(module, "mvue_24", lambda values, generator, drawn=drawn: drawn.view(values.shape))
        layer.zero_grad()
        layer(x).backward(grad)
        mean += weight * layer[0].weight.grad
        total += weight
    assert abs(total - 1) < 1e-12
    torch.testing.assert_close(mean, grad.T @ x, rtol=0, atol=1e-12)


def test_gradients_are_2_of_4_along_tokens_and_the_rest_of_a_batch_stays():
    layer = mvue(nn.Sequential(nn.Linear(8, 16)))[0]
    grad = torch.randn(11, 16)
    pruned = layer.pruned(grad)
    assert ((pruned[:8].unflatten(0, (2, 4)) != 0).sum(1) == 2).all()
    assert torch.equal(pruned[8:], grad[8:])
    assert not torch.equal(layer.pruned(grad), pruned)  # another draw


def test_forward_and_the_gradients_of_input_and_bias_are_the_dense_layers():
    plain, pruned = network(), mvue(network())
    x = torch.randn(2, 12, 8)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [net(part) for net, part in zip((plain, pruned), inputs, strict=True)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip((plain[0], plain[2]), (pruned[0], pruned[2]), strict=True):
        torch.testing.assert_close(a.bias.grad, b.bias.grad)
        assert not torch.allclose(a.weight.grad, b.weight.grad)


def test_autocast_computes_in_its_dtype():
    net = mvue(network())
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(8, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32


def test_evaluation_draws_nothing_and_exact_goes_back():
    net = mvue(network())
    net.eval()(torch.randn(8, 8)).sum().backward()
    assert net[0].draws == 0
    reference = network()
    reference(x := torch.randn(8, 8)).sum().backward()
    net = exact(net.train())
    net.zero_grad()
    net(x).sum().backward()
    assert torch.equal(net[0].weight.grad, reference[0].weight.grad)
    assert net.state_dict().keys() == reference.state_dict().keys()


def train(net, sparsifier, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()


def test_2_4_pretraining_resumes_bit_for_bit():
    def made():
        net = mvue(network(), exclude=("2",))
        sparsifier = Sparsifier(net, pretrain_24(steps=100, every=3), sparsity=0.5, exclude=["2.weight"])
        return net, sparsifier, SparseOptimizer(torch.optim.AdamW(net.parameters(), lr=1e-2), sparsifier)

    whole, first, resumed = made(), made(), made()
    train(*whole, range(9))
    train(*first, range(5))
    with first[1].dense_weights():
        weights = copy.deepcopy(first[0].state_dict())
    with resumed[1].dense_weights():
        resumed[0].load_state_dict(weights)
    for part, other in zip(resumed[1:], first[1:], strict=True):
        part.load_state_dict(copy.deepcopy(other.state_dict()))
    assert resumed[0][0].draws == 5
    train(*resumed, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True))
    assert torch.equal(whole[1].masks["0.weight"], resumed[1].masks["0.weight"])


def test_mistakes_are_named():
    with pytest.raises(SparsityError, match="`exclude` names `x`"):
        mvue(network(), exclude=("x",))
    with pytest.raises(SparsityError, match="the model has none"):
        mvue(nn.ReLU())
    assert isinstance(mvue(network())[0], MvueLinear)
