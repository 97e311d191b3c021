"""Runs the masked optimizer's kernel in the interpreter against its formulas; a script, started by a test.

TRITON_INTERPRET must be set before a kernel is defined, so this needs a process of its own. `--device cuda` runs the
same cases natively.
"""

# ruff: noqa: E402

import os
import sys
from dataclasses import replace
from itertools import product

DEVICE = "cuda" if "--device" in sys.argv else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from sparselearn.kernels.masked_optimizer import launch, reference
from sparselearn.kernels.masked_optimizer.launch import Item
from sparselearn.kernels.masked_optimizer.reference import Rule

ADAMW = Rule(0.01, 0.9, 0.999, 1e-8, 0.1, decoupled=True)
RULES = {
    "adamw": ADAMW,
    "adamw with a small beta": replace(ADAMW, beta1=0.3, maximize=True),
    "adam with L2": replace(ADAMW, decoupled=False),
    "adam": replace(ADAMW, weight_decay=0.0),
    "sgd": Rule(0.1),
    "sgd with L2": Rule(0.1, weight_decay=0.01, maximize=True),
    "momentum": Rule(0.1, 0.9, weight_decay=0.01, dampening=0.2),
    "nesterov": Rule(0.1, 0.9, nesterov=True),
}
SHAPES = [(3,), (16, 64), (40, 26), (1, 1), (8, 128), (2, 3, 5, 7)]
COUNTS = (1, 2, 3, 10, 1000, 5)


def case(rule, shape, dtype, density, state_outside, g):
    """w, g, state and mask, the first and the last zero outside the mask."""
    w, grad, mask = (torch.randn(shape, generator=g) for _ in range(3))
    mask = mask.sigmoid() < density
    state = [torch.randn(shape, generator=g) for _ in range(rule.states)]
    if rule.beta2:
        state[1] = state[1] ** 2 * 1e-3
    if not state_outside:
        state = [t.masked_fill(~mask, 0) for t in state]
    grad = grad.masked_fill((torch.rand(shape, generator=g) < 0.1) & ~mask, torch.nan)
    return *(t.to(DEVICE, dtype) for t in (w, grad)), tuple(t.to(DEVICE, dtype) for t in state), mask.to(DEVICE)


def near(actual, expected, dtype, what):
    """Within one rounding of the stored dtype, and of the float32 in which single operations are rounded."""
    eps, expected = torch.finfo(dtype).eps, expected.double()
    error = (actual.double() - expected).abs()
    limit = eps * expected.abs() + eps * torch.finfo(dtype).tiny + 4e-7 * expected.abs().max().clamp(min=1e-30)
    assert torch.isfinite(actual).all(), what
    assert (error <= limit).all(), f"{what}: {(error - limit).max():.1e} too much"


def check_masked(names, dtype, density, clean, steps_on_device=False, rate_on_device=False):
    """All shapes in one launch, with rules of their own; weights outside the masks start as anything, NaN included."""
    g, items, before = torch.Generator().manual_seed(1), [], []
    for shape, t, rule in zip(SHAPES, COUNTS, (RULES[names[i % len(names)]] for i in range(6)), strict=True):
        w, grad, state, mask = case(rule, shape, dtype, density, not clean, g)
        w = torch.where(~mask & (grad > 0), torch.nan, w)
        step = torch.tensor(float(t), device=DEVICE if steps_on_device else "cpu") if rule.beta2 else None
        if rate_on_device:
            rule = replace(rule, lr=torch.tensor(rule.lr, device=DEVICE))
        items.append(Item(rule, w, grad, state, mask, step))
        before.append([t.clone() for t in (w, grad, *state)])
    launch.run(items, clean=clean)
    for item, (w, grad, *state), t in zip(items, before, COUNTS, strict=True):
        w, *state = (t.double() for t in (w, *state))
        reference.masked_(item.rule, w, grad.double(), tuple(state), item.mask, float(t))
        what = f"{names} {dtype} {density} clean={clean} {tuple(w.shape)}"
        for actual, expected in zip((item.weight, *item.state), (w, *state), strict=True):
            near(actual, expected, dtype, what)
            assert not actual[~item.mask].any(), what
        assert torch.equal(item.grad.nan_to_num(), grad.nan_to_num()), f"{what}: the gradient was written"


def check_straight_through(name, keep, dtype):
    rule, g = RULES[name], torch.Generator().manual_seed(3)
    for shape in [(4, 8), (40, 64), (3, 36)]:
        w, grad, state, mask = case(rule, shape, dtype, 0.5, True, g)
        grad = grad.nan_to_num()
        if not rule.states:
            w[0], grad[0] = w[0].sign(), 0.0  # ties
            mask[0] = True
        wide = w.double(), tuple(t.double() for t in state)
        reference.straight_through_(rule, wide[0], grad.double(), wide[1], mask, 4, penalty=0.02)
        projected = (torch.zeros_like(mask), torch.full_like(w, torch.nan)) if keep else None
        step = torch.tensor(4.0) if rule.beta2 else None
        launch.run([Item(rule, w, grad, state, mask, step, 0.02, projected)], keep=keep)
        what = f"{name} {keep}:4 {dtype} {shape}"
        for actual, expected in zip((w, *state), (wide[0], *wide[1]), strict=True):
            near(actual, expected, dtype, what)
        if projected is not None:  # the mask is that of the weights as they are stored
            assert all(map(torch.equal, projected, reference.project(w, keep))), what


def check_nothing_is_spread():
    """An infinite weight stays one without weight decay, as in torch; a NaN gradient reaches its own weight alone."""
    for rule in (ADAMW, RULES["adam"], RULES["sgd"]):
        w, grad, state, mask = case(rule, (64,), torch.float32, 1.1, False, torch.Generator().manual_seed(4))
        w[3], grad[5] = torch.inf, torch.nan
        launch.run([Item(rule, w, grad, state, mask, torch.tensor(2.0) if rule.beta2 else None)])
        assert w[3] == torch.inf
        assert w.isnan().nonzero().tolist() == [[5]]


if __name__ == "__main__":
    for name in RULES:
        check_masked([name], torch.float32, 0.3, False)
    check_masked(["adamw", "adam with L2", "adam", "adamw with a small beta"], torch.float32, 0.3, True)
    for clean, on_device in product([True, False], repeat=2):
        check_masked(["adamw"], torch.float32, 0.05, clean, on_device, on_device)
    check_masked(["momentum"], torch.float32, 0.05, True, rate_on_device=True)
    low = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
    for dtype in low:
        check_masked(["adamw"], dtype, 0.3, False)
        check_masked(["nesterov"], dtype, 0.3, True)
        check_straight_through("sgd", 2, dtype)
    for keep in (0, 1, 2, 3):
        check_straight_through("adamw", keep, torch.float32)
        check_straight_through("sgd", keep, torch.float32)
    check_nothing_is_spread()
    print("all equal")
