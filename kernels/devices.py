"""Kernels start on the GPU that holds their arguments, which need not be the current one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def on(device: torch.device) -> AbstractContextManager[object]:
    """Within it Triton starts kernels on this GPU; left alone it takes the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def on_its_device(start: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """For functions that start kernels: on the GPU of the first argument."""

    @wraps(start)
    def started(first: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with on(first.device):
            return start(first, *args, **kwargs)

    return started
