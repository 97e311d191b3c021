"""Checks of tensors, read from the device one by one or many at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sparselearn.errors import SparsityError

Bad = Callable[[float], bool]
Tell = Callable[[], None]
MOST = 2**26  # bytes that checks may keep alive before they are read


@dataclass
class _Waiting:
    """Checks that are not read yet, in their order, and the bytes that they keep alive."""

    checks: list[tuple[Tensor, Bad, Tell]] = field(default_factory=list)
    held: int = 0

    def read(self) -> None:
        """Wait once for each device and dtype, then call what has something to tell."""
        checks, self.checks, self.held = self.checks, [], 0
        found: dict[int, float] = {}
        for kind in {(value.device, value.dtype) for value, *_ in checks}:
            here = [i for i, (value, *_) in enumerate(checks) if (value.device, value.dtype) == kind]
            found |= dict(zip(here, torch.stack([checks[i][0] for i in here]).tolist(), strict=True))
        for i, (_, bad, tell) in enumerate(checks):
            if bad(found[i]):
                tell()


_waiting: ContextVar[_Waiting | None] = ContextVar("waiting", default=None)


def check(value: Tensor, bad: Bad, tell: Tell, held: int = 0) -> None:
    """Call `tell`, which may raise, where the number in `value` is `bad`: at once, or later within `together`.

    `held`: bytes that `tell` keeps alive until then.
    """
    waiting = _waiting.get()
    if waiting is None:
        if bad(value.item()):
            tell()
        return
    waiting.checks.append((value, bad, tell))
    waiting.held += held


@contextmanager
def together() -> Iterator[None]:
    """Checks within it are read at its end, or earlier between two of `located`, where they keep much memory alive.

    To read a value the host waits until the device has done all that it was given. A few reads for every layer in
    every step leave a GPU idle between its kernels; one for many layers does not.
    """
    waiting = _Waiting()
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)
    waiting.read()


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors of what is done and checked within it begin with `where`."""
    waiting = _waiting.get() or _Waiting()
    first = len(waiting.checks)
    with _prefixed(where):
        yield
    waiting.checks[first:] = [(value, bad, partial(_tell, where, tell)) for value, bad, tell in waiting.checks[first:]]
    if waiting.held > MOST:
        waiting.read()


@contextmanager
def _prefixed(where: str) -> Iterator[None]:
    try:
        yield
    except SparsityError as error:
        raise SparsityError(f"{where}: {error}") from error


def _tell(where: str, tell: Tell) -> None:
    with _prefixed(where):
        tell()
