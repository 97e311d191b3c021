"""Times grouped and condensed layers on a GPU against cuBLAS, torch's BSR and CSR; needs torch and triton alone.

    python -m sparselearn.kernels.grouped_fan_in.bench --seconds 300 --out results.csv   # every section, one run
    python -m sparselearn.kernels.grouped_fan_in.bench --sections forward grid --limit grid=40
    python -m sparselearn.kernels.grouped_fan_in.bench --plot results.csv                # speed-up over tokens

Times are CUDA-graph replays, medians of 5 rounds, with enough copies of the weights in turn that they come from memory
and not from the L2 cache. CSR, and what cannot be captured, is timed with events and marked so. The fan-in is rounded
down to a multiple of 64, or 32 below 4096 inputs. Block sizes are tuned first; the table of the best is printed. Every
row is checked against float64 before it is timed, and written at once, the most important of a section first; a section
that is out of time is cut off. `speedup` is dense time / time for the same work, by the dense row above. The section
"candidates" lists every block size by itself.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearn.kernels import crossover
from sparselearn.kernels.condensed import triton as condensed
from sparselearn.kernels.crossover import Case
from sparselearn.kernels.crossover_measure import (
    compile_ahead,
    forward_backward,
    sparse_sets,
    tune,
    tune_condensed,
    tune_copy,
)
from sparselearn.kernels.grouped_fan_in import linear, reference
from sparselearn.kernels.timing import Calls, commit, copies, event_seconds, graph_seconds

LARGE = ((4096, 4096), (14336, 4096), (4096, 14336))  # neurons, inputs
VIT = ((3072, 768), (768, 3072), (4096, 1024), (1024, 4096))
LIMITS = {  # seconds of each section, in the order of their worth
    "candidates": 75, "forward": 60, "training": 50, "step": 120, "peers": 20, "vit": 40, "grid": 60, "gemv": 25,
    "dtypes": 25,
}  # fmt: skip
FIELDS = ("section", "neurons", "inputs", "tokens", "group", "sparsity", "dtype", "method", "us", "speedup", "detail")
quick = partial(graph_seconds, rounds=3, least=5e-4)


class Row(NamedTuple):
    case: Case
    method: str
    seconds: float
    detail: str = ""


Work = Callable[[], list[Row]]


class Run:
    """Where rows go, and when to stop."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.failures: list[str] = []
        self.file = out.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.facts = facts()
        self.writer.writerow([*FIELDS, *self.facts])

    def take(self, section: str, works: Iterator[Work], seconds: float) -> None:
        """Do work by work and print and write its rows, a dense time first, until the time is up."""
        begin = time.monotonic()
        print(f"\n== {section}", flush=True)
        for work in works:
            if time.monotonic() > min(self.end, begin + seconds):
                print(f"stopped in `{section}`: the time is up", flush=True)
                break
            try:
                rows = work()
            except Exception as error:  # the other rows are still wanted; the command fails at its end
                self.failures.append(f"{section}: {type(error).__name__}: {str(error)[:300]}")
                print(f"FAILED {self.failures[-1]}", flush=True)
                continue
            dense = next(row.seconds for row in rows if row.method.startswith("dense"))
            for row in rows:
                if row.method.startswith("dense"):
                    dense = row.seconds
                self._write(section, row, dense)
            self.file.flush()
        print(f"`{section}` took {time.monotonic() - begin:.0f} s", flush=True)

    def _write(self, section: str, row: Row, dense: float) -> None:
        case, us, speedup = row.case, row.seconds * 1e6, dense / row.seconds
        sparsity = 1 - case.fan_in / case.inputs
        head = [section, case.neurons, case.inputs, case.tokens, case.group, f"{sparsity:.4f}", case.dtype]
        self.writer.writerow([*head, row.method, f"{us:.2f}", f"{speedup:.3f}", row.detail, *self.facts.values()])
        where = f"{case.neurons}x{case.inputs} T={case.tokens} V={case.group} {sparsity:.1%} {case.dtype}"
        print(f"{where:<48}{row.method:<28}{us:>10.1f} us{speedup:>7.2f}x  {row.detail}", flush=True)


def facts() -> dict[str, str]:
    """Hardware, versions and commit of a row."""
    triton = __import__("triton").__version__
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton, "commit": commit()}


