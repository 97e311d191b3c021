"""How long `import sparselearn` takes beyond `import torch`, in fresh processes that alternate.

python -m sparselearn.recipes.bench_import --out kernels/results/import-cpu.csv
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs this."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args(argv)
    statements = ("import torch", "import sparselearn")
    for statement in statements:  # fill the disk's cache
        seconds(statement)
    times = [[seconds(statement) for statement in statements] for _ in range(args.rounds)]
    torch_s, ours = (statistics.median(column) for column in zip(*times, strict=True))
    extra = [b - a for a, b in times]
    q1, median, q3 = statistics.quantiles(extra, n=4)
    row = {
        "torch_s": round(torch_s, 3), "sparselearn_s": round(ours, 3), "extra_median_s": round(median, 3),
        "extra_q1_s": round(q1, 3), "extra_q3_s": round(q3, 3), "rounds": args.rounds,
    }  # fmt: skip
    print(row)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
