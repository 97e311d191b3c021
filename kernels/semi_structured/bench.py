"""Times n:m layers on a GPU against cuBLAS and cuSPARSELt's default algorithm; needs torch and triton alone.

    python -m sparselearn.kernels.semi_structured.bench --seconds 300 --out semi-structured-h100.csv
    python -m sparselearn.kernels.semi_structured.bench --sections decode --tokens 1 8 --ways decode --out decode.csv

Times are CUDA-graph replays, medians of 5 rounds, with enough copies of the weights in turn that they come from memory
and not from the L2 cache. Blocks and algorithms are searched first. `speedup` is dense time / time for the same work;
in `pack` it is the time of torch's tile kernel. Rows are written at once, after those of a file that is there; the most
telling come first, in sections in the order that is asked for. Errors are not measured here: run
`pytest -m gpu tests/test_semi_structured_gpu.py` before.
"""

import argparse
import csv
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from sparselearn.errors import SparsityError
from sparselearn.kernels import crossover
from sparselearn.kernels.crossover import Case
from sparselearn.kernels.grouped_fan_in.bench import facts
from sparselearn.kernels.semi_structured import cslt, ops, reference
from sparselearn.kernels.semi_structured.measure import WAYS, copied, measured_seconds, products
from sparselearn.kernels.semi_structured.search import DEFAULT, search
from sparselearn.kernels.timing import Calls, graph_seconds

LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (3072, 768), (1024, 4096))
PATTERNS = ("1:4", "2:8", "1:8", "2:16", "1:16")
SECTIONS = ("pack", "decode", "gemm", "gemv", "training")
FIELDS = ("section", "neurons", "inputs", "pattern", "tokens", "dtype", "method", "us", "speedup")


def cases(section: str) -> list[Case]:
    """In order of interest."""
    if section == "gemv":
        return [
            Case(rows, i, 1, i // int(pattern[2:]) * int(pattern[0]), "bfloat16", False, tokens, pattern, graph=True)
            for tokens in (1, 8)
            for pattern in PATTERNS
            for rows, i in LAYERS[:3]
        ]
    counts = {"decode": (1, 8, 16, 64), "gemm": (1024, 4096), "training": (16384,)}.get(section, ())
    layers, training = LAYERS[:3] if section == "training" else LAYERS, section == "training"
    return [
        Case(n, i, 1, i // 2, "bfloat16", training, tokens, "2:4", graph=True) for tokens in counts for n, i in layers
    ]


def default_algorithm(case: Case) -> float:
    """Seconds of cuSPARSELt as torch calls it, without a search."""
    weight = torch.randn(case.neurons, case.inputs, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(case.tokens, case.inputs, device="cuda", dtype=torch.bfloat16)
    values, places = ops.pack(weight)
    packed = copied((cslt.blob(values, cslt.metadata(values, places)),))
    return graph_seconds([partial(cslt.product, x, blob, None, DEFAULT) for (blob,) in packed])


def packing(neurons: int, inputs: int) -> dict[str, float]:
    """Seconds of prune and pack; torch's tile kernel does what `transposable` does (see README for what is wrong)."""
    weights = copied((torch.randn(neurons, inputs, device="cuda", dtype=torch.bfloat16),))
    mask = reference.magnitude_mask(weights[0][0])
    tile = partial(torch._sparse_semi_structured_tile, algorithm="largest_abs_values_greedy", use_cutlass=False)
    calls: dict[str, Calls] = {
        "torch tile": [partial(tile, w) for (w,) in weights],
        "magnitude": [partial(torch.ops.sparselearn.sp24_pack, w, None) for (w,) in weights],
        "mask": [partial(torch.ops.sparselearn.sp24_pack, w, mask) for (w,) in weights],
        "transposable": [partial(torch.ops.sparselearn.sp24_pack_transposable, w) for (w,) in weights],
    }
    return {name: graph_seconds(work) for name, work in calls.items()}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the table (.csv)")
    parser.add_argument("--seconds", type=float, default=300, help="start nothing after this time (%(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="which (all)")
    parser.add_argument("--tokens", nargs="+", type=int, help="which numbers of tokens (all)")
    parser.add_argument("--layers", nargs="+", help="which, as 4096x14336 (all)")
    parser.add_argument("--patterns", nargs="+", choices=("2:4", *PATTERNS), help="which, as 1:8 (all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="which, beside dense (all)")
    return parser.parse_args()


def wanted(given: argparse.Namespace) -> list[tuple[str, Case | None]]:
    """Sections and their cases; None: packing."""
    made: list[tuple[str, Case | None]] = []
    for section in given.sections:
        made += [
            (section, case)
            for case in cases(section)
            if (not given.tokens or case.tokens in given.tokens)
            and (not given.layers or f"{case.neurons}x{case.inputs}" in given.layers)
            and (not given.patterns or case.pattern in given.patterns)
        ]
        made += [(section, None)] * (section == "pack")
    return made


class Writer:
    """Rows of a table, each on disk when it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, facts()
        head = [*FIELDS, *self.known]
        if not path.exists():
            self._append(head)
        elif path.read_text(encoding="utf-8").partition("\n")[0] != ",".join(head):
            raise SparsityError(f"`{path}` has other columns than {','.join(head)}; name another file.")

    def _append(self, row: Sequence[object]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)

    def write(self, head: list[object], seconds: dict[str, float], base: str) -> None:
        for method, took in seconds.items():
            row = [*head, method, f"{took * 1e6:.2f}", f"{seconds[base] / took:.3f}"]
            self._append([*row, *self.known.values()])
            print(*row, flush=True)


def main() -> None:
    given = options()
    todo, end, table = wanted(given), time.monotonic() + given.seconds, Writer(given.out)
    if "gemm" in given.ways:
        search([product for _, case in todo if case and case.pattern == "2:4" for product in products(case)])
    for section, case in todo:
        if time.monotonic() > end:
            print(f"stopped before {section} {case}: the time is up")
            break
        if case is None:
            for neurons, inputs in LAYERS[:2]:
                table.write([section, neurons, inputs, "2:4", "", "bfloat16"], packing(neurons, inputs), "torch tile")
            continue
        seconds = measured_seconds(case, graph_seconds, ways=given.ways)
        if "gemm" in seconds and not case.training:
            seconds["gemm, default algorithm"] = default_algorithm(case)
        table.write([section, case.neurons, case.inputs, case.pattern, case.tokens, case.dtype], seconds, "dense")
        torch.cuda.empty_cache()
    for key, blocks in crossover.table().blocks.items():
        if key[0] in ("nm_gemv", "sp24_decode"):
            print("blocks", *key, "->", *blocks)
    crossover.table().save()


if __name__ == "__main__":
    main()
