"""Checks of tensors, read from the device one by one or all at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

from sparselearn.errors import SparsityError

Tell = Callable[[], None]
_waiting: ContextVar[list[tuple[Tensor, Tell]] | None] = ContextVar("waiting", default=None)


def check(bad: Tensor, tell: Tell) -> None:
    """Call `tell`, which may raise, where the one-element `bad` is true: at once, or at the end of `together`."""
    waiting = _waiting.get()
    if waiting is not None:
        waiting.append((bad, tell))
    elif bool(bad):
        tell()


@contextmanager
def together() -> Iterator[None]:
    """Checks within it are read at its end, in their order.

    To read a value the host waits until the device has done all that it was given. A few reads for every layer in
    every step leave a GPU idle between its kernels; one for all layers does not.
    """
    waiting: list[tuple[Tensor, Tell]] = []
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)
    found: dict[int, bool] = {}
    for device in {bad.device for bad, _ in waiting}:
        here = [i for i, (bad, _) in enumerate(waiting) if bad.device == device]
        found |= dict(zip(here, torch.stack([waiting[i][0] for i in here]).tolist(), strict=True))
    for i, (_, tell) in enumerate(waiting):
        if found[i]:
            tell()


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors of what is done and checked within it begin with `where`."""
    waiting = _waiting.get()
    if waiting is None:
        waiting = []
    first = len(waiting)
    with _prefixed(where):
        yield
    waiting[first:] = [(bad, partial(_tell, where, tell)) for bad, tell in waiting[first:]]


@contextmanager
def _prefixed(where: str) -> Iterator[None]:
    try:
        yield
    except SparsityError as error:
        raise SparsityError(f"{where}: {error}") from error


def _tell(where: str, tell: Tell) -> None:
    with _prefixed(where):
        tell()
