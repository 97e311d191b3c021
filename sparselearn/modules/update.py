"""Dynamic sparse training of condensed layers: drop and grow without a dense weight between updates.

An ordinary step is forward, backward, `optimizer.step()`: parameters, gradients and optimizer state are
[A, K], or [A, V, K] for groups. On an
update step the dense gradient of one layer at a time is G^T X, from the layer's input X and output gradient G:

    if method.due(step):
        with captured(model) as traffic:
            loss(model(x)).backward()
        update_condensed(model, method, optimizer, traffic, step=step)  # takes the place of the optimizer step
    else:
        loss(model(x)).backward()
        optimizer.step()
    optimizer.zero_grad()
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparselearn import criteria
from sparselearn.criteria import Layer
from sparselearn.errors import SparsityError
from sparselearn.kernels.grouped_fan_in import scores
from sparselearn.methods.drop_grow import DropGrow
from sparselearn.modules.condensed import CondensedLinear
from sparselearn.modules.grouped import GroupedFanInLinear
from sparselearn.state import generator

CondensedModule = CondensedLinear | GroupedFanInLinear
Call = tuple[Tensor, Tensor]
"""Input [B, I] and gradient of the output [B, N] of one call of a layer."""
Traffic = dict[str, list[Call]]
"""Weight name -> the calls that were captured."""


@contextmanager
def captured(model: nn.Module) -> Iterator[Traffic]:
    """Keeps what `dense_gradient` needs of the forward and backward passes inside the `with` block.

    Several micro-batches add up, as gradients do. Memory: one input and one output gradient per condensed layer.
    """
    traffic: Traffic = {}
    handles = []

    def watch(name: str, module: CondensedModule) -> None:
        def after_forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x_BI = args[0].detach().reshape(-1, module.in_features)
                output.register_hook(
                    lambda grad: traffic[name].append((x_BI, grad.detach().reshape(-1, module.out_features)))
                )

        traffic[name] = []
        handles.append(module.register_forward_hook(after_forward))

    for path, module in model.named_modules():
        if isinstance(module, CondensedModule):
            watch(f"{path}.weight" if path else "weight", module)
    try:
        yield traffic
    finally:
        for handle in handles:
            handle.remove()


def dense_gradient(calls: list[Call]) -> Tensor | None:
    """dL/dW = Σ G^T X over the calls, [N, I]; None without calls. In the dtype of G, which under autocast is its."""
    grads = [grad_BN.T @ x_BI.to(grad_BN) for x_BI, grad_BN in calls]
    return sum(grads[1:], grads[0]) if grads else None


def mean_gradient(calls: list[Call], group: int) -> Tensor | None:
    """The mean of |dL/dW| over the neurons of each group, [N, I]: `dense_gradient` as far as groups see it."""
    if not calls:
        return None
    grad_TN = torch.cat([grad for _, grad in calls])
    x_TI = torch.cat([x for x, _ in calls]).to(grad_TN)
    return (scores(grad_TN, x_TI, group) / group).repeat_interleave(group, 0)


@torch.no_grad()
def rewire(
    module: CondensedModule, mask: Tensor, optimizer: Optimizer | None = None, *,
    stay: Tensor | None = None, initial: Tensor | None = None,
) -> int:  # fmt: skip
    """Give a condensed layer a new mask [N, I]; returns the number of weights that start anew.

    Weights that stay keep their value and the optimizer state of their own (every state tensor of the shape of the
    values); the others start with state zero, at zero or at `initial`. The parameter stays the same where its shape
    does; otherwise a new one takes its place in the module and in the optimizer.

    Args:
        stay: which active weights of the new mask go on, where that is fewer than were active before.
        initial: values [N, I] of weights that start anew.

    Raises:
        SparsityError: a mask of another shape, or without constant fan-in (and the same groups).
    """
    if mask.dtype != torch.bool or mask.shape != module.weight_shape:
        raise SparsityError(
            f"The new mask must be bool of shape {list(module.weight_shape)}; it is {mask.dtype} of shape "
            f"{list(mask.shape)}."
        )
    positions, indices, active = module.layout(mask)
    before = module.positions()
    source = torch.searchsorted(before.view(-1), positions).clamp_(max=before.numel() - 1)  # both ascend
    goes_on = before.view(-1)[source] == positions
    if stay is not None:
        goes_on &= stay.view(-1)[positions]

    def carry(numbers: Tensor) -> Tensor:
        return numbers.reshape(-1)[source].masked_fill_(~goes_on, 0)

    old = module.values
    state = {} if optimizer is None else optimizer.state.get(old, {})
    moved = {k: carry(v) for k, v in state.items() if isinstance(v, Tensor) and v.shape == old.shape}
    values = carry(old.detach())
    if initial is not None:
        values = torch.where(goes_on, values, initial.view(-1)[positions].to(values.dtype))
    old.grad = None
    new = old
    if values.shape == old.shape:  # in place, state too: CUDA graphs go on
        new.copy_(values)
        for key, value in moved.items():
            state[key].copy_(value)
    else:  # not in place: a graph that is still alive remembers the parameter's shape
        new = nn.Parameter(values, old.requires_grad)
        if optimizer is not None:
            _replace(optimizer, old, new)
        state.update(moved)
    module.rewire(new, indices, active)
    return int((~goes_on).sum())


def _replace(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Let the optimizer train another parameter, with the state of the old one."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


@torch.no_grad()
def update_condensed(
    model: nn.Module, method: DropGrow, optimizer: Optimizer | None, traffic: Traffic, *,
    step: int, seed: int = 0, nnz: Mapping[str, int] | None = None,
) -> int:  # fmt: skip
    """One mask update of every condensed or grouped linear layer, by the rule that a `Sparsifier` would follow;
    returns the number of weights that start anew.

    `CondensedConv2d` layers keep their masks. The method sees one layer at a time as a dense view (weight, gradient,
    mask), which is dropped before the next: the peak is that of one dense layer, on update steps alone.

    Args:
        method: its structure must give constant fan-in, with the groups of the grouped layers. Its `updates` are the
            caller's to look at (`method.due`).
        traffic: from `captured`.
        step: optimizer steps taken so far, for the drop fraction and the random numbers.
        seed: the sparsifier's, for equal random numbers.
        nnz: budgets by weight name; by default each layer keeps the number that it has. A method with ablation rounds
            nnz down to whole neurons at every update, so it needs the budgets that training began with.

    Raises:
        SparsityError: a method that remembers more than masks (trackers, `optimizer_state="keep"`) or moves weights
            between layers; ablation without `nnz`.
    """
    if method.trackers or method.reallocate is not None or method.optimizer_state != "zero":
        raise SparsityError(
            "Condensed layers have no place for what a method remembers of inactive weights (trackers, "
            '`optimizer_state="keep"`) nor for `reallocate`. Train in the masked form with a `Sparsifier`, and convert '
            "afterwards."
        )
    if method.ablation is not None and nnz is None:
        raise SparsityError(
            "With ablation `nnz` must hold the budget of every layer by weight name: what the layers have now was "
            "rounded down, and would shrink at every update. Take the counts that training began with."
        )
    moved = 0
    for path, module in model.named_modules():
        if isinstance(module, CondensedModule):
            name = f"{path}.weight" if path else "weight"
            layer = _view(name, module, method, optimizer, traffic.get(name, []), step, seed)
            ((mask, kept),) = method.new_masks([layer], [module.nnz if nnz is None else nnz[name]])
            stay = kept if method.reinit else None
            moved += rewire(module, mask, optimizer, stay=stay, initial=method.grow_init(layer))
    return moved


def _view(
    name: str, module: CondensedModule, method: DropGrow, optimizer: Optimizer | None, calls: list[Call], step: int,
    seed: int,
) -> Layer:  # fmt: skip
    """What a criterion may look at, as for a dense layer."""
    state = {} if optimizer is None else optimizer.state.get(module.values, {})
    shape = module.values.shape
    # Where the method looks at |dL/dW| alone, summed over groups, a kernel gives the sums in float32.
    looks = (method.drop, method.grow, method.grow_init) == (criteria.magnitude, criteria.gradient, criteria.zeros)
    if isinstance(module, GroupedFanInLinear) and module.values.is_cuda and looks and method.ablation is None:
        grad = mean_gradient(calls, module.group)
    else:
        grad = dense_gradient(calls)
    return Layer(
        name=name,
        weight=module.scatter(module.values),
        grad=grad,
        mask=module.mask,
        optimizer_state={k: module.scatter(v) for k, v in state.items() if isinstance(v, Tensor) and v.shape == shape},
        step=step,
        generator=generator(seed, step, name),
    )
