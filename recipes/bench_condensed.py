"""Training on a CPU with condensed layers, mask updates included, against masked dense training, on Fashion-MNIST.

    python -m sparselearn.recipes.bench_condensed --root data --out kernels/results/condensed-train-fashion.csv

An MLP 784-1000-1000-10 whose hidden layers have constant fan-in, AdamW, a few epochs. `masked` keeps dense weights and
masks their gradients and values in place (`SparseOptimizer`); `condensed` holds values and indices of the active
weights only, and their gradients and moments; both start from the same weights and follow the same method, so they
differ by rounding. `dense` has no masks. Every run is a process of its own: `peak_mb` is the most memory that the
process had while training (libraries and data are most of it), `training_mb` by how much that exceeds what it had
before the model was built, all code being loaded; `state_mb` is parameters, gradients, optimizer state and indices.
"""

import argparse
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparselearn as sl
from sparselearn.distributions import uniform
from sparselearn.kernels.condensed.bench import environment, save
from sparselearn.modules import convert
from sparselearn.modules.condensed import CondensedLinear
from sparselearn.modules.update import captured, update_condensed
from sparselearn.recipes.data import Split, fashion_mnist
from sparselearn.recipes.models import mlp
from sparselearn.structures import ConstantFanIn

FORMS = ("dense", "masked", "condensed")


METHODS: dict[str, Callable[[int], sl.DropGrow]] = {  # of the last step on which masks may change
    "static": lambda stop: sl.static(structure=ConstantFanIn()),
    "rigl": lambda stop: sl.rigl(stop=stop, every=50, drop_fraction=0.1, structure=ConstantFanIn()),
    "srigl": lambda stop: sl.srigl(stop=stop, every=50, drop_fraction=0.1, gamma=0.3),
}


def memory(what: str) -> float:
    """A line of this process's status in MB: "VmRSS" now, "VmHWM" at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {what}")


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: sl.Sparsifier | None) -> int:
    """Of the tensors that training holds between steps, gradients included."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    if sparsifier is not None:
        tensors += [t for layer in sparsifier.state.layers.values() for t in (layer.mask, layer.inactive)]
    return sum(t.nbytes for t in tensors)


class Run:
    """One training in one form."""

    def __init__(self, form: str, args: argparse.Namespace, steps: int, width: int) -> None:
        torch.manual_seed(args.seed[0])
        self.form, self.steps, self.lr = form, steps, args.lr
        self.model = mlp([784, width, width, 10])
        self.method = METHODS[args.method[0]](int(0.75 * steps))
        self.sparsifier: sl.Sparsifier | None = None
        if form != "dense":
            self.sparsifier = sl.Sparsifier(
                self.model, self.method, sparsity=args.sparsity[0], distribution=uniform, exclude=["4"],
                seed=args.seed[0], init="density",
            )  # fmt: skip
            self.budgets = {name: int(mask.sum()) for name, mask in self.sparsifier.masks.items()}
        if form == "condensed":
            convert(self.model, self.sparsifier, force=True)  # type: ignore[arg-type]
            self.sparsifier = None
        rate = 1.0 if form == "dense" else 1 / (1 - args.sparsity[0])  # the sparse layers' (density scaling)
        sparse = [m.values if isinstance(m, CondensedLinear) else m.weight for m in (self.model[0], self.model[2])]
        rest = [p for p in self.model.parameters() if not any(p is q for q in sparse)]
        self.base = torch.optim.AdamW([{"params": sparse, "scale": rate}, {"params": rest, "scale": 1.0}])
        self.optimizer = self.base if self.sparsifier is None else sl.SparseOptimizer(self.base, self.sparsifier)

    def step(self, step: int, x: Tensor, y: Tensor) -> None:
        warm = min(1.0, (step + 1) / (0.05 * self.steps))
        for group in self.base.param_groups:
            group["lr"] = self.lr * group["scale"] * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        self.optimizer.zero_grad()
        if self.form != "condensed" or not self.method.due(step):
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            return
        with captured(self.model) as traffic:
            nn.functional.cross_entropy(self.model(x), y).backward()
        if not self.method.skip_step:
            self.base.step()
        update_condensed(self.model, self.method, self.base, traffic, step=step, nnz=self.budgets)


