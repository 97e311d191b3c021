"""Times n:m layers on a GPU against cuBLAS and cuSPARSELt's default algorithm; needs torch and triton alone.

    python -m sparselearn.kernels.semi_structured.bench --seconds 300 --out semi-structured-h100.csv

Times are CUDA-graph replays, medians of 5 rounds, with enough copies of the weights in turn that they come from memory
and not from the L2 cache. Blocks and algorithms are searched first. `speedup` is dense time / time for the same work;
in `pack` it is the time of torch's tile kernel. Rows are written at once. Errors are not measured here: run
`pytest -m gpu tests/test_semi_structured_gpu.py` before.
"""

import argparse
import csv
import time
from functools import partial
from pathlib import Path

import torch

from sparselearn.kernels import crossover
from sparselearn.kernels.crossover import Case
from sparselearn.kernels.grouped_fan_in.bench import facts
from sparselearn.kernels.semi_structured import cslt, ops, reference
from sparselearn.kernels.semi_structured.measure import copied, measured_seconds, products
from sparselearn.kernels.semi_structured.search import DEFAULT, search
from sparselearn.kernels.timing import Calls, graph_seconds

LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (3072, 768), (1024, 4096))
PATTERNS = ("1:4", "2:8", "1:8", "2:16", "1:16")
SECTIONS = ("pack", "decode", "gemm", "gemv", "training")
FIELDS = ("section", "neurons", "inputs", "pattern", "tokens", "dtype", "method", "us", "speedup")


def cases() -> list[tuple[str, Case]]:
    """Section and case, in order of interest."""
    made = []
    for tokens in (1, 8, 16, 64, 1024, 4096):
        section = "decode" if tokens <= 64 else "gemm"
        made += [(section, Case(n, i, 1, i // 2, "bfloat16", False, tokens, "2:4")) for n, i in LAYERS]
    for pattern in PATTERNS:
        n, m = map(int, pattern.split(":"))
        made += [
            ("gemv", Case(rows, i, 1, i // m * n, "bfloat16", False, tokens, pattern))
            for tokens in (1, 8)
            for rows, i in LAYERS[:3]
        ]
    made += [("training", Case(n, i, 1, i // 2, "bfloat16", True, 16384, "2:4")) for n, i in LAYERS[:3]]
    return made


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the table (.csv)")
    parser.add_argument("--seconds", type=float, default=300, help="start nothing after this time (%(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="which (all)")
    options = parser.parse_args()
    wanted = [(section, case) for section, case in cases() if section in options.sections]
    end, known = time.monotonic() + options.seconds, facts()
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*FIELDS, *known])

        def write(section: str, head: list[object], seconds: dict[str, float], base: str) -> None:
            for method, took in seconds.items():
                row = [section, *head, method, f"{took * 1e6:.2f}", f"{seconds[base] / took:.3f}"]
                writer.writerow([*row, *known.values()])
                print(*row, flush=True)
            file.flush()

        search([product for _, case in wanted if case.pattern == "2:4" for product in products(case)])
        for neurons, inputs in LAYERS[:2] if "pack" in options.sections else ():
            write("pack", [neurons, inputs, "2:4", "", "bfloat16"], packing(neurons, inputs), "torch tile")
        for section, case in wanted:
            if time.monotonic() > end:
                print(f"stopped before {section} {case}: the time is up")
                break
            seconds = measured_seconds(case)
            if "gemm" in seconds and not case.training:
                seconds["gemm, default algorithm"] = default_algorithm(case)
            head = [case.neurons, case.inputs, case.pattern, case.tokens, case.dtype]
            write(section, head, seconds, "dense")
    crossover.table().save()


if __name__ == "__main__":
    main()
