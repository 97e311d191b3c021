"""`GroupedFanInLinear`: equal to its dense layer, there and back, files, and training with moving masks."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparselearn as sl
from sparselearn import SparsityError
from sparselearn.kernels import crossover
from sparselearn.modules import GroupedFanInLinear, captured, convert, revert, rewire, update_condensed
from sparselearn.modules.grouped import condense_groups, group_of
from sparselearn.modules.update import dense_gradient, mean_gradient
from sparselearn.structures import ConstantFanIn


def pair(n, i, k, group, ablated=0, bias=True, dtype=torch.float64, seed=0):
    """A masked linear layer and its mask; the last `ablated` groups have no weights."""
    torch.manual_seed(seed)
    layer = nn.Linear(i, n, bias, dtype=dtype)
    rows = n - ablated * group
    score = torch.rand(n, i)
    score[rows:] = -torch.inf
    mask = ConstantFanIn(group).topk(score, k * rows)
    layer.weight.data.masked_fill_(~mask, 0)
    return layer, mask


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 4), group=st.sampled_from([1, 2, 3, 8]), i=st.integers(1, 9), data=st.data())
def test_there_and_back_loses_nothing(groups, group, i, data):
    ablated = data.draw(st.integers(0, groups - 1))
    layer, mask = pair(groups * group, i, data.draw(st.integers(1, i)), group, ablated, data.draw(st.booleans()))
    with torch.no_grad():
        layer.weight.view(-1)[mask.view(-1).nonzero()[0]] = 0.0  # a weight that was just grown
    module = GroupedFanInLinear.from_dense(layer, mask, group)
    back, mask_back = module.to_dense()
    assert torch.equal(back.weight, layer.weight)
    assert torch.equal(mask_back, mask)
    assert module.nnz == int(mask.sum())
    assert (module.positions().flatten().diff() > 0).all()
    x = torch.randn(3, i, dtype=torch.float64)
    torch.testing.assert_close(module(x), layer(x))


@pytest.mark.parametrize("ablated", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,), (0, 24)], ids=str)
@pytest.mark.parametrize("way", ["sparse", "dense", "collected"])
def test_values_bias_and_input_get_the_dense_layers_gradients(ablated, bias, shape, way):
    layer, mask = pair(32, 24, 5, 8, ablated, bias)
    module = GroupedFanInLinear.from_dense(layer, mask, 8)
    module.way, module.by_feature = way, way == "sparse"
    x = torch.randn(shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(i) for m, i in zip((module, layer), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1])
    grad = torch.randn_like(outputs[1])
    for output in outputs:
        output.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(module.scatter(module.values.grad), layer.weight.grad * mask)
    if bias:
        torch.testing.assert_close(module.bias.grad, layer.bias.grad)


def test_the_largest_group_is_found_and_too_small_ones_are_refused():
    assert group_of(pair(64, 40, 5, 32)[1]) == 32
    assert group_of(torch.ones(24, 3).bool()) == 8  # 24 is no multiple of 16
    with pytest.raises(SparsityError, match=r"8 or more neighbouring neurons .*shape \[64, 40\]"):
        group_of(pair(64, 40, 5, 4)[1])
    with pytest.raises(SparsityError, match="a multiple of 16 neurons, and the same inputs"):
        condense_groups(*[pair(64, 40, 5, 8)[1]] * 2, 16)
    half = pair(16, 10, 2, 8)[1]
    half[0] = False  # one neuron of a group
    with pytest.raises(SparsityError, match="ablated or not"):
        condense_groups(half, half, 8)


def test_dtypes_are_those_of_a_linear():
    layer, mask = pair(16, 24, 5, 8, dtype=torch.float32)
    module = GroupedFanInLinear.from_dense(layer, mask)
    assert module.group == 8
    x = torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = module(x), layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(SparsityError, match=r"holds torch.float32 and got an input of torch.float64"):
        module(x.double())
    with pytest.raises(SparsityError, match=r"needs \[..., 24\]; it got \[4, 23\]"):
        module(x[:, 1:])


def test_a_forced_conversion_and_its_reverse():
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    sparsifier = sl.Sparsifier(model, sl.static(structure=ConstantFanIn(16)), sparsity=0.75)
    before, x = copy.deepcopy(model), torch.randn(3, 24)
    convert(model, sparsifier, x, force=True, candidates=[GroupedFanInLinear])
    assert [type(m) for m in model] == [GroupedFanInLinear, nn.ReLU, GroupedFanInLinear]
    torch.testing.assert_close(model(x), before(x))
    masks = revert(model)
    assert all(torch.equal(masks[name], mask) for name, mask in sparsifier.masks.items())
    assert torch.equal(model[0].weight, before[0].weight)


def test_copies_and_files_take_over_connections_and_sizes():
    module = GroupedFanInLinear.from_dense(*pair(32, 24, 5, 8))
    other = GroupedFanInLinear.from_dense(*pair(32, 24, 7, 8, ablated=1, seed=1))
    x = torch.randn(3, 24, dtype=torch.float64)
    parameter = other.values
    other.load_state_dict(module.state_dict())
    assert other.values is parameter
    for twin in (other, copy.deepcopy(module)):
        assert torch.equal(twin(x), module(x))
        assert torch.equal(twin.order, module.order)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), module(x))
    assert set(module.state_dict()) == {"values", "indices", "active", "bias"}
    for name, value, message in [
        ("indices", module.indices.flip(1), "`indices` of a grouped layer must ascend"),
        ("indices", module.indices + 24, r"within \[0, 24\)"),
        ("active", module.active + 1, r"`active` of a grouped layer must ascend .* within \[0, 4\)"),
        ("values", module.values[0], r"needs values \[A, V, K\]"),
    ]:
        with pytest.raises(SparsityError, match=f"The saved `` cannot be loaded. .*{message}"):
            other.load_state_dict(module.state_dict() | {name: value})


def test_whole_graphs_compile_in_every_way(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELEARN_CACHE", str(tmp_path))
    monkeypatch.setattr(crossover, "_tables", {})
    module = GroupedFanInLinear.from_dense(*pair(32, 24, 5, 8))
    # As on a GPU: the table is asked.
    monkeypatch.setattr(
        GroupedFanInLinear, "_way", lambda self, x, values: crossover.choose(*self._case(x.dtype, True, x.shape[0]))
    )
    x = torch.randn(3, 24, dtype=torch.float64)
    for way in ("dense", "sparse", "collected"):
        crossover.table().seconds[module._case(torch.float64, True, 3)] = {"dense": 2.0} | {way: 1.0}
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))


def test_rewire_by_hand():
    layer, mask = nn.Linear(4, 4), torch.tensor([[1, 1, 0, 0]] * 2 + [[0, 1, 0, 1]] * 2).bool()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 0, 0], [3, 4, 0, 0], [0, 5, 0, 6], [0, 7, 0, 8]]))
    module = GroupedFanInLinear.from_dense(layer, mask, group=2)
    optimizer = torch.optim.SGD(module.parameters(), 0.0, momentum=0.9)
    module.values.grad, module.bias.grad = 10 * module.values.detach(), torch.zeros(4)
    optimizer.step()
    parameter, memory = module.values, [t.data_ptr() for t in module.buffers()]
    # The first group loses column 0 and grows 3, the second stays.
    assert rewire(module, torch.tensor([[0, 1, 0, 1]] * 4).bool(), optimizer) == 2
    assert module.values is parameter
    assert [t.data_ptr() for t in module.buffers()] == memory
    assert module.values.tolist() == [[[2, 0], [4, 0]], [[5, 6], [7, 8]]]
    assert module.order.tolist() == [0, 2, 1, 3]
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [[[20, 0], [40, 0]], [[50, 60], [70, 80]]]
    # The first group is ablated, K grows to 3.
    assert rewire(module, torch.tensor([[0, 0, 0, 0]] * 2 + [[1, 1, 0, 1]] * 2).bool(), optimizer) == 2
    assert module.values.tolist() == [[[0, 5, 6], [0, 7, 8]]]
    assert optimizer.state[module.values]["momentum_buffer"].tolist() == [[[0, 50, 60], [0, 70, 80]]]
    assert module.starts.tolist() == [0, 1, 2, 2, 3]
    with pytest.raises(SparsityError, match="a multiple of 2 neurons"):
        rewire(module, torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]] * 2).bool())


class Block(nn.Module):
    """Attention and MLP as in a Transformer, causal, with residual paths."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 32), nn.Linear(32, 3)), 20, ["3"]),
    "block": (lambda: nn.Sequential(Block(), nn.Linear(32, 3)), (6, 32), ["1"]),
}  # fmt: skip
METHODS = {
    "srigl": lambda group: sl.srigl(stop=30, every=6, gamma=0.5, group=group),
    "srigl without ablation": lambda group: sl.srigl(stop=30, every=6, gamma=0.0, group=group),
    "rigl": lambda group: sl.rigl(stop=30, every=6, structure=ConstantFanIn(group)),
}