def one(args: argparse.Namespace) -> dict[str, object]:
    """Train once in this process, at args' first form, method, sparsity and seed."""
    torch.set_num_threads(args.threads)
    data: Split = fashion_mnist(args.root, flat=True)
    steps = args.steps or int(args.epochs * len(data.train_x) / args.batch)
    small = Run(args.form[0], args, 100, 32)  # loads and compiles all that training needs
    for step in range(75):
        small.step(step, data.train_x[: args.batch], data.train_y[: args.batch])
    del small
    start = memory("VmRSS")
    run = Run(args.form[0], args, steps, args.width)
    gc.collect()  # every form is built from a dense model
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak up to now
    order = torch.Generator().manual_seed(args.seed[0])
    times = []
    for step in range(steps):
        rows = torch.randint(len(data.train_x), (args.batch,), generator=order)
        x, y = data.train_x[rows], data.train_y[rows]
        begin = time.perf_counter()
        run.step(step, x, y)
        times.append(time.perf_counter() - begin)
    peak, held = memory("VmHWM"), state_bytes(run.model, run.base, run.sparsifier) / 2**20
    with torch.no_grad():
        right = [(run.model(x).argmax(1) == y).sum() for x, y in zip(
            data.test_x.split(500), data.test_y.split(500), strict=True)]  # fmt: skip
    return {
        "test_accuracy": round(int(sum(right)) / len(data.test_x), 4), "steps": steps,
        "step_ms": round(statistics.mean(times[steps // 10 :]) * 1e3, 3),
        "median_step_ms": round(statistics.median(times) * 1e3, 3),
        "peak_mb": round(peak, 1), "training_mb": round(peak - start, 1), "state_mb": round(held, 2),
    }  # fmt: skip


def rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The table: seeds in turn, and in each the forms one after the other."""
    where = environment()
    for method, sparsity, seed, form in itertools.product(args.method, args.sparsity, args.seed, args.form):
        chosen: dict[str, Any] = {
            "form": form, "method": method, "width": args.width, "sparsity": sparsity, "batch": args.batch,
            "threads": args.threads, "seed": seed,
        }  # fmt: skip
        options = [f"--{key}={value}" for key, value in chosen.items()]
        options += [
            f"--root={args.root}",
            f"--epochs={args.epochs}",
            f"--steps={args.steps}",
            f"--lr={args.lr}",
            "--one",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "sparselearn.recipes.bench_condensed", "--one", *options],
            stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        )  # fmt: skip
        line = {"model": f"784-{args.width}-{args.width}-10", **chosen, **json.loads(done.stdout.splitlines()[-1])}
        print(" ".join(f"{k}={v}" for k, v in line.items()), flush=True)
        yield line | where


def summary(table: list[dict[str, Any]]) -> Iterator[str]:
    """Means over seeds, and step times against the masked form."""
    for key in dict.fromkeys((r["method"], r["sparsity"]) for r in table):
        cells = {f: [r for r in table if (r["method"], r["sparsity"]) == key and r["form"] == f] for f in FORMS}
        for form, cell in cells.items():
            if not cell:
                continue
            mean = {k: statistics.mean(float(r[k]) for r in cell) for k in ("test_accuracy", "step_ms", "training_mb")}
            ratios = [m["step_ms"] / r["step_ms"] for m, r in zip(cells["masked"], cell, strict=False)]
            faster = f", {statistics.median(ratios):.2f}x masked's speed" if ratios else ""
            yield (
                f"{key[0]} at {key[1]:.0%}, {form}: accuracy {mean['test_accuracy']:.4f}, {mean['step_ms']:.2f} ms a "
                f"step{faster}, {mean['training_mb']:.0f} MB for training, state {cell[0]['state_mb']} MB"
            )


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(prog="python -m sparselearn.recipes.bench_condensed", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("--root", default="data", help="folder with Fashion-MNIST")
    made.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    made.add_argument("--method", nargs="+", choices=list(METHODS), default=["srigl"])
    made.add_argument("--sparsity", nargs="+", type=float, default=[0.95])
    made.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--width", type=int, default=1000, help="of the hidden layers")
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--epochs", type=float, default=3)
    made.add_argument("--steps", type=int, default=0, help="in place of epochs")
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, help="CSV file to write")
    made.add_argument("--append", action="store_true", help="keep the lines that the file has")
    made.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the process of one run
    args = made.parse_args(arguments)
    if args.one:
        print(json.dumps(one(args)))
        return
    table = list(rows(args))
    print("\n".join(summary(table)))
    if args.out:
        save(table, args.out, args.append)


if __name__ == "__main__":
    main()
