# mypy: disable-error-code="arg-type, return-value"
"""The products of a condensed layer as compiled SIMD loops (numba), on torch's own thread pool.

Input rows are packed into tiles [B/T, I, T] of T = 8, 16 or 32, so that one weight, read once, meets T numbers that lie
side by side, and the sums of one neuron stay in registers. One row needs no tile: a plain loop over the weights.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

from sparselearn.kernels.condensed import cpu_kernels

LIMIT = 1 << 16  # inputs and neurons that two bytes can name
_THREAD_WORK = 1 << 17  # products below which waking other threads costs more than they give
_WIDTHS = ((8, 1.0), (16, 1.3), (32, 2.2))  # rows of a tile, and what a tile of so many costs
_in_fork = False


def _mark_fork() -> None:
    global _in_fork
    _in_fork = True


# A forked child inherits the memory of OpenMP's pool but not its threads: it would wait for them forever.
os.register_at_fork(after_in_child=_mark_fork)


@functools.cache
def _parallel() -> Callable[..., None] | None:
    """GOMP_parallel of the OpenMP that torch itself runs on: a second pool would fight with torch's threads."""
    folder = Path(torch.__file__).parent / "lib"
    for library in folder.glob("libtorch_cpu.*"):
        with contextlib.suppress(OSError, AttributeError):  # no GNU interface: one thread
            call: Any = ctypes.CDLL(str(library)).GOMP_parallel
            call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            call.restype = None
            return call  # type: ignore[no-any-return]
    return None


@functools.cache
def _cache_bytes() -> int:
    """The size of the second-level cache, which a tile should not overflow."""
    with contextlib.suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text()
        return int(text.strip().removesuffix("K")) * 1024
    return 512 * 1024


@functools.cache
def _compiled(kernel: Callable[[Any], None]) -> tuple[int, Any]:
    """The address of a compiled kernel, and what keeps it alive. Read from numba's cache on disk where it can be."""
    options = {"error_model": "numpy", "fastmath": {"contract", "reassoc"}}
    signature = numba.types.void(numba.types.voidptr)
    try:
        made = numba.cfunc(signature, cache=True, **options)(kernel)
    except (OSError, RuntimeError):  # no folder can be written: neither this one nor the user's cache
        made = numba.cfunc(signature, **options)(kernel)
    return made.address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(made.address)


def _run(kernel: Callable[[Any], None], work: int, *arguments: int) -> None:
    """Run a kernel on a block of arguments. `work` (products or moves) decides whether threads are worth it."""
    address, call = _compiled(kernel)
    block = (ctypes.c_int64 * (len(arguments) + 1))(0, *arguments)
    threads = 1 if work < _THREAD_WORK or _in_fork else torch.get_num_threads()
    parallel = _parallel() if threads > 1 else None
    if parallel is None:
        call(ctypes.addressof(block))
    else:
        parallel(address, ctypes.addressof(block), threads, 0)


