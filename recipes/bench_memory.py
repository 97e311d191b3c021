"""Peak memory of training with and without dense gradients held for all layers (`release_gradients`).

    python -m sparselearn.recipes.bench_memory --device cuda --out kernels/results/memory-h100.csv

Trains an MLP of equal layers with AdamW by RigL, each way in a process of its own. On a GPU the figure is the
allocator's peak over a step, for ordinary steps and update steps apart; on a CPU it is the process's peak above that of
building the model, over ordinary steps alone, since it never falls.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import sparselearn as sl

EVERY = 5


def peak(device: torch.device, start: int) -> int:
    """Bytes at the highest point so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start


def measure(device: torch.device, width: int, depth: int, sparsity: float, release: bool) -> dict[str, object]:
    """One row: MiB of the weights, and at the peak of ordinary steps and of update steps."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]).to(device)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    base = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    sparsifier = sl.Sparsifier(model, sl.rigl(stop=10**6, every=EVERY), sparsity=sparsity)
    optimizer = sl.SparseOptimizer(base, sparsifier, release_gradients=release)
    x = torch.randn(64, width, device=device)
    peaks: dict[bool, int] = {}
    for step in range(2 * EVERY + 1 if device.type == "cuda" else EVERY):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step > 1:  # the optimizer's state is there
            due = sparsifier.method.due(step)
            peaks[due] = max(peaks.get(due, 0), peak(device, start))
    return {
        "gradients": "released" if release else "dense",
        "sparsity": sparsity,
        "weights_mib": round(sum(p.nbytes for p in model.parameters()) / 2**20),
        "step_mib": round(peaks[False] / 2**20),
        "update_mib": round(peaks[True] / 2**20) if True in peaks else None,
        "layers": depth,
        "width": width,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--one", choices=["dense", "released"], help="measure this way in this process")
    args = parser.parse_args(argv)
    if args.one:
        release = args.one == "released"
        print(json.dumps(measure(torch.device(args.device), args.width, args.depth, args.sparsity[0], release)))
        return 0
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # glibc gives freed tensors back at once
    rows = []
    for sparsity in args.sparsity:
        for one in ("dense", "released"):
            command = [sys.executable, "-m", "sparselearn.recipes.bench_memory", "--one", one, "--device", args.device]
            command += ["--width", str(args.width), "--depth", str(args.depth), "--sparsity", str(sparsity)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            rows.append(json.loads(done.stdout))
            print(rows[-1])
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
