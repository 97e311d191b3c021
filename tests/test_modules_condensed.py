"""Condensed modules: the same numbers as a dense masked layer, forward and backward, and nothing lost on the way."""

import copy
import io
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparselearn import SparsityError
from sparselearn.modules import CondensedConv2d, CondensedLinear, CsrLinear, MaskedDenseLinear, remove_ablated, shrink

LINEAR = [CondensedLinear, CsrLinear, MaskedDenseLinear]


def constant_fan_in(shape: tuple[int, ...], k: int, ablated: int = 0, seed: int = 0) -> Tensor:
    """A random mask with k weights in each row but the ablated ones."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(shape[0], math.prod(shape[1:]), dtype=torch.bool)
    for row in torch.randperm(shape[0], generator=generator)[ablated:]:
        mask[row, torch.randperm(mask.shape[1], generator=generator)[:k]] = True
    return mask.view(shape)


def masked(layer: nn.Module, mask: Tensor) -> nn.Module:
    with torch.no_grad():
        layer.weight.masked_fill_(~mask, 0)
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


def linear_case(n: int, i: int, k: int, ablated: int = 0, bias: bool = True, seed: int = 0) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(seed)
    mask = constant_fan_in((n, i), k, ablated, seed)
    return masked(nn.Linear(i, n, bias=bias), mask), mask


CASES = [  # out, in, K, ablated, bias
    (7, 13, 3, 0, True),
    (7, 13, 3, 2, True),
    (7, 13, 3, 2, False),
    (33, 65, 7, 0, False),
    (5, 9, 9, 0, True),  # K = fan-in
    (5, 9, 1, 1, True),  # K = 1
    (6, 11, 4, 5, True),  # all ablated but one
    (6, 11, 4, 5, False),
    (1, 1, 1, 0, True),
]


@pytest.mark.parametrize("shape", [(1,), (2,), (0,), (8,), (17,), (2, 3), (2, 0, 3), (40, 2), ()], ids=str)
@pytest.mark.parametrize(("n", "i", "k", "ablated", "bias"), CASES)
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_agrees_with_dense(kind, n, i, k, ablated, bias, shape):
    layer, mask = linear_case(n, i, k, ablated, bias)
    module = kind.from_dense(layer, mask)
    x = torch.randn(*shape, i)
    x_dense, x_sparse = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, seen = layer(x_dense), module(x_sparse)
    assert seen.shape == expected.shape
    torch.testing.assert_close(seen, expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    seen.backward(upstream)
    torch.testing.assert_close(x_sparse.grad, x_dense.grad)
    if bias:
        torch.testing.assert_close(module.bias.grad, layer.bias.grad)
    if kind is CondensedLinear:
        torch.testing.assert_close(module.scatter(module.values.grad), layer.weight.grad * mask)
    elif kind is CsrLinear:
        torch.testing.assert_close(module.values.grad, layer.weight.grad[mask])
    else:
        torch.testing.assert_close(module.weight.grad, layer.weight.grad * mask)


def test_ablated_neurons_emit_their_bias():
    layer, mask = linear_case(6, 11, 4, ablated=5)
    y = CondensedLinear.from_dense(layer, mask)(torch.randn(3, 11))
    dead = ~mask.any(1)
    assert dead.sum() == 5
    assert torch.equal(y[:, dead], layer.bias[dead].expand(3, 5))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.data())
def test_there_and_back_loses_nothing(n, i, data):
    k, ablated = data.draw(st.integers(1, i)), data.draw(st.integers(0, n - 1))
    layer, mask = linear_case(n, i, k, ablated, bias=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)))
    with torch.no_grad():  # just-grown weights: zeros of both signs inside the mask
        layer.weight[mask & (torch.rand(n, i) < 0.3)] = 0.0
        layer.weight[mask & (torch.rand(n, i) < 0.2)] = -0.0
    for kind in LINEAR:
        module = kind.from_dense(layer, mask)
        assert module.nnz == int(mask.sum())
        back, mask_back = module.to_dense()
        assert type(back) is nn.Linear
        assert torch.equal(mask_back, mask)
        assert torch.equal(back.weight.view(torch.int32), layer.weight.view(torch.int32))  # bits, so signs of zeros too
        assert (back.bias is None) == (layer.bias is None)
        assert back.bias is None or torch.equal(back.bias, layer.bias)


@pytest.mark.parametrize("kind", LINEAR)
def test_flags_are_carried_over(kind):
    layer, mask = linear_case(4, 6, 2)
    layer.weight.requires_grad_(False)
    module = kind.from_dense(layer.eval(), mask)
    assert not module.training
    assert not next(p for n, p in module.named_parameters() if n != "bias").requires_grad
    assert module.bias.requires_grad
    assert module.bias is not layer.bias
    back, _ = module.to_dense()
    assert not back.training
    assert not back.weight.requires_grad
    assert back.bias.requires_grad


def test_float64_gradients_by_finite_differences():
    layer, mask = linear_case(5, 7, 3, ablated=2)
    module = CondensedLinear.from_dense(layer.double(), mask)
    names = list(dict(module.named_parameters()))

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *(p.detach().requires_grad_() for p in module.parameters())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [CondensedLinear, CsrLinear])
def test_half_precision_by_conversion(kind, dtype):
    layer, mask = linear_case(9, 17, 5, ablated=2)
    module = kind.from_dense(layer, mask).to(dtype)
    assert module.values.dtype == dtype
    x = torch.randn(4, 17).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    exact = F.linear(x.double(), module.to_dense()[0].weight.double(), module.bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    y.sum().backward()
    assert module.values.grad.dtype == dtype


@pytest.mark.parametrize("kind", LINEAR)
def test_autocast_gives_what_a_linear_gives(kind):
    layer, mask = linear_case(9, 17, 5, ablated=2)
    module = kind.from_dense(layer, mask)
    for batch in (1, 4, 40):
        x = torch.randn(batch, 17)
        with torch.autocast("cpu", torch.bfloat16):
            seen, expected = module(x), layer(x)
        assert seen.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(seen, expected, rtol=0.05, atol=0.05)
        seen.sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


CONVS = [
    {"in_channels": 3, "out_channels": 5, "kernel_size": 3},
    {"in_channels": 3, "out_channels": 5, "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "bias": False},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "dilation": 2, "padding": "same"},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "padding": 1},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "padding": 1, "padding_mode": "reflect"},
    {"in_channels": 4, "out_channels": 7, "kernel_size": 1, "stride": 2},
    {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]


@pytest.mark.parametrize("ablated", [0, 2])
@pytest.mark.parametrize("arguments", CONVS, ids=str)
def test_conv_agrees_with_dense_and_goes_back(arguments, ablated):
    torch.manual_seed(0)
    layer = nn.Conv2d(**arguments)
    mask = constant_fan_in(tuple(layer.weight.shape), 2, ablated)
    masked(layer, mask)
    module = CondensedConv2d.from_dense(layer, mask)
    for shape in [(2,), (1,), (), (0,)]:
        x = torch.randn(*shape, layer.in_channels, 7, 9)
        x_dense, x_sparse = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, seen = layer(x_dense), module(x_sparse)
        torch.testing.assert_close(seen, expected)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected)
        layer.zero_grad(), module.zero_grad()
        upstream = torch.randn_like(expected)
        expected.backward(upstream), seen.backward(upstream)
        torch.testing.assert_close(x_sparse.grad, x_dense.grad)
        torch.testing.assert_close(module.scatter(module.values.grad), layer.weight.grad * mask)
    back, mask_back = module.to_dense()
    assert torch.equal(mask_back, mask)
    assert torch.equal(back.weight, layer.weight)
    assert repr(back) == repr(layer)


# ---- files and copies ------------------------------------------------------------------------------------------


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", [*LINEAR, CondensedConv2d])
def test_copies_are_equal_and_independent(kind):
    layer = nn.Linear(12, 5) if kind is not CondensedConv2d else nn.Conv2d(3, 5, 2)
    mask = constant_fan_in(tuple(layer.weight.shape), 4, 1)
    module = kind.from_dense(masked(layer, mask), mask)
    x = torch.randn(3, 12) if kind is not CondensedConv2d else torch.randn(2, 3, 4, 4)
    y = module(x)
    for other in copies(module):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            next(other.parameters()).mul_(2)
        assert not torch.equal(other(x), y)
        assert torch.equal(module(x), y)


def test_state_dict_round_trip_takes_over_indices_and_sizes():
    x = torch.randn(3, 13)
    source = CondensedLinear.from_dense(*linear_case(7, 13, 3, ablated=2, seed=1))
    for k, ablated in [(3, 2), (5, 0)]:
        target = CondensedLinear.from_dense(*linear_case(7, 13, k, ablated, seed=2))
        parameter = target.values
        target(x)  # builds what the old indices need
        target.load_state_dict(source.state_dict())
        assert target.values is parameter
        assert torch.equal(target(x), source(x))
        assert torch.equal(target.mask, source.mask)
        target(x).sum().backward()
        assert target.values.grad.shape == source.values.shape


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "indices",
            torch.full((5, 3), 13, dtype=torch.int16),
            r"`indices` .* within \[0, 13\); they lie in \[13, 13\]",
        ),
        ("indices", -torch.ones(5, 3, dtype=torch.int16), r"they lie in \[-1, -1\]"),
        ("active", torch.tensor([0, 1, 2, 3, 7]), r"`active` .* within \[0, 7\)"),
        ("values", torch.zeros(5, 2), r"got shapes \[5, 2\], \[5, 3\] and \[5\]"),
    ],
)
def test_damaged_files_are_refused_before_they_are_used(name, value, message):
    module = CondensedLinear.from_dense(*linear_case(7, 13, 3, ablated=2))
    saved = module.state_dict() | {name: value}
    with pytest.raises(SparsityError, match=message):
        module.load_state_dict(saved)


def test_damaged_csr_file_is_refused():
    module = CsrLinear.from_dense(*linear_case(7, 13, 3))
    saved = module.state_dict() | {"columns": torch.full((21,), 99, dtype=torch.int32)}
    with pytest.raises(SparsityError, match=r"no CSR matrix \[7, 13\]"):
        module.load_state_dict(saved)


def test_index_type_is_the_smallest_that_fits():
    for columns, dtype in [(32768, torch.int16), (32769, torch.int32)]:
        mask = torch.zeros(1, columns, dtype=torch.bool)
        mask[0, [0, columns - 1]] = True
        layer = masked(nn.Linear(columns, 1), mask)
        module = CondensedLinear.from_dense(layer, mask)
        assert module.indices.dtype == dtype
        x = torch.randn(2, columns)
        torch.testing.assert_close(module(x), layer(x))
        assert torch.equal(module.to_dense()[1], mask)


def test_values_changed_in_place_count_at_once():
    layer, mask = linear_case(7, 13, 3)
    module = CondensedLinear.from_dense(layer, mask)
    for batch in (1, 4, 40):
        x = torch.randn(batch, 13)
        with torch.no_grad():
            before = module(x)
            module.values.data.mul_(2)  # an optimizer, or load_state_dict
            assert torch.allclose(module(x) - layer.bias, 2 * (before - layer.bias), atol=1e-6)


@pytest.mark.parametrize("ablated", [0, 2])
def test_feature_major_inputs_give_the_same(ablated):
    layer, mask = linear_case(7, 13, 3, ablated)
    module = CondensedLinear.from_dense(layer, mask)
    for batch in (2, 5, 40):
        x = torch.randn(13, batch).T
        with torch.no_grad():
            torch.testing.assert_close(module(x), layer(x))
            module.values.mul_(2)
            torch.testing.assert_close(module(x) - module.bias, 2 * (layer(x) - layer.bias))
            module.values.div_(2)


def test_two_threads_may_call_one_module():
    module = CondensedLinear.from_dense(*linear_case(64, 128, 13, ablated=5))
    inputs = [torch.randn(b, 128) for b in (1, 8, 32, 33)] * 8
    with torch.no_grad():
        expected = [copy.deepcopy(module)(x) for x in inputs]
        wrong = []

        def work():
            with torch.no_grad():
                for x, y in zip(inputs, expected, strict=True):
                    if not torch.allclose(module(x), y, atol=1e-5):
                        wrong.append(x.shape)

        threads = [threading.Thread(target=work) for _ in range(2)]
        [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


# ---- refusals ------------------------------------------------------------------------------------------------


def test_unequal_rows_are_refused_and_the_sibling_named():
    layer, mask = linear_case(4, 6, 2)
    mask[0] = True
    message = r"rows of this mask \(shape \[4, 6\]\) have from 2 to 6\. Train with `ConstantFanIn`, or use `CsrLinear`"
    with pytest.raises(SparsityError, match=message):
        CondensedLinear.from_dense(layer, mask)
    x = torch.randn(3, 6)
    torch.testing.assert_close(CsrLinear.from_dense(layer, mask)(x), layer(x))


@pytest.mark.parametrize("kind", LINEAR)
def test_bad_masks_are_refused(kind):
    layer, mask = linear_case(4, 6, 2)
    with pytest.raises(SparsityError, match=r"must be bool and have the weight's shape \[4, 6\]"):
        kind.from_dense(layer, mask.float())
    with pytest.raises(SparsityError, match=r"it is torch.bool of shape \[6, 4\]"):
        kind.from_dense(layer, mask.T)
    with torch.no_grad():
        layer.weight[~mask] = 1
    with pytest.raises(SparsityError, match=r"16 weights outside the mask .* are not zero and would be lost"):
        kind.from_dense(layer, mask)
    with pytest.raises(SparsityError, match="built from a Linear; got a Conv2d"):
        kind.from_dense(nn.Conv2d(1, 1, 1), mask)


def test_bad_inputs_are_refused():
    module = CondensedLinear.from_dense(*linear_case(4, 6, 2))
    with pytest.raises(SparsityError, match=r"has 6 inputs; it got a tensor of shape \[3, 5\]"):
        module(torch.randn(3, 5))
    with pytest.raises(SparsityError, match=r"holds torch.float32 and got an input of torch.bfloat16"):
        module(torch.randn(3, 6).bfloat16())
    with pytest.raises(SparsityError, match="needs at least one active weight"):
        CondensedLinear.from_dense(masked(nn.Linear(6, 4), torch.zeros(4, 6).bool()), torch.zeros(4, 6).bool())
    conv = nn.Conv2d(3, 2, 2)
    mask = constant_fan_in((2, 3, 2, 2), 2)
    with pytest.raises(SparsityError, match=r"needs \[B, 3, H, W\]"):
        CondensedConv2d.from_dense(masked(conv, mask), mask)(torch.randn(2, 4, 5, 5))


# ---- removing ablated neurons ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Softplus()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("second_kind", ["dense", "condensed"])
def test_removal_leaves_outputs_equal(activation, bias, second_kind):
    first, mask = linear_case(12, 9, 3, ablated=5, bias=bias)
    second, second_mask = linear_case(7, 12, 4, ablated=1, bias=bias, seed=1)
    layers = [CondensedLinear.from_dense(first, mask), activation, second]
    if second_kind == "condensed":
        layers[2] = CondensedLinear.from_dense(second, second_mask)
    model = nn.Sequential(nn.Sequential(*layers), nn.Tanh())
    x = torch.randn(20, 9)
    expected = model(x)
    assert remove_ablated(model) == ["0.0"]
    assert model[0][0].out_features == model[0][2].in_features == 7
    assert len(model[0][0].active) == 7
    assert model(x).shape == expected.shape
    torch.testing.assert_close(model(x), expected)
    assert remove_ablated(model) == []


def test_removal_is_refused_where_it_is_not_safe():
    def condensed(n=12, i=9, k=3, ablated=5, seed=0):
        return CondensedLinear.from_dense(*linear_case(n, i, k, ablated, seed=seed))

    tied = nn.Linear(12, 12)
    hooked = nn.Sequential(condensed(), nn.ReLU(), nn.Linear(12, 2))
    hooked[0].register_forward_hook(lambda *_: None)
    models = [
        nn.Sequential(condensed(), nn.Softmax(-1), nn.Linear(12, 2)),
        nn.Sequential(condensed(), nn.LayerNorm(12), nn.Linear(12, 2)),
        nn.Sequential(condensed(), nn.Dropout(), nn.Linear(12, 2)),
        nn.Sequential(condensed(), nn.ReLU()),
        nn.Sequential(condensed(), nn.ReLU(), condensed(4, 12, 12, 0)),  # 12 weights per neuron, 7 inputs left
        nn.Sequential(condensed(), nn.ReLU(), tied, nn.ReLU(), tied),
        nn.ModuleList([condensed(), nn.ReLU(), nn.Linear(12, 2)]),  # nobody knows the order of calls
        nn.Sequential(condensed(ablated=0), nn.ReLU(), nn.Linear(12, 2)),
        hooked,
    ]
    for model in models:
        before = repr(model)
        assert remove_ablated(model) == []
        assert repr(model) == before
    with pytest.raises(SparsityError, match="Softmax is not known to be one"):
        shrink(condensed(), [nn.Softmax(-1)], nn.Linear(12, 2))
    with pytest.raises(SparsityError, match="after 12 neurons must be"):
        shrink(condensed(), [nn.ReLU()], nn.Linear(13, 2))
    with pytest.raises(SparsityError, match="Only 7 inputs remain for a layer with 12 weights per neuron"):
        shrink(condensed(), [nn.ReLU()], condensed(4, 12, 12, 0))