class _Rows:
    """A sparse matrix [R, C] by rows, as the kernels read it."""

    def __init__(self, starts: Tensor, columns: Tensor, inputs: int, shared: int = 1) -> None:
        self.starts = starts  # [R + 1], int64
        self.columns = columns.to(torch.uint16)  # [nnz]
        self.shared = shared  # so many rows in turn have the same columns
        self.outputs, self.inputs = len(starts) - 1, inputs

    def times(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, C], rows or columns contiguous -> y [B, R], laid out like x."""
        rows = len(x)
        by_feature = rows > 1 and not x.is_contiguous()
        y = torch.empty_strided((rows, self.outputs), (1, rows) if by_feature else (self.outputs, 1))
        bias_at = 0 if bias is None else bias.data_ptr()
        width = _width(rows, self.inputs, self.shared)
        tiles = _packed(x, width)
        _run(
            cpu_kernels.tile, values.numel() * rows, self.outputs, self.shared, self.starts.data_ptr(),
            self.columns.data_ptr(), values.data_ptr(), bias_at, tiles.data_ptr(), self.inputs, width, rows,
            by_feature, y.data_ptr(),
        )  # fmt: skip
        return y


def _shared(indices: Tensor) -> int:
    """How many neurons of `indices` [N, K] are computed together: SHARED where such neighbours have the same inputs."""
    together = cpu_kernels.SHARED
    if len(indices) % together:
        return 1
    groups = indices.unflatten(0, (-1, together))
    return together if bool((groups == groups[:, :1]).all()) else 1


def _width(rows: int, inputs: int, shared: int = 1) -> int:
    """Rows of a tile: the cheapest for so many rows, as long as the tile fits into half the cache.

    The sums of neurons that are computed together must leave registers for x: AVX2 has 16 in all.
    """
    most = 32 if shared == 1 or cpu_kernels.BLOCK == 16 else 16
    fitting = [(w, cost) for w, cost in _WIDTHS if w == 8 or (w <= most and w * inputs * 4 <= _cache_bytes() // 2)]
    return min(fitting, key=lambda pair: (-(-rows // pair[0]) * pair[1], -pair[0]))[0]


def _packed(x: Tensor, width: int) -> Tensor:
    """x [B, I] -> tiles [⌈B/T⌉, I, T], the last one filled up with zeros."""
    rows, inputs = x.shape
    if rows == width and x.T.is_contiguous():
        return x.T
    count = -(-rows // width)
    tiles = torch.empty(count, inputs, width)
    strides = (inputs, 1) if x.is_contiguous() else (1, rows)
    _run(cpu_kernels.pack, tiles.numel(), x.data_ptr(), *strides, rows, inputs, width, count, tiles.data_ptr())
    return tiles


def _dense(x: Tensor) -> Tensor:
    """x itself where its rows or its columns are contiguous, else a copy."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


class NumbaOps:
    """Indices [N, K] and their transposed form (made at the first gradient of an input). Float32 in and out."""

    def __init__(self, indices: Tensor, in_features: int) -> None:
        """`indices` is int64 and was checked; N and I are at most LIMIT."""
        self.neurons, self.fan_in = indices.shape
        self.in_features = in_features
        starts = torch.arange(0, indices.numel() + 1, self.fan_in)
        self._forward = _Rows(starts, indices.flatten(), in_features, _shared(indices))

    @functools.cached_property
    def _transposed(self) -> tuple[Tensor, _Rows]:
        """The order that sorts the weights by input [N·K], int32, and the matrix [I, N] in that order."""
        ordered, order = self._forward.columns.int().sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(self.in_features + 1, dtype=torch.int32))
        return order.int(), _Rows(starts, order // self.fan_in, self.neurons)

    def linear(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, I] -> [B, N]; where x is stored by feature, so is the result."""
        x = _dense(x)
        bias = None if bias is None else bias.contiguous()
        if len(x) != 1:
            return self._forward.times(x, values, bias)
        y = torch.empty(1, self.neurons)
        kernel = cpu_kernels.gemv if self._forward.shared == 1 else cpu_kernels.gemv_shared
        _run(
            kernel, values.numel(), self.neurons, self.fan_in, values.data_ptr(), self._forward.columns.data_ptr(),
            x.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y

    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad [B, N], x [B, I] -> [N, K]"""
        lanes, threads = cpu_kernels.LANES, torch.get_num_threads()
        x_tiles, grad_tiles = _packed(_dense(x), lanes), _packed(_dense(grad), lanes)
        together = max(1, _cache_bytes() // 2 // (4 * lanes * self.in_features))
        if not len(x):
            return torch.zeros(self.neurons, self.fan_in)
        out = torch.empty(self.neurons, self.fan_in)
        _run(
            cpu_kernels.sample, out.numel() * len(x), self.neurons, self.fan_in, self._forward.columns.data_ptr(),
            x_tiles.data_ptr(), grad_tiles.data_ptr(), -(-len(x) // lanes), self.in_features, together,
            max(16, self.neurons // (4 * threads)), out.data_ptr(),
        )  # fmt: skip
        return out

    def grad_input(self, grad: Tensor, values: Tensor) -> Tensor:
        """grad [B, N] -> [B, I]; where grad is stored by feature, so is the result."""
        order, matrix = self._transposed
        ordered = torch.empty_like(values)
        _run(
            cpu_kernels.gather, values.numel(), values.numel(), values.data_ptr(), order.data_ptr(), ordered.data_ptr()
        )
        return matrix.times(_dense(grad), ordered, None)
