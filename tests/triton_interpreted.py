"""Runs the Triton kernels in the interpreter and compares them with their formulas; a script, started by a test.

TRITON_INTERPRET must be set before a kernel is defined, so this needs a process of its own. On a GPU (without that
variable) `--device cuda` runs the same cases natively.
"""

import os
import sys
from itertools import product

DEVICE = "cuda" if "--device" in sys.argv else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from sparselearn.kernels import condensed  # noqa: E402
from sparselearn.kernels.condensed import triton_launch  # noqa: E402
from sparselearn.kernels.grouped_fan_in import by_input, launch, linear, reference  # noqa: E402
from sparselearn.kernels.grouped_fan_in.launch import Blocks  # noqa: E402
from sparselearn.kernels.grouped_fan_in.layout import activations  # noqa: E402

torch.manual_seed(0)
empty, new_empty = torch.empty, torch.Tensor.new_empty


def poisoned(make):
    """Fresh memory is full of NaN, so that a number that a kernel forgets is seen."""

    def made(*args, **options):
        tensor = make(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return made


torch.empty, torch.Tensor.new_empty = poisoned(empty), poisoned(new_empty)


def case(tokens, inputs, groups, group, fan_in, dtype, index_dtype=torch.int32):
    g = torch.Generator().manual_seed(tokens + inputs + group)
    indices = torch.rand(groups, inputs, generator=g).argsort(1)[:, :fan_in].sort(1).values.to(index_dtype)
    x = torch.randn(tokens, inputs, generator=g)
    values = torch.randn(groups, group, fan_in, generator=g) * fan_in**-0.5
    grad = torch.randn(tokens, groups * group, generator=g)
    return *(t.to(DEVICE, dtype) for t in (x, values, grad)), indices.to(DEVICE)


def near(actual, expected, dtype, what):
    """Within the rounding of the result's dtype; sums are formed in float32."""
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    assert error <= limit, f"{what}: error {error:.2e}, allowed {limit:.0e}"  # NaN is not, either


def laid_out(x, by_feature):
    return activations(x, x.shape[1], True).copy_(x) if by_feature else x.clone()


def check_forward(shape, dtype, blocks, activation="none", bias=True, index_dtype=torch.int32, layouts=None):
    x, values, _, indices = case(*shape, dtype, index_dtype)
    b = torch.randn(values.shape[0] * values.shape[1]).to(DEVICE, dtype) if bias else None
    expected = reference.linear(x.double(), values.double(), indices, None if b is None else b.double())
    expected = {"none": lambda y: y, "relu": torch.relu, "gelu": torch.nn.functional.gelu,
                "silu": torch.nn.functional.silu}[activation](expected)  # fmt: skip
    for x_by_feature, y_by_feature in layouts or product([True, False], repeat=2):
        out = activations(x, expected.shape[1], y_by_feature)
        launch.forward(laid_out(x, x_by_feature), values, indices, b, out, activation, blocks)
        near(out, expected, dtype, f"forward {shape} {dtype} {blocks} {activation} {x_by_feature} {y_by_feature}")


def check_backward(shape, dtype, blocks, layouts=((True, False),)):
    x, values, grad, indices = case(*shape, dtype)
    inputs = x.shape[1]
    wide = [t.double() for t in (grad, x, values)]
    for x_by_feature, grad_by_feature in layouts:
        x_, grad_ = laid_out(x, x_by_feature), laid_out(grad, grad_by_feature)
        where = f"{shape} {dtype} {blocks} {x_by_feature} {grad_by_feature}"
        expected = reference.grad_values(wide[0], wide[1], indices)
        near(launch.grad_values(grad_, x_, values, indices, blocks), expected, dtype, f"grad_values {where}")
        expected = reference.scores(wide[0], wide[1], values.shape[1])
        near(launch.scores(grad_, x_, values.shape[1]), expected, dtype, f"scores {where}")
        expected = reference.grad_input(wide[0], wide[2], indices, inputs)
        order, starts = by_input(indices, inputs)
        out = activations(grad, inputs, not grad_by_feature)
        launch.grad_input_collected(grad_, values, order, starts, out)
        near(out, expected, dtype, f"grad_input_collected {where}")
        out = activations(grad, inputs, grad_by_feature)
        launch.grad_input_dense(grad_, values, indices, out)
        near(out, expected, dtype, f"grad_input_dense {where}")


def check_rest():
    for tokens, inputs in [(1, 1), (5, 70), (64, 64), (130, 3)]:
        x = torch.randn(tokens, inputs, device=DEVICE)
        copy = launch.feature_major(x, Blocks(16, 32, 4, 1) if tokens == 130 else None)
        assert torch.equal(copy, x)
        assert torch.equal(launch.token_major(copy), x)
        assert launch.token_major(copy).is_contiguous()
        assert copy.stride() == (1, -(-tokens // 16) * 16)
        assert (copy.mT.as_strided((inputs, copy.stride(1)), (copy.stride(1), 1))[:, tokens:] == 0).all()
    for inputs, groups, group, fan_in in [(40, 3, 8, 7), (1100, 2, 16, 700), (5, 2, 128, 5)]:  # also several blocks
        _, values, _, indices = case(2, inputs, groups, group, fan_in, torch.float32)
        assert torch.equal(launch.densify(values, indices, inputs), reference.dense(values, indices, inputs))
    launch.PARTIAL_BYTES = 0  # in portions of 128 tokens
    _, values, grad, indices = case(300, 40, 3, 16, 7, torch.float32)
    out = activations(grad, 40, False)
    launch.grad_input_collected(grad, values, *by_input(indices, 40), out)
    expected = reference.grad_input(grad.double(), values.double(), indices, 40)
    near(out, expected, torch.float32, "grad_input_collected in portions")


def check_nan_stays_in_its_row():
    """A NaN or infinity in one token, or in input 0, which padding might read, reaches no other number."""
    x, values, _, indices = case(20, 50, 2, 8, 5, torch.float32)
    indices[:] = torch.arange(1, 6)
    x[3], x[:, 0] = torch.inf, torch.nan
    out, blocks = activations(x, 16, False), Blocks(16, 16, 4, 2)
    launch.forward(laid_out(x, True), values, indices, None, out, "none", blocks)
    assert torch.isfinite(out[[0, 1, 2, 4, 19]]).all()
    assert not torch.isfinite(out[3]).any()


def check_wide_index():
    """Two-byte indices name 65,536 inputs."""
    x, values, _, indices = case(2, 65_536, 1, 16, 8, torch.float32)
    narrow = indices.to(torch.int64).sub(65_536 * (indices > 32_767)).to(torch.int16)
    out = [activations(x, 16, False) for _ in range(2)]
    launch.forward(x, values, indices, None, out[0])
    launch.forward(x, values, narrow, None, out[1])
    assert torch.equal(*out)
    assert (narrow < 0).any()


def check_condensed():
    """Few tokens, neurons by themselves."""
    for tokens, inputs, neurons, fan_in, dtype in [
        (1, 70, 9, 37, torch.float32), (1, 300, 5, 300, torch.float16), (2, 40, 9, 3, torch.float32),
        (5, 40, 6, 19, torch.float16), (9, 40, 6, 19, torch.float32), (16, 50, 3, 50, torch.float32),
    ]:  # fmt: skip
        x, values, grad, indices = case(tokens, inputs, neurons, 1, fan_in, dtype, torch.int16)
        b = torch.randn(neurons).to(DEVICE, dtype)
        expected = condensed.reference.linear(x.double(), values[:, 0].double(), indices, b.double())
        near(triton_launch.linear(x, values[:, 0], indices, b), expected, dtype, f"condensed {tokens} {fan_in}")
        expected = condensed.reference.grad_values(grad.double(), x.double(), indices)
        near(triton_launch.grad_values(grad, x, values[:, 0], indices), expected, dtype, f"sampled {tokens} {fan_in}")


def check_operators():
    """The operators take the kernels' way on a GPU; in the interpreter every tensor says that it is on one."""
    if DEVICE == "cpu":
        torch.Tensor.is_cuda = property(lambda _: True)
    for tokens, fan_in, by_feature in [(5, 20, False), (37, 19, True), (130, 32, False)]:
        x, values, grad, indices = case(tokens, 60, 2, 16, fan_in, torch.float32, torch.int16)
        bias = torch.randn(32, device=DEVICE)
        wide = [t.double().requires_grad_() for t in (x, values, bias)]
        expected = reference.linear(wide[0], wide[1], indices, wide[2])
        wanted = torch.autograd.grad(expected, wide, grad.double())
        for transposed in (None, by_input(indices, 60)):
            leaves = [t.detach().clone().requires_grad_() for t in (x, values, bias)]
            y = linear(*leaves[:2], indices, leaves[2], by_feature=by_feature, transposed=transposed)
            near(y, expected, torch.float32, "linear")
            for got, want in zip(torch.autograd.grad(y, leaves, grad), wanted, strict=True):
                near(got, want, torch.float32, f"gradient {tokens} {fan_in} {by_feature} {transposed is None}")


def check_scores():
    """Neurons of several tiles, groups of a tile that is not full, more than 8 tiles in a column; no tokens."""
    for tokens, inputs, groups, group in [
        (70, 40, 2, 8),
        (33, 70, 9, 16),
        (16, 30, 1, 128),
        (40, 30, 5, 32),
        (3, 5, 70, 8),
    ]:
        x, _, grad, _ = case(tokens, inputs, groups, group, 3, torch.float32)
        expected = reference.scores(grad.double(), x.double(), group)
        for by_feature in (True, False):
            found = launch.scores(laid_out(grad, by_feature), laid_out(x, not by_feature), group)
            near(found, expected, torch.float32, f"scores {tokens} {inputs} {groups} {group}")
    assert (launch.scores(grad[:0], x[:0], 8) == 0).all()


SWAPPED, PLAIN = Blocks(32, 16, 4, 2, True), Blocks(32, 16, 4, 2)

if __name__ == "__main__":
    for group in (8, 16, 32):
        check_forward((37, 40, 2, group, 19), torch.float32, SWAPPED if group > 8 else PLAIN)
    check_forward((32, 40, 2, 16, 32), torch.float16, SWAPPED)  # even
    for blocks in (SWAPPED, PLAIN):  # of one block of inputs, of several, with and without a rest
        for shape in ((37, 40, 3, 16, 19), (32, 60, 2, 16, 48), (20, 20, 2, 32, 7)):
            check_forward(shape, torch.float32, blocks._replace(ahead=True), layouts=[(True, False)])
    check_forward((1, 40, 1, 64, 3), torch.float16, Blocks(16, 32, 4, 2), layouts=[(True, False), (False, True)])
    check_forward((20, 40, 1, 128, 40), torch.float32, PLAIN, bias=False, layouts=[(True, True)])
    for activation in ("relu", "gelu", "silu"):
        check_forward((9, 20, 1, 16, 6), torch.float32, Blocks(16, 16, 4, 2), activation, layouts=[(True, False)])
    check_backward((70, 40, 2, 8, 19), torch.float32, Blocks(32, 16, 4, 2), list(product([True, False], repeat=2)))
    check_backward((33, 40, 2, 16, 32), torch.float16, Blocks(16, 16, 4, 2))
    check_backward((150, 30, 1, 32, 7), torch.float32, Blocks(64, 16, 4, 2))
    check_scores()
    check_rest()
    check_nan_stays_in_its_row()
    check_wide_index()
    check_condensed()
    check_operators()
    print("all equal")
