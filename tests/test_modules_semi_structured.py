"""`SemiStructuredLinear`: equal to its dense layer, there and back, files, training, and which way it takes."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparselearn as sl
from sparselearn import SparsityError
from sparselearn.kernels import crossover
from sparselearn.kernels.crossover_measure import measured_seconds
from sparselearn.kernels.semi_structured import cslt, pack, reference
from sparselearn.modules import SemiStructuredLinear, convert, revert
from sparselearn.modules import semi_structured as module_file
from sparselearn.modules.semi_structured import pattern_of
from sparselearn.structures import NM, TransposableNM

pytestmark = pytest.mark.filterwarnings("ignore:`SemiStructuredLinear` computes densely here")


def pair(neurons=16, inputs=32, structure=NM(2, 4), bias=True, dtype=torch.float64, seed=0):  # noqa: B008
    """A masked linear layer and its mask."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, neurons, bias, dtype=dtype)
    mask = structure.topk(torch.rand(neurons, inputs), neurons * inputs // structure.m * structure.n)
    layer.weight.data.masked_fill_(~mask, 0)
    return layer, mask


@settings(max_examples=25, deadline=None)
@given(pattern=st.sampled_from([(2, 4), (1, 4), (2, 8), (1, 16), (3, 5)]), neurons=st.integers(1, 9),
       groups=st.integers(1, 5), bias=st.booleans())  # fmt: skip
def test_there_and_back_loses_nothing(pattern, neurons, groups, bias):
    layer, mask = pair(neurons, groups * pattern[1], NM(*pattern), bias)
    with torch.no_grad():
        layer.weight.view(-1)[mask.view(-1).nonzero()[0]] = 0.0  # a weight that was just grown
    module = SemiStructuredLinear.from_dense(layer, mask, *pattern)
    back, mask_back = module.to_dense()
    assert torch.equal(back.weight, layer.weight)
    assert torch.equal(mask_back, mask)
    assert (back.bias is None) == (not bias)
    assert module.nnz == int(mask.sum())
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    torch.testing.assert_close(module(x), layer(x))


def test_patterns_are_found_and_others_refused():
    for pattern in [(2, 4), (1, 4), (2, 8), (1, 16), (3, 5)]:
        assert pattern_of(pair(8, 240, NM(*pattern))[1]) == pattern
    assert pattern_of(torch.tensor([[True, False] * 4])) == (2, 4)  # also 1:2
    mask = pair()[1]
    mask[0, :4] = True
    with pytest.raises(SparsityError, match=r"same number n of every m inputs.* \(shape \[16, 32\]"):
        pattern_of(mask)
    with pytest.raises(SparsityError, match="exactly 2 active weights of every 4"):
        SemiStructuredLinear.from_dense(nn.Linear(8, 2), torch.ones(2, 8).bool(), 2, 4)
    layer, mask = pair()
    with pytest.raises(SparsityError, match="weights outside the mask"):
        SemiStructuredLinear.from_dense(layer, mask.roll(1, 1), 2, 4)
    values, places = pack(torch.randn(4, 8))
    with pytest.raises(SparsityError, match=r"bias must have shape \[4\]; it has \[3\]"):
        SemiStructuredLinear(nn.Parameter(values), places, nn.Parameter(torch.zeros(3)))
    with pytest.raises(SparsityError, match="must ascend"):
        SemiStructuredLinear(nn.Parameter(values), torch.zeros_like(places))


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (32,), (0, 32)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_values_bias_and_input_get_the_dense_layers_gradients(shape, frozen):
    layer, mask = pair()
    layer.weight.requires_grad_(not frozen)
    module = SemiStructuredLinear.from_dense(layer, mask)
    inputs = [torch.ones(shape, dtype=torch.float64).mul_(0.3).requires_grad_() for _ in range(2)]
    outputs = [m(i) for m, i in zip((module, layer), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(module.bias.grad, layer.bias.grad)
    if frozen:
        assert module.values.grad is None
    else:
        torch.testing.assert_close(module.scatter(module.values.grad), layer.weight.grad * mask)


def test_training_is_masked_dense_training():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).double()
    sparsifier = sl.Sparsifier(dense, sl.static(structure=TransposableNM(2, 4)))
    sparse = copy.deepcopy(dense)
    convert(sparse, sparsifier, force=True, candidates=[SemiStructuredLinear])
    assert [type(m) for m in sparse] == [SemiStructuredLinear, nn.ReLU, SemiStructuredLinear]
    assert all(m.places_t is not None for m in sparse if isinstance(m, SemiStructuredLinear))
    one = sl.SparseOptimizer(torch.optim.AdamW(dense.parameters(), 1e-2), sparsifier)
    two = torch.optim.AdamW(sparse.parameters(), 1e-2)
    for _ in range(10):
        x = torch.randn(8, 16, dtype=torch.float64)
        for net, optimizer in ((dense, one), (sparse, two)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    masks = revert(sparse)
    for name, mask in sparsifier.masks.items():
        assert torch.equal(masks[name], mask)
        torch.testing.assert_close(sparse.get_parameter(name), dense.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_copies_and_files_take_over_places():
    module = SemiStructuredLinear.from_dense(*pair(structure=TransposableNM(2, 4)))
    other = SemiStructuredLinear.from_dense(*pair(seed=1))
    x = torch.randn(3, 32, dtype=torch.float64)
    assert other.places_t is None
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module)):
        assert torch.equal(twin(x), module(x))
        assert torch.equal(twin.places_t, module.places_t)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), module(x))
    assert set(module.state_dict()) == {"values", "places", "bias"}
    with pytest.raises(SparsityError, match=r"The saved `` cannot be loaded. .*must ascend"):
        other.load_state_dict(module.state_dict() | {"places": torch.zeros_like(module.places)})