def make_case(
    layer: tuple[int, int], tokens: int, group: int, sparsity: float, training: bool = False, dtype: str = "bfloat16"
) -> Case:
    neurons, inputs = layer
    step, exact = 64 if inputs >= 4096 else 32, round(inputs * (1 - sparsity))
    fan_in = max(step, exact // step * step) if group > 1 else exact
    return Case(neurons, inputs, group, fan_in, dtype, training, tokens, graph=True)


class Layer:
    """Everything that is timed for a case: dense weights, sparse sets, inputs."""

    def __init__(self, case: Case) -> None:
        dtype = crossover.torch_dtype(case.dtype)
        self.case = case
        self.x = torch.randn(case.tokens, case.inputs, device="cuda", dtype=dtype)
        self.grad = torch.randn(case.tokens, case.neurons, device="cuda", dtype=dtype)
        weight = torch.randn(case.neurons, case.inputs, device="cuda", dtype=dtype)
        self.weights = [weight.clone() for _ in range(copies(weight))]
        self.sets = sparse_sets(case, dtype, "cuda")

    def check(self, product: Callable[..., Tensor]) -> None:
        """The first 64 tokens against float64."""
        values, indices, *_ = self.sets[0]
        y = product(self.x, values, indices)[:64].double()
        expected = reference.linear(self.x[:64].double(), values.double(), indices)
        error = float((y - expected).abs().max() / expected.abs().max())
        if not error < 1e-2:
            raise AssertionError(f"{self.case}: error {error:.2e}; nothing is timed that is wrong")

    def dense(self) -> Row:
        return Row(self.case, "dense", graph_seconds([partial(F.linear, self.x, w) for w in self.weights]))


def rows_forward(case: Case, detailed: bool = True, tuned: bool = True) -> list[Row]:
    """Token-major in and out ("layer"), and its parts."""
    from sparselearn.kernels.grouped_fan_in import launch

    layer = Layer(case)
    if tuned:
        tune(case, layer.sets, layer.x, layer.grad, quick, crossover.table())
    layer.check(linear)
    with torch.no_grad():
        blocks = str(tuple(launch.forward_blocks(layer.sets[0][0], case.tokens)))
        whole = graph_seconds([partial(linear, layer.x, v, i) for v, i, *_ in layer.sets])
        rows = [layer.dense(), Row(case, "layer", whole, blocks)]
        if detailed:
            x = launch.feature_major(layer.x)
            rows.append(Row(case, "copy by feature", graph_seconds([partial(launch.feature_major, layer.x)])))
            for name, by_feature in (("by feature in", False), ("by feature in and out", True)):
                calls = [partial(linear, x, v, i, by_feature=by_feature) for v, i, *_ in layer.sets]
                rows.append(Row(case, name, graph_seconds(calls), blocks))
    return rows


def rows_candidates(case: Case) -> list[Row]:
    """Every block size of the two kernels, the fastest first; of the copy; and portions of the collected gradient.

    The forward kernel by itself: activations by feature in, token by token out."""
    from sparselearn.kernels.grouped_fan_in import launch

    layer, known = Layer(case), crossover.table()
    rows = [layer.dense()]
    found = tune(case, layer.sets, layer.x, layer.grad, quick, known, everything=True)
    found["copy by feature"] = tune_copy(layer.x, quick, known)
    for kernel, times in found.items():
        rows += [Row(case, f"{kernel} candidate", seconds, str(tuple(blocks))) for blocks, seconds in times.items()]
    out, kept = torch.empty_like(layer.x), launch.PARTIAL_BYTES
    try:
        for megabytes in (16, 24, 32, 40, 64):
            launch.PARTIAL_BYTES = megabytes * 2**20
            calls = [partial(launch.grad_input_collected, layer.grad, v, o, s, out) for v, _, o, s in layer.sets]
            rows.append(Row(case, "grad input collected", quick(calls), f"portions of {megabytes} MiB"))
    finally:
        launch.PARTIAL_BYTES = kept
    return rows


def rows_vit(case: Case) -> list[Row]:
    """A layer's forward time, or forward and backward, kept for dispatch; and what dispatch takes then."""
    rows = rows_training(case, parts=False) if case.training else rows_forward(case)
    ways = {"layer": "sparse"} | {name: name for name in ("dense", "sparse", "collected")}
    seconds = {ways[row.method]: row.seconds for row in rows if row.method in ways}
    here = case._replace(tokens=crossover.bucket(case.tokens))
    crossover.table().seconds[here] = seconds
    way = crossover.choose(*here)
    return [*rows, Row(case, "as dispatched", seconds[way], f"takes {way}" + ", training" * case.training)]


def rows_training(case: Case, parts: bool = True) -> list[Row]:
    """Forward and backward of one layer, token-major in and out, and the parts of the backward pass."""
    from sparselearn.kernels.grouped_fan_in import launch

    layer = Layer(case)
    tune(case, layer.sets, layer.x, layer.grad, quick, crossover.table())
    x, grad = layer.x, layer.grad
    both = partial(forward_backward, x.clone().requires_grad_(), grad)
    rows = [Row(case, "dense", graph_seconds([partial(both, w.requires_grad_(), F.linear) for w in layer.weights]))]
    ways: dict[str, Calls] = {}
    for name in ("sparse", "collected"):
        ways[name] = [
            partial(both, v.requires_grad_(),
                    partial(_product, indices=i, transposed=(o, s) if name == "collected" else None))
            for v, i, o, s in layer.sets
        ]  # fmt: skip
    blocks = str(tuple(launch.grad_blocks(layer.sets[0][0], case.tokens)))
    rows += [Row(case, name, graph_seconds(calls), blocks) for name, calls in ways.items()]
    return rows + _parts(layer) if parts else rows


def _parts(layer: Layer) -> list[Row]:
    """The kernels of the backward pass, each by itself."""
    from sparselearn.kernels.grouped_fan_in import launch

    case, x, grad = layer.case, layer.x, layer.grad
    with torch.no_grad():
        x_by_feature, out = launch.feature_major(x), torch.empty_like(x)
        dense_values = graph_seconds([lambda: grad.mT @ x])
        calls: dict[str, Calls] = {
            "part: grad values": [partial(launch.grad_values, grad, x_by_feature, v, i) for v, i, *_ in layer.sets],
            "part: grad input dense": [partial(launch.grad_input_dense, grad, v, i, out) for v, i, *_ in layer.sets],
            "part: grad input collected": [
                partial(launch.grad_input_collected, grad, v, o, s, out) for v, _, o, s in layer.sets
            ],
            "part: densify": [partial(launch.densify, v, i, case.inputs) for v, i, *_ in layer.sets],
            "part: scores": [partial(launch.scores, grad, x_by_feature, case.group)],
        }
        detail = f"one dense gradient {dense_values * 1e6:.1f} us"
        return [Row(case, name, graph_seconds(work), detail) for name, work in calls.items()]


def _product(x: Tensor, values: Tensor, *, indices: Tensor, transposed: tuple[Tensor, Tensor] | None) -> Tensor:
    return linear(x, values, indices, transposed=transposed)


def rows_gemv(case: Case) -> list[Row]:
    """Single neurons, few tokens."""
    from sparselearn.kernels.condensed import triton_launch

    layer = Layer(case)
    layer.check(lambda x, v, i: condensed.linear(x, v[:, 0], i))
    with torch.no_grad():
        tune_condensed(layer.sets, layer.x, quick, crossover.table())
        blocks = triton_launch.blocks_for(layer.sets[0][0][:, 0], case.tokens)
        seconds = graph_seconds([partial(condensed.linear, layer.x, v[:, 0], i) for v, i, *_ in layer.sets])
        rows = [layer.dense(), Row(case, "condensed", seconds, str(tuple(blocks[:3])))]
        weight = condensed.dense(layer.sets[0][0][:, 0], layer.sets[0][1], case.inputs)
        csr = weight.to_sparse_csr()
        rows.append(Row(case, "CSR (events)", event_seconds([lambda: csr @ layer.x.mT])))
    return rows


def rows_peers(case: Case) -> list[Row]:
    """torch's BSR at equal block size and CSR at equal sparsity."""
    layer = Layer(case)
    with torch.no_grad():
        rows = [layer.dense()]
        rows.append(Row(case, "layer", graph_seconds([partial(linear, layer.x, v, i) for v, i, *_ in layer.sets])))
        size, density = case.group, case.fan_in / case.inputs
        blocks = torch.rand(case.neurons // size, case.inputs // size, device="cuda") < density
        weight = layer.weights[0] * blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)
        bsr, csr = weight.to_sparse_bsr((size, size)), weight.to_sparse_csr()
        for name, sparse, clock in (("BSR (events)", bsr, event_seconds), ("CSR (events)", csr, event_seconds),
                                    ("BSR", bsr, graph_seconds)):  # last: a capture may fail  # fmt: skip
            try:
                call = partial(F.linear, layer.x, sparse) if sparse is bsr else partial(torch.mm, sparse, layer.x.mT)
                rows.append(Row(case, name, clock([call])))
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0][:100]}", flush=True)
    return rows


