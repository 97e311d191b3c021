"""Several processes: whole tensors from shards, shards from whole tensors, and one mask for all ranks."""

import hashlib
import sys
import warnings
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparselearn.errors import SparsityError

if TYPE_CHECKING:  # half a second to import; who has a DTensor has paid for it
    from torch.distributed.tensor import DTensor


def sharded(t: Tensor) -> "TypeGuard[DTensor]":
    """Whether this is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def active() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def full(t: Tensor) -> Tensor:
    """The whole tensor (a collective for a sharded one)."""
    return t.full_tensor() if sharded(t) else t


def local(t: Tensor) -> Tensor:
    """This rank's part, sharing memory with it."""
    return t.to_local() if sharded(t) else t


def place_like(t: Tensor, weight: Tensor) -> Tensor:
    """A copy of `t` on the weight's device, in its memory format, sharded as it is. `t` is whole, or placed already.

    A tensor of another shape is only moved to the device. A mask that lies right is returned itself: masks are
    replaced, never changed in place.
    """
    t = full(t)
    there = t.device == weight.device and t.shape == weight.shape and not sharded(weight)
    if t.dtype == torch.bool and there and t.stride() == weight.stride():
        return t
    if t.shape != weight.shape:
        return t.detach().to(weight.device, copy=True)
    if sharded(weight):
        from torch.distributed.tensor import distribute_tensor

        t = t.to(weight.device)
        return distribute_tensor(t, weight.device_mesh, weight.placements)
    return torch.empty_like(weight, dtype=t.dtype, requires_grad=False).copy_(t)


def assign(target: Tensor, value: Tensor) -> None:
    """target ← value in place, where the value is whole."""
    if sharded(target):
        target.to_local().copy_(local(place_like(value, target)))
    else:
        target.copy_(value)


def mean(t: Tensor) -> Tensor:
    """The mean over ranks."""
    if active():
        t = t.clone()
        dist.all_reduce(t, op=dist.ReduceOp.SUM)
        t /= dist.get_world_size()
    return t


def refuse_unsupported(model: nn.Module) -> None:
    """FSDP1 flattens weights, so that there is nothing to mask."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported, not in use
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise SparsityError(
            "The model is wrapped in FullyShardedDataParallel (FSDP1), which flattens weights. "
            "Use torch.distributed.fsdp.fully_shard (FSDP2) or DDP."
        )


def check_equal(masks: list[Tensor], step: int) -> None:
    """Raises where ranks do not hold the same masks at the same step. `masks` are packed, on one device."""
    digest = hashlib.blake2b(str(step).encode(), digest_size=8)
    for mask in masks:
        digest.update(mask.cpu().numpy().tobytes())
    mine = torch.tensor([int.from_bytes(digest.digest(), "little") >> 1], device=masks[0].device)
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    if int(lowest) != int(highest):
        raise SparsityError(
            f"Ranks hold different masks at step {step}. All ranks must build the sparsifier with the same model, "
            "arguments and seed, load the same checkpoint, and take the same steps."
        )


def from_rank_0(mask: Tensor, name: str, step: int) -> Tensor:
    """Rank 0's packed mask. Warns where this rank would have chosen another one."""
    agreed = mask.clone()
    dist.broadcast(agreed, src=0)
    if not torch.equal(agreed, mask):
        warnings.warn(
            f"Ranks proposed different masks for `{name}` at step {step}; rank 0's is used. Gradients or weights "
            "differ between ranks: is the model wrapped in DDP, and the step outside `no_sync`?",
            stacklevel=2,
        )
    return agreed


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag holds on any rank."""
    if not active():
        return flag
    t = torch.tensor([int(flag)], device=device)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return bool(t)
