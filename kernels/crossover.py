"""Which way of computing a sparse layer is faster on this GPU, as measured and kept on disk.

    python -m sparselearn.kernels.crossover --layers 4096x4096 --groups 32 64 --sparsity 0.9   # measures and prints
    python -m sparselearn.kernels.crossover --show

A way that was not measured as the fastest is not taken: what is unknown is computed densely. There is one table for
each name of a GPU and versions of torch, CUDA and triton, in `$SPARSELEARN_CACHE`, else `~/.cache/sparselearn`.

Every case is measured twice: replayed in a CUDA graph, and called from the host, whose work then counts where it takes
longer than the device's (small layers, ways of many kernels). While a graph is captured the first decides, else the
second. torch.compile asks before a capture: compile within `graphs()` what a graph will hold.
"""

import argparse
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparselearn.errors import SparsityError

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""A number of tokens is computed as the next higher one of these is fastest; more than the last as the last."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "tf32"}


class Case(NamedTuple):
    """A layer in a situation. `group` is 1 for a condensed layer."""

    neurons: int
    inputs: int
    group: int
    fan_in: int
    dtype: str  # `dtype_name`
    training: bool  # forward and backward, else forward alone
    tokens: int  # one of BUCKETS
    pattern: str = ""  # of an n:m layer, as "2:4"; its group is 1
    graph: bool = False  # replayed in a CUDA graph, else called from the host

    def __str__(self) -> str:
        kind = "training" if self.training else "forward"
        form = self.pattern or f"V={self.group} {1 - self.fan_in / self.inputs:.2%}"
        return f"{self.neurons}x{self.inputs} {form} {self.dtype} {kind} {self.tokens}{' graph' * self.graph}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def dtype_name(dtype: torch.dtype) -> str:
    """As "bfloat16"; "tf32" for float32 where torch forms matrix products so, which changes what is fastest."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The inverse of `dtype_name`."""
    return torch.float32 if name == "tf32" else getattr(torch, name)


