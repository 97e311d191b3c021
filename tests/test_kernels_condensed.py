"""The condensed products against their formulas: both back ends, odd sizes, threads, forked processes, no numba."""

import ctypes
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from sparselearn import SparsityError
from sparselearn.kernels.condensed import linear, prepare, reference
from sparselearn.kernels.condensed.torch_ops import TorchOps

cpu = pytest.importorskip("sparselearn.kernels.condensed.cpu", reason="numba is not installed")
BACK_ENDS = {"numba": cpu.NumbaOps, "torch": TorchOps}


def case(neurons, inputs, fan_in, seed=0, dtype=torch.int64):
    g = torch.Generator().manual_seed(seed)
    indices = torch.rand(neurons, inputs, generator=g).argsort(1)[:, :fan_in].sort(1).values
    return torch.randn(neurons, fan_in, generator=g), indices.to(dtype)


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is full of NaN, so that a number that a kernel forgets is seen."""
    empty, strided = torch.empty, torch.empty_strided
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_strided", lambda *size, **options: strided(*size, **options).fill_(torch.nan))


def agrees(ops, values, indices, inputs, x, grad, bias):
    close = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        torch.testing.assert_close(ops.linear(x, values, bias), reference.linear(x, values, indices, bias), **close)
        torch.testing.assert_close(ops.grad_values(grad, x), reference.grad_values(grad, x, indices), **close)
        expected = reference.grad_input(grad, values, indices, inputs)
        torch.testing.assert_close(ops.grad_input(grad, values), expected, **close)


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 100])
def test_products_of_odd_sizes_are_those_of_the_formulas(back_end, batch, poison):
    g = torch.Generator().manual_seed(batch)
    for neurons, inputs, fan_in in [(1, 1, 1), (5, 3, 2), (17, 33, 9), (65, 40, 17), (16, 64, 16), (130, 70, 70)]:
        values, indices = case(neurons, inputs, fan_in)
        ops = BACK_ENDS[back_end](indices, inputs)
        x, grad = torch.randn(batch, inputs, generator=g), torch.randn(batch, neurons, generator=g)
        bias = torch.randn(neurons, generator=g)
        agrees(ops, values, indices, inputs, x, grad, bias)
        agrees(ops, values, indices, inputs, x.T.contiguous().T, grad.T.contiguous().T, None)  # stored by feature
    sliced = torch.randn(batch, 2 * inputs, generator=g)[:, ::2]  # neither rows nor columns are contiguous
    agrees(ops, values, indices, inputs, sliced, grad, bias)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 40), st.integers(0, 2**31), st.data())
def test_any_shape_and_repeated_indices(neurons, inputs, batch, seed, data):
    fan_in = data.draw(st.integers(1, 50))
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(inputs, (neurons, fan_in), generator=g)  # repeats add up; an input may have no neuron
    values = torch.randn(neurons, fan_in, generator=g)
    x, grad = torch.randn(batch, inputs, generator=g), torch.randn(batch, neurons, generator=g)
    for back_end in BACK_ENDS.values() if batch else [cpu.NumbaOps]:
        agrees(back_end(indices, inputs), values, indices, inputs, x, grad, torch.randn(neurons, generator=g))


@pytest.mark.parametrize("batch", [1, 2, 8, 9, 16, 31, 32, 65])
@pytest.mark.parametrize(("neurons", "inputs", "fan_in"), [(4, 1, 1), (8, 33, 9), (68, 40, 17), (132, 70, 70)])
def test_neurons_that_share_their_inputs_are_computed_together(neurons, inputs, fan_in, batch, poison):
    values, indices = case(neurons, inputs, fan_in)
    indices = indices[::4].repeat_interleave(4, 0)
    ops = cpu.NumbaOps(indices, inputs)
    assert ops._forward.shared == 4
    g = torch.Generator().manual_seed(batch)
    x, grad, bias = (torch.randn(size, generator=g) for size in [(batch, inputs), (batch, neurons), (neurons,)])
    agrees(ops, values, indices, inputs, x, grad, bias)
    agrees(ops, values, indices, inputs, x.T.contiguous().T, grad.T.contiguous().T, None)


def test_neurons_that_do_not_all_share_their_inputs_are_computed_one_by_one():
    _, indices = case(8, 9, 3)
    assert cpu.NumbaOps(indices, 9)._forward.shared == 1
    together = indices[::4].repeat_interleave(4, 0)
    assert cpu.NumbaOps(together[:6], 9)._forward.shared == 1  # a group is cut
    assert cpu.NumbaOps(together.roll(1, 0), 9)._forward.shared == 1  # groups begin elsewhere
    together[7] = together[7].flip(0)
    assert cpu.NumbaOps(together, 9)._forward.shared == 1


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("group", [1, 4])
def test_one_row_is_the_formula_with_gathers_and_without(gathers, group, monkeypatch):
    """Which of the two a processor takes follows from its name; both must be right on every processor."""
    kernels = cpu.cpu_kernels
    monkeypatch.setattr(kernels, "GATHERS", gathers)
    kernel = kernels.gemv if group == 1 else kernels.gemv_shared
    signature = cpu.numba.types.void(cpu.numba.types.voidptr)
    made = cpu.numba.cfunc(signature, error_model="numpy", fastmath={"contract", "reassoc"})(kernel)
    for neurons, inputs, fan_in in [(4, 3, 1), (8, 9, 7), (12, 20, 8), (68, 70, 17), (128, 65, 31), (4, 90, 77)]:
        values, indices = case(neurons, inputs, fan_in)
        indices = indices[::group].repeat_interleave(group, 0)
        x, bias = torch.randn(1, inputs), torch.randn(neurons)
        columns, y = indices.to(torch.uint16), torch.full((1, neurons), torch.nan)
        for add in (bias, None):
            at = [t.data_ptr() for t in (values, columns, x)] + [0 if add is None else add.data_ptr(), y.data_ptr()]
            made.ctypes((ctypes.c_int64 * 8)(0, neurons, fan_in, *at))
            torch.testing.assert_close(y, reference.linear(x, values, indices, add), rtol=1e-4, atol=1e-5)


def test_an_empty_batch_gives_empty_results_and_zero_gradients():
    values, indices = case(4, 6, 3)
    values.requires_grad_()
    for ops in BACK_ENDS.values():
        plan = prepare(values, indices, 6)
        plan._ops = ops(indices, 6)
        x = torch.zeros(0, 6, requires_grad=True)
        y = linear(x, values, plan, torch.zeros(4))
        assert y.shape == (0, 4)
        y.sum().backward()
        assert x.grad.shape == (0, 6)
        assert values.grad.tolist() == [[0.0] * 3] * 4


def test_two_bytes_name_65536_inputs_and_no_more():
    inputs = 65536
    indices = torch.tensor([[0, 32767, 32768, 65535], [5, 40000, 50000, 65534]])
    values, x = torch.randn(2, 4), torch.randn(3, inputs)
    plan = prepare(values, indices.to(torch.int16), inputs)  # wraps to negative numbers, read as unsigned
    assert isinstance(plan._ops, cpu.NumbaOps)
    torch.testing.assert_close(plan.linear(x), reference.linear(x, values, indices))
    larger = prepare(values, indices + 1, inputs + 1)
    assert isinstance(larger._ops, TorchOps)
    torch.testing.assert_close(larger.linear(torch.nn.functional.pad(x, (1, 0))), plan.linear(x))


@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_dense_layer(dtype, batch):
    values, indices = case(9, 21, 4)
    values = values.to(dtype).requires_grad_()
    bias, x = (torch.randn(n).to(dtype).requires_grad_() for n in ((9,), (batch, 21)))
    weight = torch.zeros(9, 21).scatter(1, indices, values.detach().float()).requires_grad_()
    other_x, other_bias = (t.detach().float().requires_grad_() for t in (x, bias))
    y = linear(x, values, prepare(values, indices, 21), bias)
    other = torch.nn.functional.linear(other_x, weight, other_bias)
    assert y.dtype == dtype
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y.float(), other, **close)
    g = torch.randn(batch, 9)
    y.backward(g.to(dtype))
    other.backward(g.to(dtype).float())
    assert (values.grad.dtype, bias.grad.dtype, x.grad.dtype) == (dtype, dtype, dtype)
    torch.testing.assert_close(values.grad.float(), weight.grad.gather(1, indices), **close)
    torch.testing.assert_close(bias.grad.float(), other_bias.grad, **close)
    torch.testing.assert_close(x.grad.float(), other_x.grad, **close)


# ---- threads and processes -----------------------------------------------------------------------------------------

BIG = (700, 600, 40)  # times 32 rows: more products than one thread is given


def test_results_do_not_depend_on_the_number_of_threads():
    values, indices = case(*BIG)
    plan = prepare(values, indices, BIG[1])
    for batch in (1, 32, 100):
        g = torch.Generator().manual_seed(batch)
        x, grad = torch.randn(batch, BIG[1], generator=g), torch.randn(batch, BIG[0], generator=g)
        found = []
        for n in (1, 2, 3):
            with threads(n):
                found.append((plan.linear(x), plan.grad_values(grad, x), plan.grad_input(grad)))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_as_many_threads_work_as_torch_has_and_one_for_little_work(monkeypatch):
    if cpu._parallel() is None:
        pytest.skip("torch has no GNU OpenMP here")
    values, indices = case(*BIG)
    plan, x, seen = prepare(values, indices, BIG[1]), torch.randn(64, BIG[1]), []
    real = cpu._parallel()
    monkeypatch.setattr(cpu, "_parallel", lambda: lambda *args: (seen.append(args[2]), real(*args)))
    for n in (2, 3):
        with threads(n):
            plan.linear(x)
            assert set(seen) == {n}
            seen.clear()
            plan.linear(x[:1])  # 28,000 products
            assert not seen
    with threads(1):
        plan.linear(x)
    assert not seen


def test_two_threads_may_use_one_plan_on_the_whole_pool():
    values, indices = case(*BIG)
    plan = prepare(values, indices, BIG[1])
    inputs = [torch.randn(b, BIG[1]) for b in (1, 33, 64)] * 10
    expected = [plan.linear(x) for x in inputs]
    wrong = []

    def work():
        for x, y in zip(inputs, expected, strict=True):
            if not torch.equal(plan.linear(x), y):
                wrong.append(len(x))

    with threads(2):
        workers = [threading.Thread(target=work) for _ in range(2)]
        [w.start() for w in workers], [w.join() for w in workers]
    assert not wrong


class Products(Dataset):
    """A dataset that calls a condensed layer, as features of a frozen network would be made."""

    def __init__(self, plan, x):
        self.plan, self.x = plan, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        torch.set_num_threads(2)  # a DataLoader's worker has one; a pool would hang
        return self.plan.linear(self.x[i])


@pytest.mark.skipif(sys.platform != "linux", reason="processes are not forked here")
def test_a_forked_worker_computes_alone_and_does_not_hang():
    values, indices = case(*BIG)
    plan, x = prepare(values, indices, BIG[1]), torch.randn(4, 64, BIG[1])
    with threads(2):
        expected = plan.linear(x[0])  # the parent's pool is awake
        loader = DataLoader(
            Products(plan, x), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=20
        )
        found = list(loader)
        assert torch.equal(found[0], expected)
        assert all(torch.equal(y, plan.linear(row)) for y, row in zip(found, x, strict=True))


# ---- without numba, and without a folder for its cache ---------------------------------------------------------------


def test_without_numba_torch_computes_the_same(monkeypatch):
    values, indices = case(33, 50, 7)
    fast = prepare(values, indices, 50)
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("cpu", "cpu_kernels"):
        monkeypatch.delitem(sys.modules, f"sparselearn.kernels.condensed.{name}")
    plain = prepare(values, indices, 50)
    assert isinstance(plain._ops, TorchOps)
    assert not isinstance(fast._ops, TorchOps)
    for batch in (1, 4, 15, 16, 40):
        x, grad = torch.randn(batch, 50), torch.randn(batch, 33)
        torch.testing.assert_close(plain.linear(x), fast.linear(x))
        torch.testing.assert_close(plain.linear_feature_major(x.T), fast.linear_feature_major(x.T))
        torch.testing.assert_close(plain.grad_values(grad, x), fast.grad_values(grad, x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain.grad_input(grad), fast.grad_input(grad))


def test_kernels_compile_where_nothing_can_be_written(monkeypatch):
    real, options = cpu.numba.cfunc, []

    def refuse(signature, cache=False, **others):
        options.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(signature, **others)

    monkeypatch.setattr(cpu.numba, "cfunc", refuse)
    address, _ = cpu._compiled.__wrapped__(cpu.cpu_kernels.gather)
    assert address
    assert options == [True, False]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_mistakes_are_found_before_memory_is_read():
    values, indices = case(4, 6, 3)

    def message(call, *args):
        with pytest.raises(SparsityError) as error:
            call(*args)
        return str(error.value)

    for wrong in (6, -1):
        bad = indices.clone()
        bad[2, 1] = wrong
        assert "must lie in [0, 6) (its `in_features`)" in message(prepare, values, bad, 6)
    assert "must be int16, int32 or int64 on the CPU" in message(prepare, values, indices.float(), 6)
    assert "values and indices of one shape [N, K] with N, K >= 1" in message(prepare, values, indices[:, :2], 6)
    assert "Leave neurons without weights out" in message(prepare, values[:0], indices[:0], 6)
    assert "must have shape [4, 3]" in message(prepare, values.double(), indices, 6)
    plan = prepare(values, indices, 6)
    assert "`x` of this condensed product must have shape ['any', 6]" in message(plan.linear, torch.zeros(2, 5))
    assert "`bias` of this condensed product must have shape [4]" in message(
        plan.linear, torch.zeros(2, 6), torch.zeros(3)
    )
    assert "`grad` of this condensed product must have shape [2, 4]" in message(
        plan.grad_values, torch.zeros(3, 4), torch.zeros(2, 6)
    )
    assert "must have shape ['any', 4]" in message(plan.grad_input, torch.zeros(2, 5))
    assert "must have shape [4, 3]" in message(plan.set_values, torch.zeros(3, 4))
    assert "use `sparselearn.kernels.condensed.reference`" in message(
        plan.linear, torch.zeros(2, 6, dtype=torch.double)
    )