def test_a_frozen_layer_keeps_its_forms_only_while_they_are_right():
    layer, mask = pair()
    module = SemiStructuredLinear.from_dense(layer, mask).requires_grad_(False)
    x = torch.randn(3, 32, dtype=torch.float64)
    module(x)
    assert module._forms
    weight = next(iter(module._forms.values()))[0]
    module(x)
    assert next(iter(module._forms.values()))[0] is weight
    assert not copy.deepcopy(module)._forms
    module.load_state_dict(SemiStructuredLinear.from_dense(*pair(seed=1)).state_dict())
    torch.testing.assert_close(module(x), pair(seed=1)[0](x))
    module.values.data.mul_(2)
    module.refresh()
    torch.testing.assert_close(module(x) - module.bias, 2 * (pair(seed=1)[0](x) - module.bias))
    module.requires_grad_(True)
    module(x)
    assert not module._forms
    assert module.float()(x.float()).dtype == torch.float32


def test_dtypes_are_those_of_a_linear():
    layer, mask = pair(dtype=torch.float32)
    module = SemiStructuredLinear.from_dense(layer, mask)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = module(x), layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(SparsityError, match=r"holds torch.float32 and got an input of torch.float64"):
        module(x.double())
    with pytest.raises(SparsityError, match=r"needs \[..., 32\]; it got \[4, 31\]"):
        module(x[:, 1:])


@pytest.mark.filterwarnings("default")
def test_a_cpu_is_told_once():
    module_file._notice.cache_clear()
    module = SemiStructuredLinear.from_dense(*pair())
    x = torch.randn(3, 32, dtype=torch.float64)
    with pytest.warns(UserWarning, match="computes densely here: it has no sparse products for cpu") as notices:
        [layer(x) for layer in (module, module, SemiStructuredLinear.from_dense(*pair(seed=1)))]
    assert len(notices) == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_whole_graphs_compile(frozen):
    module = SemiStructuredLinear.from_dense(*pair(structure=TransposableNM(2, 4)))
    module.requires_grad_(not frozen)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=not frozen)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    if not frozen:
        expected = torch.autograd.grad(module(x).square().sum(), (x, *module.parameters()))
        actual = torch.autograd.grad(compiled(x).square().sum(), (x, *module.parameters()))
        torch.testing.assert_close(actual, expected)


# ---- which way, on a GPU that is not there -----------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELEARN_CACHE", str(tmp_path))
    monkeypatch.setattr(crossover, "_tables", {})
    monkeypatch.setattr(module_file, "_unserved", lambda device, dtype: "")
    monkeypatch.setattr(cslt, "trusted", lambda device, dtype: True)
    module_file._notice.cache_clear()