@contextmanager
def products_of(name: str) -> Iterator[None]:
    """Within it, matrix products of float32 are formed as this `dtype_name` says."""
    kept = torch.backends.cuda.matmul.fp32_precision
    if name in ("float32", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept


Measure = Callable[[Case], dict[str, float]]
"""A case -> way -> seconds; "dense" is among the ways."""


def bucket(tokens: int) -> int:
    """The bucket of a number of tokens.

    >>> bucket(1), bucket(9), bucket(100_000)
    (1, 16, 32768)
    """
    for size in BUCKETS:
        if tokens <= size:
            return size
    return BUCKETS[-1]


def gpu_key(name: str | None = None) -> str:
    """Name of the GPU and versions, as part of a file's name."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    name = name or (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    return re.sub(r"[^A-Za-z0-9.+]+", "-", f"{name} torch {torch.__version__} triton {triton}").lower()


class Table:
    """Measured times on disk. Writers merge with what is there; a reader never sees half a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[Case, dict[str, float]] = {}
        self.blocks: dict[tuple[object, ...], tuple[Any, ...]] = {}  # of tuned kernels, see `launch.tuned`
        self._read()

    def _read(self) -> None:
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            # Files of earlier versions hold the times of graphs alone.
            cases = {Case(**{"graph": True} | row["case"]): row["seconds"] for row in saved["cases"]}
            blocks = {tuple(row["key"]): tuple(row["blocks"]) for row in saved["blocks"]}
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"`{self.path}` cannot be read ({error!r}) and counts as empty.", stacklevel=3)
            return
        self.seconds = cases | self.seconds
        self.blocks = blocks | self.blocks

    def save(self) -> None:
        self._read()  # another process may have written; what was measured here is newer
        rows = [{"case": case._asdict(), "seconds": seconds} for case, seconds in sorted(self.seconds.items())]
        blocks = [{"key": list(key), "blocks": list(value)} for key, value in self.blocks.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8")  # noqa: SIM115
        try:
            with file:
                json.dump({"cases": rows, "blocks": blocks}, file, indent=1)
            os.replace(file.name, self.path)
        except BaseException:
            os.unlink(file.name)
            raise

    def best(self, case: Case) -> str:
        """The way that took least; "dense" where it was not measured."""
        seconds = self.seconds.get(case)
        return min(seconds, key=seconds.__getitem__) if seconds else "dense"

    def __str__(self) -> str:
        lines = [f"{'case':<66}{'dense us':>10}{'best us':>10}  speed-up  way"]
        for case, seconds in sorted(self.seconds.items()):
            way = self.best(case)
            dense, least = seconds["dense"] * 1e6, seconds[way] * 1e6
            lines.append(f"{case!s:<66}{dense:>10.1f}{least:>10.1f}{dense / least:>9.2f}x  {way}")
        return "\n".join(lines)


_tables: dict[int | None, Table] = {}  # by the index of the GPU


def table() -> Table:
    """The table of the current GPU, read once."""
    on_gpu = torch.cuda.is_initialized() or torch.cuda.is_available()  # the second asks the driver
    device = torch.cuda.current_device() if on_gpu else None
    if device not in _tables:
        folder = os.environ.get("SPARSELEARN_CACHE") or Path.home() / ".cache" / "sparselearn"
        _tables[device] = Table(Path(folder) / f"crossover-{gpu_key()}.json")
    return _tables[device]


_graphs: ContextVar[bool] = ContextVar("graphs", default=False)


@contextmanager
def graphs() -> Iterator[None]:
    """What chooses within it will be replayed in a CUDA graph. For torch.compile, which chooses before the capture:

    with graphs():
        compiled(x)  # the first call, which compiles
    """
    token = _graphs.set(True)
    try:
        yield
    finally:
        _graphs.reset(token)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(
    neurons: int, inputs: int, group: int, fan_in: int, dtype: str, training: bool, tokens: int, pattern: str = "",
    graph: bool = False,
) -> str:  # fmt: skip
    """The fastest way measured for a layer on this GPU, "dense" where nothing was. `tokens`: one of BUCKETS."""
    graph = graph or _graphs.get() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    return table().best(Case(neurons, inputs, group, fan_in, dtype, training, tokens, pattern, graph))


def measure(cases: Iterable[Case], measured: Measure, into: Table, seconds: float = float("inf")) -> list[Case]:
    """Measure each case and save; returns those for which the time limit left no time."""
    start, left = time.monotonic(), []
    for case in cases:
        if time.monotonic() - start > seconds:
            left.append(case)
        else:
            into.seconds[case] = measured(case)
    into.save()
    return left


def cases_of(
    layers: Sequence[str], groups: Sequence[int], sparsities: Sequence[float], dtypes: Sequence[str],
    tokens: Sequence[int], training: Sequence[bool],
) -> list[Case]:  # fmt: skip
    """Every combination; layers as "neurons x inputs": "3072x768".

    Raises:
        SparsityError: a layer that is not written so, neurons that are no multiple of the group, an unknown dtype.
    """
    made = []
    for layer in layers:
        if not (found := re.fullmatch(r"(\d+)x(\d+)", layer)):
            raise SparsityError(f"A layer must be written as neurons x inputs, like 3072x768; got {layer!r}.")
        neurons, inputs = int(found[1]), int(found[2])
        for group in groups:
            if neurons % group:
                raise SparsityError(f"{neurons} neurons (layer {layer}) cannot be split into groups of {group}.")
            for sparsity in sparsities:
                fan_in = max(1, round(inputs * (1 - sparsity)))
                for dtype in dtypes:
                    if dtype not in DTYPES:
                        raise SparsityError(f"`--dtypes` must be of {', '.join(DTYPES)}; got {dtype!r}.")
                    made += [
                        Case(neurons, inputs, group, fan_in, DTYPES[dtype], train, bucket(n), graph=graph)
                        for train in training
                        if group > 1 or not train  # condensed layers are trained on other back ends
                        for n in tokens
                        for graph in (True, False)  # the first tunes the blocks, too
                    ]
    return made


def main(arguments: Sequence[str] | None = None, measured: Measure | None = None) -> None:
    """The command. `measured` replaces the clock in tests."""
    parser = argparse.ArgumentParser(prog="python -m sparselearn.kernels.crossover", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--layers", nargs="+", default=["4096x4096"], help="neurons x inputs (%(default)s)")
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 16, 32, 64], help="V; 1 is condensed")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.9], help="(%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], help="of bf16, fp16, fp32, tf32")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256, 4096], help="(%(default)s)")
    parser.add_argument("--only", choices=["forward", "training"], help="measure one of the two")
    parser.add_argument("--seconds", type=float, default=600, help="stop after this time (%(default)s)")
    parser.add_argument("--show", action="store_true", help="print what is known, measure nothing")
    options = parser.parse_args(arguments)
    known = table()
    if not options.show:
        if measured is None:
            if not torch.cuda.is_available():
                raise SparsityError("Measuring needs a CUDA device; there is none. `--show` prints what is known.")
            # by name, since that module imports this one
            measured = import_module("sparselearn.kernels.crossover_measure").measured_seconds
        training = {None: [False, True], "forward": [False], "training": [True]}[options.only]
        cases = cases_of(
            options.layers, options.groups, options.sparsity, options.dtypes, options.tokens, training
        )  # fmt: skip
        left = measure(cases, measured, known, options.seconds)
        if left:
            print(f"{len(left)} cases were not measured: the time of {options.seconds:g} s was up.")
    print(known)
    print(known.path)


if __name__ == "__main__":
    # As a script this file is a module of its own; the table belongs to the package's.
    from sparselearn.kernels import crossover

    crossover.main()
