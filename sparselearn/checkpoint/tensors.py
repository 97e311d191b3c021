"""What saving and loading share: the tensors of a model by name, and work on several of them at once."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparselearn import distributed
from sparselearn.checkpoint.manifest import DTYPES
from sparselearn.errors import SparsityError

AHEAD = 4  # tensors that are coded at once; this many are in memory beyond the one in use

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` on threads (numpy and hashlib let them run side by side) that takes only a few items in advance."""
    with ThreadPoolExecutor(min(AHEAD, os.cpu_count() or 1)) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile and DDP."""
    model = getattr(model, "_orig_mod", model)
    return plain_model(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def named_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Name -> (name in the state dict, tensor)."""
    state = plain_model(model).state_dict() if isinstance(model, nn.Module) else model
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            what = f"a tensor of layout {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise SparsityError(
                f"`{name}` must be an ordinary (strided) tensor with numbers; it is {what}. Leave it out."
            )
        if tensor.dtype not in DTYPES.values():
            raise SparsityError(f"`{name}` is {tensor.dtype}; a checkpoint holds {', '.join(DTYPES)}. Convert it.")
    return {name.replace("_orig_mod.", ""): (name, tensor) for name, tensor in state.items()}


def tied_names(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The first name of each tensor -> its other names."""
    first: dict[Any, str] = {}
    names: dict[str, tuple[str, ...]] = {}
    for name, tensor in state.items():
        part = distributed.local(tensor)
        memory = part.data_ptr(), part.device, tensor.dtype, tensor.shape, tensor.stride()
        owner = first.setdefault(memory if part.numel() else name, name)
        names[owner] = (*names[owner], name) if owner != name else ()
    return names