def ways(module, tokens, training=False, dtype=torch.bfloat16):
    frozen = not module.values.requires_grad
    shape = (module.out_features, module.in_features)
    pattern = f"{module.n}:{module.m}"
    return module_file._ways(torch.device("cuda"), dtype, *shape, pattern, tokens, training, frozen).split()


@pytest.mark.usefixtures("gpu")
def test_ways_are_those_that_a_layer_allows():
    frozen = SemiStructuredLinear.from_dense(*pair(32, 256, dtype=torch.bfloat16)).requires_grad_(False)
    assert ways(frozen, 1) == ["decode", "gemv", "gemm"]
    assert ways(frozen, 16) == ["decode", "gemm"]
    assert ways(frozen, 128) == ["gemm"]
    assert ways(frozen, 128, training=True) == ["gemm"]
    trains = SemiStructuredLinear.from_dense(*pair(32, 256, dtype=torch.bfloat16))
    assert ways(trains, 8) == ["gemv", "gemm"]
    other = SemiStructuredLinear.from_dense(*pair(32, 256, NM(1, 8)))
    assert ways(other, 8, dtype=torch.float32) == ["gemv"]
    with pytest.warns(UserWarning, match=r"of 1:8, shape \[32, 256\] and torch.float32 computes many tokens densely"):
        assert ways(other, 16, dtype=torch.float32) == []


@pytest.mark.usefixtures("gpu")
def test_the_fastest_way_measured_is_taken_where_it_is_possible():
    module = SemiStructuredLinear.from_dense(*pair(32, 256, dtype=torch.bfloat16)).requires_grad_(False)
    x = torch.randn(5, 256).bfloat16()
    assert module._way(x, False, True) == "dense"  # nothing was measured
    case = module._case(x.dtype, False, 8)
    assert (case.tokens, case.pattern, case.fan_in) == (8, "2:4", 128)
    crossover.table().seconds[case] = {"dense": 3.0, "gemv": 2.0, "decode": 1.0}
    assert module._way(x, False, True) == "decode"
    assert module._way(x, False, False) == "dense"
    assert module._way(torch.randn(9, 256).bfloat16(), False, True) == "dense"
    module.way = "sparse"
    assert module._way(x, False, True) == "decode"
    module.way = "gemv"
    assert module._way(x, False, True) == "gemv"
    assert module._way(x, True, True) == "dense"
    y = module(x)  # the operator's formula
    torch.testing.assert_close(
        y, nn.functional.linear(x, module.to_dense()[0].weight, module.bias), rtol=2e-2, atol=2e-2
    )


@pytest.mark.usefixtures("gpu")
def test_the_first_call_makes_the_form_that_a_graph_wants(monkeypatch):
    def capture(now):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: now)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now)

    module = SemiStructuredLinear.from_dense(*pair(32, 256, dtype=torch.bfloat16)).requires_grad_(False)
    x = torch.randn(5, 256).bfloat16()
    case = module._case(x.dtype, False, 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    crossover.table().seconds[case] = {"dense": 3.0, "gemv": 2.0, "decode": 4.0}
    crossover.table().seconds[case._replace(graph=True)] = {"dense": 3.0, "gemv": 2.0, "decode": 1.0}
    capture(True)
    assert module._way(x, False, True) == "dense"  # what is not there cannot be made now
    capture(False)
    assert module._way(x, False, True) == "gemv"
    module(x)
    assert set(module._forms) == {("decode", torch.bfloat16)}
    capture(True)
    assert module._way(x, False, True) == "decode"
    module.refresh()
    assert not module._prepared


@pytest.mark.usefixtures("gpu")
def test_what_is_measured():
    case = crossover.Case(32, 64, 1, 32, "float32", False, 4, "2:4")
    clock = iter([4e-6, 1e-6])

    def timer(calls):
        assert len({tuple(call().shape) for call in list(calls)[:1]}) == 1
        return next(clock)

    assert measured_seconds(case, timer, "cpu") == {"dense": 4e-6, "gemv": 1e-6}
    assert "32x64 2:4 float32 forward 4" in str(case)


def test_a_packed_weight_is_a_layer_at_once():
    weight = torch.randn(4, 8)
    values, places = pack(weight)
    module = SemiStructuredLinear(nn.Parameter(values), places)
    mask = reference.magnitude_mask(weight)
    x = torch.randn(2, 8)
    torch.testing.assert_close(module(x), x @ (weight * mask).T)
    assert torch.equal(module.mask, mask)
