"""Starts the kernel for many tensors at once."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.kernels.devices import on
from sparselearn.kernels.masked_optimizer.reference import Rule
from sparselearn.kernels.masked_optimizer.triton_kernels import step_kernel

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK, WARPS = 512, 4


class Item(NamedTuple):
    """A tensor's part in a step. All of its tensors have one shape and one order in memory, without gaps."""

    rule: Rule
    weight: Tensor
    grad: Tensor  # dtype of the weight
    state: tuple[Tensor, ...]  # `rule.states` of them, of one dtype
    mask: Tensor  # bool
    step: Tensor | None = None  # Adam's counter, 1 at the first step; on the host or beside the weight
    penalty: float | None = None  # λ of a straight-through step; None: a masked one
    projected: tuple[Tensor, Tensor] | None = None  # with `keep`: receive the new mask (bool) and weight·mask


class _Pinned:
    """Host memory that CUDA graphs copy from at every replay, so it is handed out once and never freed."""

    BYTES = 4 * 2**20

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.used = 0

    def hold(self, table: Tensor) -> Tensor:
        size = -(-table.numel() * table.itemsize // 16) * 16
        if self.memory is None or self.used + size > self.BYTES:
            raise SparsityError(
                "A masked optimizer step cannot be captured into a CUDA graph "
                + ("before it has run once. Run a step before the capture." if self.memory is None else "any more: "
                   f"the {self.BYTES >> 20} MiB of its tables are full. Capture fewer graphs, or fewer tensors.")
            )  # fmt: skip
        held = self.memory[self.used : self.used + table.numel() * table.itemsize].view(table.dtype)
        self.used += size
        return held.view(table.shape).copy_(table)


_pinned = _Pinned()


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A small table of the host on the device, without waiting for it; also while a CUDA graph is captured."""
    if device.type != "cuda":
        return table
    if torch.cuda.is_current_stream_capturing():
        return torch.empty_like(table, device=device).copy_(_pinned.hold(table), non_blocking=True)
    if _pinned.memory is None:
        _pinned.memory = torch.empty(_Pinned.BYTES, dtype=torch.uint8, pin_memory=True)
    return table.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=8)
def blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """int32 [programs, 2]: (tensor, block of it) for tensors of these sizes."""
    counts = torch.tensor([-(-size // block) for size in sizes])
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    number = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, number], 1).int().to(device)


def addresses(items: Sequence[Item]) -> list[list[int]]:
    """[tensors, 8]: w, g, first state, second state, mask, new mask, forward weights (0 where there is none), size."""
    rows = []
    for item in items:
        states = (*item.state, None, None)[:2]
        tensors = (item.weight, item.grad, *states, item.mask, *(item.projected or (None, None)))
        rows.append([0 if t is None else t.data_ptr() for t in tensors] + [item.weight.numel()])
    return rows


def numbers(items: Sequence[Item], device: torch.device) -> Tensor:
    """float32 [tensors, 12]: lr, 1 - lr·decoupled weight decay, weight decay in the gradient, β1, 1 - β1 (SGD:
    1 - dampening), β2, 1 - β2, ε, lr / (1 - β1^t), √(1 - β2^t), the gradient's sign, λ.

    Computed in float64, on the host unless learning rates or step counters are on the device.
    """
    rules = [item.rule for item in items]
    plain = torch.tensor(
        [
            (
                0.0 if isinstance(r.lr, Tensor) else r.lr, r.weight_decay if r.decoupled else 0.0,
                0.0 if r.decoupled else r.weight_decay, r.beta1, r.dampening if r.beta2 is None else r.beta1,
                r.beta2 or 0.0, r.eps, -1.0 if r.maximize else 1.0, item.penalty or 0.0,
            )
            for r, item in zip(rules, items, strict=True)
        ],
        dtype=torch.float64,
    )  # fmt: skip
    rates = [r.lr for r in rules if isinstance(r.lr, Tensor)]
    steps = [item.step for item in items if item.step is not None]
    if any(t.device.type != "cpu" for t in (*rates[:1], *steps[:1])):
        plain = to_device(plain, device)
    lr, decoupled, decay, beta1, rest1, beta2, eps, sign, penalty = plain.unbind(1)
    if rates:
        lr = torch.stack([rate.reshape(()) for rate in rates]).to(plain)
    t = torch.stack(steps).to(plain) if steps else torch.ones_like(lr)
    columns = [lr, 1 - lr * decoupled, decay, beta1, 1 - rest1, beta2, 1 - beta2, eps, lr / (1 - beta1**t),
               (1 - beta2**t).sqrt(), sign, penalty]  # fmt: skip
    table = torch.stack(columns, 1).float()
    return table if table.device == device else to_device(table, device)


def kind(item: Item) -> tuple[object, ...]:
    """What items of one launch have in common."""
    rule, on_host = item.rule, item.step is None or item.step.device.type == "cpu"
    return (
        item.weight.device, item.weight.dtype, *(t.dtype for t in item.state), rule.states, rule.beta2 is None,
        rule.nesterov, item.penalty is None, isinstance(rule.lr, Tensor), on_host,
    )  # fmt: skip


def run(items: Sequence[Item], *, clean: bool = False, keep: int = 0, block: int = BLOCK, warps: int = WARPS) -> None:
    """One step of items of one `kind`, none of them empty, in place.

    Args:
        clean: of masked steps: the state outside the masks is known to be zero.
        keep: n of n:4 of straight-through steps: also `project`; 0 does not. Rows are then a multiple of 4 long.
        block: weights of one program, a power of 2 from 512 on.
    """
    first, device = items[0], items[0].weight.device
    rows = addresses(items)
    programs = blocks(tuple(row[-1] for row in rows), block, device)
    with on(device):
        step_kernel[(len(programs),)](
            to_device(torch.tensor(rows), device), numbers(items, device), programs,
            STATES=first.rule.states, ADAM=first.rule.beta2 is not None, NESTEROV=first.rule.nesterov,
            MASKED=first.penalty is None, CLEAN=clean, KEEP=keep, W=DTYPES[first.weight.dtype],
            S=DTYPES[first.state[0].dtype if first.state else first.weight.dtype],
            ALIGNED=all(at % 16 == 0 for row in rows for at in row[:-1]), BLOCK=block, num_warps=warps,
        )  # fmt: skip
