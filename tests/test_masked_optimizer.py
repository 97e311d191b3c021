"""The masked optimizer's formulas against torch, its kernel in the interpreter, and compiled for GPUs."""

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpret
from torch import nn

from sparselearn import NM, SparsityError
from sparselearn.kernels import masked_optimizer
from sparselearn.kernels.masked_optimizer import Target, reference
from sparselearn.kernels.masked_optimizer.reference import Rule

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW maximize": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, maximize=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "AdamW rate in a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.3, 0.99), eps=1e-6),
    "Adam with L2": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "SGD maximize": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, maximize=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Nesterov fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
}


def slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    return {k: v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_masked_step_is_torch_s_step_with_masking(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(20, 30)) for _ in range(2))
    ours.data.copy_(theirs.data.normal_())
    mask = torch.rand(20, 30) < 0.3
    a, b = OPTIMIZERS[name]([ours]), OPTIMIZERS[name]([theirs])
    for number in range(5):
        grad = torch.randn(20, 30)
        theirs.grad = grad.masked_fill(~mask, 0)
        b.step()
        ours.grad = grad.masked_fill(~mask, 0) if number == 0 else None
        a.step()
        if number > 0:  # torch makes the state on the first step
            target = Target(ours.data, torch.where(mask, grad, torch.nan), mask)
            assert masked_optimizer.fits(a, a.param_groups[0], ours, target)
            masked_optimizer.step(a, {ours: target})
        for optimizer, parameter in ((a, ours), (b, theirs)):
            for tensor in (parameter.data, *slots(optimizer, parameter).values()):
                if tensor.shape == mask.shape and (optimizer is b or number == 0):
                    tensor.masked_fill_(~mask, 0)
        torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=1e-7)
        assert not ours[~mask].any()
        for key, slot in slots(b, theirs).items():
            torch.testing.assert_close(slots(a, ours)[key], slot, rtol=2e-7, atol=1e-7)
            assert slot.shape != mask.shape or not slots(a, ours)[key][~mask].any()


def test_a_masked_step_worked_by_hand() -> None:
    w, g = torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([1.0, 1.0, torch.inf, -1.0])
    m, mask = torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([True, True, False, True])
    reference.masked_(Rule(0.5, 0.5), w, g, (m,), mask, 1)
    assert m.tolist() == [1.5, 1.0, 0.0, 0.0]  # m/2 + g
    assert w.tolist() == [0.25, 1.5, 0.0, 4.0]


def test_a_straight_through_step_worked_by_hand() -> None:
    w, mask = torch.tensor([[4.0, -3.0, 2.0, 1.0]]), torch.tensor([[True, True, False, False]])
    reference.straight_through_(Rule(1.0), w, torch.tensor([[4.0, 0.0, 0.0, 0.0]]), (), mask, 1, penalty=0.5)
    assert w.tolist() == [[0.0, -3.0, 1.0, 0.5]]  # 4 - 4, -3, 2 - 1, 1 - 0.5
    mask, forward = reference.project(w, 2)
    assert mask.tolist() == [[False, True, True, False]]
    assert forward.tolist() == [[0.0, -3.0, 1.0, 0.0]]


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5]), min_size=4, max_size=4), keep=st.integers(1, 3)
)
def test_the_new_mask_is_that_of_the_structure(values: list[float], keep: int) -> None:
    w = torch.tensor([values])
    assert torch.equal(reference.project(w, keep)[0], NM(keep, 4).topk(w.abs(), keep))


@pytest.mark.parametrize(
    ("make", "yes"),
    [
        (lambda p: torch.optim.AdamW(p), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), True),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), capturable=True, foreach=False), True),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), False),
        (lambda p: torch.optim.AdamW(p, betas=(torch.tensor(0.9), torch.tensor(0.99))), False),
        (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), False),
        (lambda p: torch.optim.RMSprop(p), False),
        (lambda p: type("Own", (torch.optim.SGD,), {})(p, lr=0.1), False),
    ],
)
def test_only_optimizers_whose_formula_is_known_are_served(make: Make, yes: bool) -> None:
    assert masked_optimizer.serves(make([nn.Parameter(torch.ones(3))])) is yes