def works(section: str) -> Iterator[Work]:
    """What a section measures, the most important first."""
    if section == "candidates":
        for group in (32, 64, 16):
            yield partial(rows_candidates, make_case(LARGE[0], 4096, group, 0.9, True))
    elif section == "forward":
        for tokens in (4096, 1024):
            for layer in LARGE:
                for group in (64, 32, 16):
                    yield partial(rows_forward, make_case(layer, tokens, group, 0.9))
    elif section == "training":
        for layer in LARGE:
            for group in (64, 32, 16):
                yield partial(rows_training, make_case(layer, 4096, group, 0.9, True))
        for group in (32, 64):
            yield partial(rows_training, make_case(LARGE[0], 4096, group, 0.95, True))
    elif section == "step":
        # by name, since that module imports this one
        works_step = import_module("sparselearn.kernels.grouped_fan_in.bench_step").works_step

        yield from works_step()
    elif section == "gemv":
        for layer in (LARGE[0], LARGE[1]):
            for sparsity in (0.9, 0.95, 0.99):
                for tokens in (1, 4, 8, 16):
                    yield partial(rows_gemv, make_case(layer, tokens, 1, sparsity))
    elif section == "vit":
        for training in (False, True):
            for tokens in (12544, 4096) if not training else (12544,):
                for group in (64, 32):
                    for layer in VIT:
                        yield partial(rows_vit, make_case(layer, tokens, group, 0.9, training))
    elif section == "grid":
        for sparsity in (0.9, 0.8, 0.95):
            for group in (32, 64, 16, 128, 8):
                for tokens in (16, 64, 256, 1024, 4096):
                    yield partial(rows_forward, make_case(LARGE[0], tokens, group, sparsity), detailed=False)
    elif section == "peers":
        for tokens in (4096, 1024):
            for group in (16, 32, 64):
                yield partial(rows_peers, make_case(LARGE[0], tokens, group, 0.9))
    elif section == "dtypes":
        for dtype in ("tf32", "float16", "float32"):
            for group in (16, 32, 64):
                case = make_case(LARGE[0], 4096, group, 0.9, dtype=dtype)
                yield crossover.products_of(dtype)(partial(rows_forward, case, detailed=False))


