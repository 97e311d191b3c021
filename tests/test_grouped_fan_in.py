"""Products of groups of neurons that share inputs: formulas against dense layers, operators, Triton without a GPU."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpret

from sparselearn import SparsityError
from sparselearn.kernels.grouped_fan_in import by_feature, by_input, dense, is_by_feature, linear, reference, scores
from sparselearn.kernels.grouped_fan_in.layout import activations

triton = pytest.importorskip("triton", reason="triton is not installed")


def case(tokens, inputs, groups, group, fan_in, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    indices = torch.rand(groups, inputs, generator=g).argsort(1)[:, :fan_in].sort(1).values
    numbers = [(tokens, inputs), (groups, group, fan_in), (groups * group,), (tokens, groups * group)]
    x, values, bias, grad = (torch.randn(size, generator=g, dtype=dtype) for size in numbers)
    return x, values, bias, grad, indices


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 9), inputs=st.integers(1, 12), groups=st.integers(1, 3), group=st.integers(1, 5),
       data=st.data())  # fmt: skip
def test_formulas_are_those_of_the_dense_layer(tokens, inputs, groups, group, data):
    fan_in = data.draw(st.integers(1, inputs))
    x, values, bias, grad, indices = case(tokens, inputs, groups, group, fan_in)
    weight = reference.dense(values, indices, inputs)
    assert int((weight != 0).sum()) == values.numel()
    torch.testing.assert_close(reference.linear(x, values, indices, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(reference.grad_input(grad, values, indices, inputs), grad @ weight)
    sampled = (grad.T @ x).gather(1, indices.repeat_interleave(group, 0)).view_as(values)
    torch.testing.assert_close(reference.grad_values(grad, x, indices), sampled)
    by_hand = torch.stack([(grad.T @ x)[g * group : (g + 1) * group].abs().sum(0) for g in range(groups)])
    torch.testing.assert_close(scores(grad, x, group), by_hand.float())


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("by_feature", [False, True])
def test_gradients_are_those_of_finite_differences(activation, transposed, by_feature):
    x, values, bias, _, indices = case(3, 7, 2, 8, 4)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    options = {"activation": activation, "by_feature": by_feature}
    if transposed:
        options["transposed"] = by_input(indices, 7)
    assert torch.autograd.gradcheck(lambda x, v, b: linear(x, v, indices, b, **options), leaves)


def test_results_lie_in_memory_as_asked_for_and_chain_without_a_copy():
    x, values, bias, _, indices = case(20, 7, 2, 8, 4)
    first = linear(x, values, indices, bias, by_feature=True)
    assert is_by_feature(first)
    assert first.stride() == (1, 32)
    assert linear(x, values, indices, bias).is_contiguous()
    hidden = first.detach().requires_grad_()
    _, values2, _, grad, indices2 = case(20, 16, 1, 8, 3)
    linear(hidden, values2, indices2).backward(grad[:, :8])
    expected = reference.grad_input(grad[:, :8], values2, indices2, 16)
    torch.testing.assert_close(hidden.grad, expected)


def test_layers_share_one_copy_of_their_input():
    x, values, _, grad, indices = case(20, 7, 2, 8, 4)
    _, values2, _, _, indices2 = case(20, 7, 2, 8, 3, seed=1)
    x = x.view(4, 5, 7).requires_grad_()
    copy = by_feature(x)
    assert copy.shape == (4, 5, 7)
    assert torch.equal(copy, x)
    assert is_by_feature(copy.flatten(0, 1))
    assert copy.flatten(0, 1).data_ptr() == copy.data_ptr()  # a view: the layers read the copy itself
    both = [linear(copy.flatten(0, 1), v, i) for v, i in ((values, indices), (values2, indices2))]
    (found,) = torch.autograd.grad(both[0] + both[1], x, grad)
    expected = reference.grad_input(grad, values, indices, 7) + reference.grad_input(grad, values2, indices2, 7)
    torch.testing.assert_close(found.flatten(0, 1), expected)
    assert found.is_contiguous()
    with pytest.raises(SparsityError, match="a single number"):
        by_feature(torch.tensor(1.0))


def test_the_weight_written_out_has_gradients():
    _, values, _, _, indices = case(3, 7, 2, 8, 4)
    values.requires_grad_()
    assert torch.equal(dense(values, indices, 7), reference.dense(values, indices, 7))
    narrow = indices.to(torch.int16)
    assert torch.autograd.gradcheck(lambda v: dense(v, narrow, 7), values)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check reads it
def test_operators_pass_torchs_own_checks():
    x, values, bias, grad, indices = case(5, 7, 2, 8, 4, dtype=torch.float32)
    order, starts = by_input(indices, 7)
    op = torch.ops.sparselearn
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    for across in (False, True):
        for transposed in ((None, None), (order, starts)):
            args = (*leaves[:2], indices, leaves[2], *transposed, "none", across, not across)
            torch.library.opcheck(op.grouped_linear.default, args)
            args = (grad, values.detach(), indices, *transposed, 7, across)
            torch.library.opcheck(op.grouped_grad_input.default, args)
    torch.library.opcheck(op.by_feature.default, (x,))
    torch.library.opcheck(op.grouped_grad_values.default, (grad, x.detach(), values.detach(), indices))
    torch.library.opcheck(op.grouped_scores.default, (grad, x.detach(), 8))
    torch.library.opcheck(op.grouped_dense.default, (values, indices, 7))
    torch.library.opcheck(op.by_token.default, (activations(x, 7, True).copy_(x.detach()),))


def test_whole_graphs_compile():
    x, values, bias, _, indices = case(5, 7, 2, 8, 4, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, values, bias)]

    def f(x, values, bias):
        return linear(x, values, indices, bias, activation="gelu", by_feature=True).square().sum()

    expected = torch.autograd.grad(f(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_two_unsigned_bytes_name_an_input():
    x, values, _, _, _ = case(2, 65_536, 1, 8, 2)
    x, indices = x.float(), torch.tensor([[3, 65_535]])
    wide = linear(x, values.float(), indices)
    assert torch.equal(linear(x, values.float(), torch.tensor([[3, -1]], dtype=torch.int16)), wide)


def test_places_by_input_are_in_their_order():
    order, starts = by_input(torch.tensor([[0, 3], [0, 2], [2, 3]]), 5)
    assert order.tolist() == [0, 2, 3, 4, 1, 5]  # input 0: places 0, 2; input 2: 3, 4; input 3: 1, 5
    assert starts.tolist() == [0, 2, 2, 4, 6, 6]
    assert activations(torch.zeros(17, 2), 3, True).stride() == (1, 32)


def test_mistakes_are_named():
    x, values, bias, grad, indices = case(5, 7, 2, 8, 4)
    for args, message in [
        ((x[0], values, indices), "x \\[T, I\\]"),
        ((x, values, indices[:1]), "indices \\[G, K\\]"),
        ((x, values, indices, bias[1:]), "The bias must have shape \\[16\\]; it has \\[15\\]"),
        ((x.float(), values, indices), "one dtype; they have float32, float64"),
    ]:
        with pytest.raises(SparsityError, match=message):
            linear(*args)
    with pytest.raises(SparsityError, match="must be one of none, relu, gelu, silu; got 'tanh'"):
        linear(x, values, indices, activation="tanh")
    with pytest.raises(SparsityError, match="a multiple of 3"):
        scores(grad, x, 3)


# ---- the benchmark's bookkeeping -----------------------------------------------------------------------------


def test_a_section_of_the_benchmark_stops_in_time_and_keeps_what_it_has(monkeypatch, tmp_path, capsys):
    from sparselearn.kernels.grouped_fan_in import bench

    monkeypatch.setattr(bench, "facts", lambda: {"gpu": "none"})
    run = bench.Run(tmp_path / "rows.csv", 100)
    shown = bench.make_case((4096, 4096), 64, 32, 0.9)

    def work():
        return [bench.Row(shown, "dense", 3e-6), bench.Row(shown, "layer", 1e-6, "blocks")]

    def broken():
        raise RuntimeError("no such kernel")

    run.take("forward", iter([work, broken, work]), 100)
    run.take("grid", iter([work]), -1)
    run.file.close()
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert rows[1] == "forward,4096,4096,64,32,0.9062,bfloat16,dense,3.00,1.000,,none"
    assert rows[2] == "forward,4096,4096,64,32,0.9062,bfloat16,layer,1.00,3.000,blocks,none"
    assert len(rows) == 5
    assert run.failures == ["forward: RuntimeError: no such kernel"]
    assert "stopped in `grid`: the time is up" in capsys.readouterr().out
    every = {case for section in bench.LIMITS if section != "step" for case in bench.first_cases(section)}
    assert {case.group for case in every} == {8, 16, 32, 64, 128}


# ---- Triton without a GPU ------------------------------------------------------------------------------------


def test_kernels_agree_with_their_formulas_in_the_interpreter():
    interpret("triton_interpreted.py")


SHAPES = {"V": 32, "BT": 64, "BK": 32, "NARROW": True, "WIDE": False, "PRECISION": "tf32"}
FORWARD = SHAPES | {"SWAP": True, "AHEAD": True, "STAGES": 3, "ACTIVATION": "gelu", "HAS_BIAS": True, "EVEN": False}
GRADIENT = SHAPES | {"STAGES": 3}
SCORES = GRADIENT | {"BN": 128, "BK": 128}
FEW = {"T": 16, "BN": 4, "BK": 64, "HAS_BIAS": True, "NARROW": True}
KERNELS = {  # kernel -> types of its pointers (* is the dtype), constants, strides that are 1
    "forward_kernel": (["*", "*", "i16", "*", "*"], FORWARD, ("x_token", "y_neuron")),
    "weight_gradient_kernel": (["*", "*", "i16", "*"], GRADIENT, ("x_token", "grad_neuron")),
    "scores_kernel": (["*", "*", "fp32"], SCORES, ("x_token", "grad_neuron")),
    "partial_kernel": (["*", "*", "*"], SHAPES, ("grad_neuron",)),
    "collect_kernel": (["*", "i32", "i32", "*"], {"BI": 16, "BT": 128, "WIDE": True}, ("out_input",)),
    "places_kernel": (["i16", "i16"], {"BK": 512, "NARROW": True}, ()),
    "densify_kernel": (["*", "i16", "*"], {"V": 16, "ROWS": 8, "BI": 512}, ()),
    "feature_major_kernel": (["*", "*"], {"BT": 64, "BI": 64}, ("x_input",)),
    "few_tokens_kernel": (["*", "*", "i16", "*", "*"], FEW, ("x_token",)),
    "sampled_gradient_kernel": (
        ["*", "*", "i16", "*"],
        {"T": 64, "BK": 64, "NARROW": True},
        ("x_token", "grad_neuron"),
    ),
}
BUILDS = [(kernel, "bf16") for kernel in KERNELS] + [
    (kernel, dtype) for kernel in ("forward_kernel", "weight_gradient_kernel") for dtype in ("fp16", "fp32")
]


def compiled_for(kernel, dtype, target):
    from triton_compile import compile_for

    from sparselearn.kernels.condensed import triton_kernels as condensed
    from sparselearn.kernels.grouped_fan_in import triton_kernels as grouped

    types, constants, unit = KERNELS[kernel]
    function = getattr(grouped, kernel, None) or getattr(condensed, kernel)
    constants = {k: v for k, v in constants.items() if k in function.arg_names}
    return compile_for(function, [dtype if t == "*" else t for t in types], constants, target, unit=unit)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is chosen by the environment")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("kernel", "dtype"), BUILDS)
def test_kernels_compile_for_three_generations_of_gpus(kernel, dtype):
    from triton_compile import TARGETS, resources

    for target in TARGETS:
        registers, spilled, shared = resources(compiled_for(kernel, dtype, target), target)
        assert registers <= 255
        assert not spilled, f"{spilled} bytes spilled on sm_{target}"
        assert shared <= 99 * 1024  # what every target has


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is chosen by the environment")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_gathered_inputs_are_read_in_wide_pieces_and_multiplied_by_tensor_cores():
    ptx = compiled_for("forward_kernel", "bf16", 90).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx  # 16 bytes at a time
    assert "wgmma.mma_async" in ptx


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is chosen by the environment")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_inputs_of_a_block_do_not_wait_for_its_indices():
    """In the loop the inputs are asked for before the next indices are; otherwise after indices that they wait for."""
    from triton_compile import compile_for

    from sparselearn.kernels.grouped_fan_in import triton_kernels as grouped

    for ahead in (True, False):
        types, constants, unit = KERNELS["forward_kernel"]
        types = ["bf16" if t == "*" else t for t in types]
        text = compile_for(grouped.forward_kernel, types, constants | {"AHEAD": ahead}, 90, unit=unit).asm["ttgir"]
        loop = text[text.index("scf.for") : text.index("scf.yield")]
        assert loop.count("tt.load") == 1
        assert (loop.index("ttg.async_copy") < loop.index("tt.load")) is ahead


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is chosen by the environment")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_collecting_asks_for_four_parts_before_it_waits_for_one():
    ptx = compiled_for("collect_kernel", "bf16", 90).asm["ptx"]
    wide, added = ptx.index("ld.global.v4"), ptx.index("add.f32")
    assert wide < added
    assert ptx[:added].count("ld.global.v4") == 8  # 16 numbers of each part for a thread
