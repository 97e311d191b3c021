"""BDWP and Bi-Mask: one mask forward, another for the gradient of the input, and a dense gradient of the weight."""

import pytest
import torch
from torch import nn

import sparselearn as sl
from sparselearn.modules.two_masks import finish, two_masks


def best(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """2:4 along a dimension, by sorting."""
    moved = weight.detach().abs().movedim(dim, -1)
    groups = moved.unflatten(-1, (-1, 4))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return mask.flatten(-2).movedim(-1, dim)


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_bdwp_is_its_equations(shape) -> None:
    torch.manual_seed(0)
    layer = two_masks(nn.Sequential(nn.Linear(12, 8)), 2, 4)[0]
    x = torch.randn(shape, requires_grad=True)
    weight, forward, backward = layer.weight.detach().clone(), best(layer.weight, 1), best(layer.weight, 0)
    y = layer(x)
    torch.testing.assert_close(y, x @ (weight * forward).T + layer.bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ (weight * backward))
    torch.testing.assert_close(layer.weight.grad, grad.flatten(0, -2).T @ x.detach().flatten(0, -2))
    torch.testing.assert_close(layer.bias.grad, grad.flatten(0, -2).sum(0))
    assert not torch.equal(forward, backward)


def test_bdwp_of_a_convolution_is_its_equations() -> None:
    torch.manual_seed(0)
    layer = two_masks(nn.Sequential(nn.Conv2d(8, 4, 3, stride=2, padding=1)), 2, 4)[0]
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    weight, forward, backward = layer.weight.detach().clone(), best(layer.weight, 1), best(layer.weight, 0)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    outputs = []
    for mask in (forward, backward):  # autograd's own convolution, with each of the masked weights
        w, z = (weight * mask).requires_grad_(), x.detach().clone().requires_grad_()
        out = nn.functional.conv2d(z, w, layer.bias.detach(), 2, 1)
        out.backward(grad)
        outputs.append((out, z.grad, w.grad))
    torch.testing.assert_close(y, outputs[0][0])
    torch.testing.assert_close(x.grad, outputs[1][1])
    torch.testing.assert_close(layer.weight.grad, outputs[0][2])


def test_bi_masks_backward_mask_lies_within_the_forward_one_and_keeps_more_by_permuting() -> None:
    torch.manual_seed(0)
    layer = two_masks(nn.Sequential(nn.Linear(16, 32)), 2, 4, kind="bi_mask")[0]
    forward, backward = layer.forward_mask, layer.backward_mask
    assert torch.equal(forward, best(layer.weight, 1))
    assert not bool((backward & ~forward).any())
    unpermuted = best(layer.weight * forward, 0) & forward
    size = layer.weight.detach().abs()
    assert float((size * backward).sum()) > float((size * unpermuted).sum())


def test_masks_follow_the_dense_weight_every_so_many_training_passes() -> None:
    torch.manual_seed(0)
    layer = two_masks(nn.Sequential(nn.Linear(8, 4)), 2, 4, every=2)[0]
    start = layer.forward_mask.clone()
    layer(torch.randn(1, 8))  # pass 0
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(1))
    layer(torch.randn(1, 8))  # pass 1 keeps the masks
    assert torch.equal(layer.forward_mask, start)
    layer.eval()(torch.randn(1, 8))
    assert torch.equal(layer.forward_mask, start)
    layer.train()(torch.randn(1, 8))  # pass 2
    assert torch.equal(layer.forward_mask, best(layer.weight, 1))
    assert not torch.equal(layer.forward_mask, start)


def test_training_learns_and_ends_exactly_sparse_in_ordinary_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    two_masks(model, 2, 4)
    x = torch.randn(64, 16)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    finish(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for i in (0, 2):
        assert torch.equal(model[i].weight != 0, best(model[i].weight, 1))
        assert int((model[i].weight != 0).sum()) * 2 == model[i].weight.numel()


def test_a_checkpoint_resumes_bit_for_bit() -> None:
    def start():
        torch.manual_seed(0)
        model = two_masks(nn.Sequential(nn.Linear(8, 8)), 2, 4, every=3, kind="bi_mask")
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((2, 8), 0.1 * step)).square().sum().backward()
            optimizer.step()

    whole, optimizer = start()
    train(whole, optimizer, range(8))
    first, optimizer = start()
    train(first, optimizer, range(4))
    again, other = start()
    again.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(again, other, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_layers_that_do_not_fit_are_named() -> None:
    with pytest.raises(sl.SparsityError, match=r"`0`: .* multiple of 4"):
        two_masks(nn.Sequential(nn.Linear(6, 8)), 2, 4)
    with pytest.raises(sl.SparsityError, match="no layer of the model"):
        two_masks(nn.Sequential(nn.Linear(8, 8)), 2, 4, exclude=("head",))
    model = two_masks(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), 2, 4, exclude=("0",))
    assert type(model[0]) is nn.Linear