def first_cases(section: str) -> list[Case]:
    """Cases whose candidates are compiled before a section: one of every V, dtype and range of tokens."""
    layer, groups = LARGE[0], (16, 32, 64)
    if section in ("peers", "gemv"):
        return []
    if section == "dtypes":
        return [make_case(layer, 4096, g, 0.9, dtype=dtype) for dtype in ("tf32", "float16", "float32") for g in groups]
    found = [make_case(layer, 4096, group, 0.9, True) for group in groups]
    if section == "vit":  # a fan-in that is no multiple of 64
        found += [make_case(VIT[1], 12544, group, 0.9, True) for group in (32, 64)]
    if section == "grid":
        found += [make_case(layer, 4096, group, 0.9) for group in (128, 8)]
        found += [make_case(layer, tokens, g, 0.9) for tokens in (16, 64, 256) for g in (*groups, 128, 8)]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="time limit (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("grouped-fan-in.csv"), help="table to write (%(default)s)")
    parser.add_argument("--sections", nargs="+", choices=LIMITS, default=list(LIMITS), help="which, in which order")
    parser.add_argument("--limit", nargs="+", default=[], metavar="SECTION=SECONDS", help="time limits of sections")
    parser.add_argument("--plot", type=Path, metavar="CSV", help="only draw the picture of a table")
    options = parser.parse_args(arguments)
    if options.plot:
        print(import_module("sparselearn.kernels.grouped_fan_in.plot").plot(options.plot))
        return
    limits = LIMITS | {name: float(limit) for name, _, limit in (text.partition("=") for text in options.limit)}
    run = Run(options.out, options.seconds)
    compiled: set[Case] = set()
    for section in options.sections:
        missing = [case for case in first_cases(section) if case not in compiled]
        if missing and time.monotonic() < run.end:
            begin = time.monotonic()
            compile_ahead(missing)
            compiled.update(missing)
            print(f"\ncompiling for `{section}` took {time.monotonic() - begin:.0f} s", flush=True)
        run.take(section, works(section), limits[section])
        crossover.table().save()
    print("\n== best blocks (tokens, inputs, warps, stages, swap, ahead) by kernel, G, V, K, dtype, log2 tokens")
    for key, blocks in sorted(crossover.table().blocks.items(), key=str):
        print(key, blocks)
    print(options.out, crossover.table().path)
    if run.failures:
        raise SystemExit("\n".join(["FAILED:", *run.failures]))


if __name__ == "__main__":
    main()