@pytest.mark.parametrize("way", ["sparse", "collected"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_grouped_training_is_masked_dense_training(model, method, way):
    """Weights and moments after every step, mask updates included. Nothing dense lives between updates."""
    build, size, exclude = MODELS[model]
    torch.manual_seed(0)
    dense, group, method = build().double(), 8, METHODS[method](8)
    sparsifier = sl.Sparsifier(dense, method, sparsity=0.75, distribution=sl.distributions.uniform, exclude=exclude)
    sparse = copy.deepcopy(dense)
    convert(sparse, sparsifier, force=True, candidates=[GroupedFanInLinear])
    for module in sparse.modules():
        if isinstance(module, GroupedFanInLinear):
            module.way = way
    dense_optimizer = sl.SparseOptimizer(torch.optim.AdamW(dense.parameters(), 1e-2), sparsifier)
    optimizer = torch.optim.AdamW(sparse.parameters(), 1e-2)
    budgets = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    first, updates = {name: mask.clone() for name, mask in sparsifier.masks.items()}, 0
    for step in range(24):
        x, y = torch.randn(8, *([size] if isinstance(size, int) else size), dtype=torch.float64), torch.randn(8, 3)
        for net in (dense, sparse):
            net.zero_grad()
        with captured(sparse) as traffic:
            for net in (dense, sparse):
                out = net(x)
                (out if out.ndim == 2 else out.mean(1)).sub(y).square().mean().backward()
        dense_optimizer.step()
        due = method.due(step)
        if not (due and method.skip_step):
            optimizer.step()
        if due:
            update_condensed(sparse, method, optimizer, traffic, step=step, nnz=budgets)
            updates += 1
        for name, mask in sparsifier.masks.items():
            module = sparse.get_submodule(name.removesuffix(".weight"))
            weight = dense.get_parameter(name)
            assert module.group == group
            assert torch.equal(module.mask, mask)
            torch.testing.assert_close(module.scatter(module.values), weight.detach(), rtol=1e-7, atol=1e-9)
            for slot in ("exp_avg", "exp_avg_sq"):
                mine, theirs = optimizer.state[module.values].get(slot), dense_optimizer.state[weight].get(slot)
                if theirs is not None:
                    torch.testing.assert_close(module.scatter(mine), theirs, rtol=1e-6, atol=1e-10)
    assert updates >= 3
    assert any(not torch.equal(first[name], mask) for name, mask in sparsifier.masks.items())
    largest = max(p.numel() for p in dense.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert max(t.numel() for t in [*sparse.parameters(), *sparse.buffers(), *states]) <= largest // 2


def test_mean_gradient_is_what_groups_see_of_the_dense_one():
    calls = [(torch.randn(5, 6), torch.randn(5, 16)) for _ in range(2)]
    structure = ConstantFanIn(8)
    expected = structure.pool(dense_gradient(calls).abs())
    torch.testing.assert_close(mean_gradient(calls, 8), expected)
    assert mean_gradient([], 8) is None