def test_hooks_and_a_scaler_within_the_step_are_left_to_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    optimizer.found_inf = torch.tensor(0.0)  # as GradScaler does with fused optimizers
    assert not masked_optimizer.serves(optimizer)
    optimizer.found_inf = None
    assert masked_optimizer.serves(optimizer)
    optimizer.register_step_post_hook(lambda *_: None)
    assert not masked_optimizer.serves(optimizer)


def test_tensors_that_the_kernel_cannot_step_do_not_fit() -> None:
    parameter = nn.Parameter(torch.ones(4, 6))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    mask, grad = torch.ones(4, 6, dtype=torch.bool), torch.ones(4, 6)

    def fits(weight: torch.Tensor = parameter.data, grad: torch.Tensor = grad, mask: torch.Tensor = mask) -> bool:
        return masked_optimizer.fits(optimizer, optimizer.param_groups[0], parameter, Target(weight, grad, mask))

    assert fits()
    assert not fits(grad=torch.ones(6, 4).t())  # lies differently
    assert not fits(grad=torch.ones(4, 12)[:, ::2])  # has gaps
    assert not fits(grad=grad.to_sparse())
    assert not fits(grad=grad.half())
    assert not fits(mask=mask.t().contiguous().t())
    assert not fits(parameter.data.double(), grad.double())
    assert not fits(parameter.data.to("meta"), grad.to("meta"), mask.to("meta"))
    optimizer.param_groups[0]["momentum"] = 0.9
    assert not fits()  # no buffer yet


def test_autograd_notices_the_step() -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    loss = (parameter * parameter).sum()
    target = Target(parameter.data, torch.ones(4), torch.ones(4, dtype=torch.bool))
    masked_optimizer.step(optimizer, {parameter: target})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_importing_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import sparselearn; import sparselearn.kernels.masked_optimizer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kernel_agrees_with_the_formulas_in_the_interpreter() -> None:
    interpret("triton_masked_optimizer.py")


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is chosen by the environment")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernel_compiles_to_wide_loads(target: int) -> None:
    tl = pytest.importorskip("triton.language", reason="triton is not installed")
    from triton_compile import compile_for, resources

    from sparselearn.kernels.masked_optimizer.triton_kernels import step_kernel

    common = {"W": tl.float32, "S": tl.float32, "ALIGNED": True, "BLOCK": 1024, "NESTEROV": False, "KEEP": 0}
    adam = common | {"STATES": 2, "ADAM": True, "MASKED": True, "CLEAN": True}
    cases = [adam, adam | {"MASKED": False, "CLEAN": False, "KEEP": 2}]
    if target == 90:
        momentum = common | {"STATES": 1, "ADAM": False, "MASKED": True, "CLEAN": False, "NESTEROV": True}
        half = {"W": tl.bfloat16, "S": tl.bfloat16}
        cases += [adam | {"CLEAN": False}, momentum, momentum | half, adam | half, adam | {"ALIGNED": False}]
    for case in cases:
        compiled = compile_for(step_kernel, ["i64", "fp32", "i32"], case, target)
        registers, spilled, _ = resources(compiled, target)
        assert spilled == 0, case
        assert registers <= 128, case
        # Full blocks of weight, gradient and state are read and written 16 bytes at a time.
        tensors = 2 + case["STATES"] if case["ALIGNED"] else 0
        for word in ("ld", "st"):
            wide = re.findall(rf"{word}\.global\.v(?:4\.b32|2\.b64)", compiled.asm["ptx"])
            assert len(wide) >= tensors - (word == "st"), case


def test_the_benchmark_appends_rows(tmp_path):
    from sparselearn.kernels.masked_optimizer import bench

    path = tmp_path / "results" / "table.csv"
    assert {known["what"] for known, _ in bench.cells(1.0)} == set(bench.SECTIONS)
    bench.write(path, {"what": "training", "density": 0.1, "plain": 4.0, "ours/plain": 1.25}, {"gpu": "none"})
    bench.write(path, {"what": "alone", "config": "512x4"}, {"gpu": "none"})
    head, *rows = (line.split(",") for line in path.read_text().splitlines())
    found = [{name: value for name, value in zip(head, row, strict=True) if value} for row in rows]
    assert found == [
        {"what": "training", "density": "0.1", "plain": "4", "ours/plain": "1.25", "gpu": "none"},
        {"what": "alone", "config": "512x4", "gpu": "none"},
    ]
    with pytest.raises(SparsityError, match="has other columns"):
        bench.write(path, {"what": "alone"}, {"gpu": "none", "commit": "none"})
