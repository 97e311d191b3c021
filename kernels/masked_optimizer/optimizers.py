"""Torch optimizers' steps of masked weights, where this package computes the same."""

import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from sparselearn.kernels.masked_optimizer import reference
from sparselearn.kernels.masked_optimizer.reference import Rule

DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16), "cpu": (torch.float32,)}  # of weights and state


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class Target(NamedTuple):
    """What a step of one parameter moves and by what; all shaped and laid out alike."""

    weight: Tensor  # the parameter's data, or the dense weights behind it
    grad: Tensor  # only read
    mask: Tensor  # bool, True = active
    penalty: float | None = None  # λ of a straight-through step; None: a masked step
    clean: bool = False  # the state outside the mask is known to be zero


def serves(optimizer: Optimizer) -> bool:
    """Whether `step` may stand in for this optimizer: SGD, Adam or AdamW itself, with numbers and options that are
    known here (no AMSGrad, no tensors but for the learning rate), no hooks, and no GradScaler that works inside it."""
    hooks = (
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks,
    )  # fmt: skip
    scaled = any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    if type(optimizer) not in (SGD, Adam, AdamW) or any(hooks) or scaled:
        return False
    return all(map(_plain, optimizer.param_groups))


def _plain(group: Mapping[str, Any]) -> bool:
    numbers = [group["weight_decay"], *group.get("betas", ())]
    odd = any(group.get(name) for name in ("amsgrad", "differentiable"))
    return not odd and not any(isinstance(number, Tensor) for number in numbers)


def rule(group: Mapping[str, Any]) -> Rule:
    """The numbers of one parameter group of SGD, Adam or AdamW."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    if "betas" not in group:
        return Rule(lr, group["momentum"], weight_decay=group["weight_decay"], dampening=group["dampening"],
                    nesterov=group["nesterov"], maximize=group["maximize"])  # fmt: skip
    beta1, beta2 = group["betas"]
    decoupled = group["decoupled_weight_decay"]
    return Rule(lr, beta1, beta2, group["eps"], group["weight_decay"], decoupled, maximize=group["maximize"])


def _state(optimizer: Optimizer, parameter: nn.Parameter, states: int) -> tuple[Tensor | None, ...]:
    slots = optimizer.state.get(parameter, {})
    return tuple(slots.get(name) for name in ((), ("momentum_buffer",), ("exp_avg", "exp_avg_sq"))[states])


def fits(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter, target: Target) -> bool:
    """Whether `step` can take this parameter of a group: its state is there (torch makes it on the first step), and all
    tensors are plain ones of one device that lie in memory alike, without gaps: on a GPU, with triton, float32,
    bfloat16 or float16, on a CPU float32."""
    numbers, weight = rule(group), target.weight
    state = _state(optimizer, parameter, numbers.states)
    made = [s for s in state if s is not None]
    dtypes = DTYPES.get(weight.device.type, ())
    if weight.is_cuda and not _has_triton():
        return False
    if len(made) < len(state) or not weight.numel() or not {weight.dtype, *(s.dtype for s in made)} <= set(dtypes):
        return False
    if target.grad.dtype != weight.dtype or len({s.dtype for s in made}) > 1:
        return False
    if isinstance(numbers.lr, Tensor) and numbers.lr.device != weight.device:
        return False
    return all(
        type(t) is Tensor and t.layout == torch.strided and t.device == weight.device and t.shape == weight.shape
        and t.stride() == weight.stride() and torch.ops.aten.is_non_overlapping_and_dense(t)
        for t in (weight, target.grad, target.mask, *made)
    )  # fmt: skip


@torch.no_grad()
def step(optimizer: Optimizer, targets: Mapping[nn.Parameter, Target]) -> None:
    """One step of these parameters, all of which `fits` has accepted; their `.grad` is not looked at.

    Masked (`penalty` None): what the optimizer does after `grad.masked_fill_(~mask, 0)`, then `masked_fill_(~mask, 0)`
    of weight and state; NaN outside the mask is dropped like any number. Straight-through: what it does after
    `grad += penalty·weight.masked_fill(mask, 0)`. State and counters are the optimizer's own.

    On a GPU float32 arithmetic throughout, results rounded once to the dtype in which they are stored (as torch's
    `fused=True` rounds them; its other forms round bfloat16 after every operation); on a CPU torch's operations.
    """
    taken = []
    for group in optimizer.param_groups:
        numbers = rule(group)
        for parameter in group["params"]:
            if parameter in targets:
                state = tuple(s for s in _state(optimizer, parameter, numbers.states) if s is not None)
                counter = optimizer.state[parameter]["step"] if numbers.beta2 is not None else None
                taken.append((targets[parameter], numbers, state, counter))
    for on_host in (True, False):
        if here := [c for *_, c in taken if c is not None and (c.device.type == "cpu") == on_host]:
            torch._foreach_add_(here, torch.tensor(1.0) if on_host else 1.0)
    launched: dict[tuple[object, ...], list[Any]] = {}
    for target, numbers, state, counter in taken:
        if target.weight.device.type == "cpu":
            _by_formula(target, numbers, state, counter)
            continue
        from sparselearn.kernels.masked_optimizer import launch

        item = launch.Item(numbers, target.weight, target.grad, state, target.mask, counter, target.penalty)
        launched.setdefault((*launch.kind(item), target.clean), []).append(item)
    for (*_, clean), items in launched.items():
        launch.run(items, clean=bool(clean) and items[0].penalty is None)
    # So that autograd notices where weights change that it still holds for a backward pass; `.data` does not tell it.
    torch.autograd.graph.increment_version(list(targets))


def _by_formula(target: Target, numbers: Rule, state: tuple[Tensor, ...], counter: Tensor | None) -> None:
    t = 1.0 if counter is None else float(counter)
    if target.penalty is None:
        reference.masked_(numbers, target.weight, target.grad, state, target.mask, t)
    else:
        reference.straight_through_(numbers, target.weight, target.grad, state, target.mask, t, penalty=target.penalty)
