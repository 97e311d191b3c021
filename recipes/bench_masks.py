"""How fast N:M masks are chosen, and what SR-STE adds to a training step, beside eager code.

    python -m sparselearn.recipes.bench_masks --device cuda --out kernels/results/masks-h100.csv

`select`: the mask of a weight's magnitudes. `sr_ste`: all that SR-STE adds to a step but the optimizer (the mask, the
masked weights, the decay of the others in the gradient). The ways:

- ours: `structure.topk`; the two calls of the engine around the optimizer's step. (On every 50th step the engine also
  takes samples for its metrics; the median does not see those.)
- argsort: SR-STE's official code (arXiv 2102.04010, `sparse_ops.py`): the groups in rows, their magnitudes sorted,
  zeros scattered to the lowest, in forward and backward of an autograd function.
- topk: the same with `topk` in the sort's place, and ones scattered.
- patterns (transposable masks): a float32 convolution with the 90 masks of a 4x4 tile, argmax (arXiv 2404.01847, §5.1).

Before it is timed, each way must give the same mask (transposable: masks of the same magnitude in every tile) and, for
steps, the same weights and gradients. The ways alternate; the table has medians over rounds, quartiles, and the median
of `ours` over the other in the same round (`ratio`: 2 means that ours takes twice as long).
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparselearn as sl
from sparselearn.errors import SparsityError
from sparselearn.recipes.bench_checkpoint import machine
from sparselearn.structures import NM, TransposableNM

PATTERNS = ((2, 4), (1, 4), (1, 8), (1, 16), (4, 8))
SHAPES = ("1024x1024", "4096x4096", "512x512x3x3")  # the last: `conv2` of ResNet-50's last stage
DECAY = 2e-4
Row = dict[str, Any]
Way = Callable[[], object]


def distinct(shape: Sequence[int], device: torch.device) -> Tensor:
    """A weight whose magnitudes are all different, so that there is one best mask. Exact below 2^24 numbers."""
    g = torch.Generator().manual_seed(0)
    n = torch.Size(shape).numel()
    sign = torch.randint(2, (n,), generator=g) * 2 - 1
    return ((torch.randperm(n, generator=g) + 1) * sign).float().div(2 ** n.bit_length()).view(*shape).to(device)


def grouped(weight: Tensor, m: int) -> Tensor:
    """Magnitudes in rows of m input channels, as in the official code. [groups, m]"""
    channels_last = weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight
    return channels_last.detach().abs().reshape(-1, m)


def ungrouped(rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `grouped`, for a weight of this shape."""
    if weight.ndim == 2:
        return rows.reshape(weight.shape)
    out, n_in, *kernel = weight.shape
    return rows.reshape(out, *kernel, n_in).permute(0, 3, 1, 2)


def by_argsort(weight: Tensor, n: int, m: int) -> Tensor:
    """SR-STE's official mask, in the weight's dtype."""
    rows = grouped(weight, m)
    lowest = torch.argsort(rows, dim=1)[:, : m - n]
    return ungrouped(torch.ones_like(rows).scatter_(1, lowest, 0), weight)


def by_topk(weight: Tensor, n: int, m: int) -> Tensor:
    """The same mask from the n highest."""
    rows = grouped(weight, m)
    return ungrouped(torch.zeros_like(rows).scatter_(1, rows.topk(n, dim=1, sorted=False).indices, 1), weight)


def all_tiles() -> Tensor:
    """The 90 masks of a 4x4 tile with two ones in each row and column. [90, 4, 4]"""
    lines = [[float(i in pair) for i in range(4)] for pair in combinations(range(4), 2)]
    tiles = torch.tensor(list(product(lines, repeat=4)))
    return tiles[(tiles.sum(1) == 2).all(1)]


def by_patterns(weight: Tensor, tiles: Tensor) -> Tensor:
    """Transposable 2:4: the best of all masks of each tile, by a convolution of stride 4. weight: [out, in, ...]"""
    planes = weight.abs().flatten(2).movedim(2, 0) if weight.ndim > 2 else weight.abs().unsqueeze(0)
    best = nn.functional.conv2d(planes.unsqueeze(1), tiles.unsqueeze(1), stride=4).argmax(1)
    mask = tiles[best].movedim(-2, -3).reshape(planes.shape)  # [planes, out/4, in/4, 4, 4] -> [planes, out, in]
    return mask.movedim(0, -1).reshape(weight.shape)


class Official(torch.autograd.Function):
    """SR-STE as an autograd function, after the official code."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.mask = choose(weight)
        mask: Tensor = ctx.mask
        return weight.clone() * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad + DECAY * (1 - ctx.mask) * weight, None


class Eager:
    """What the official code does between two optimizer steps: forward's masked weights, backward's gradient."""

    def __init__(self, weight: Tensor, grad: Tensor, choose: Callable[[Tensor], Tensor]) -> None:
        self.weight, self.grad, self.choose = weight.clone().requires_grad_(), grad, choose

    def __call__(self) -> tuple[Tensor, Tensor]:
        forward = Official.apply(self.weight, self.choose)
        (grad,) = torch.autograd.grad(forward, self.weight, self.grad)
        return forward.detach(), grad


class Engine:
    """`before_step` and `after_step` around an optimizer's step that is left out."""

    def __init__(self, weight: Tensor, grad: Tensor, structure: sl.Structure) -> None:
        layer: nn.Module
        if weight.ndim == 2:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        else:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, bias=False)
        layer.weight = nn.Parameter(weight.clone())
        self.weight = layer.weight
        self.weight.grad = grad.clone()
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)
        self.sparsifier = sl.Sparsifier(layer, sl.sr_ste(structure, decay=DECAY))

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.sparsifier.before_step(self.optimizer)
        self.sparsifier.after_step(self.optimizer)
        assert self.weight.grad is not None
        return self.weight.detach(), self.weight.grad


def masks_agree(structure: sl.Structure, weight: Tensor, ours: Tensor, other: Tensor) -> bool:
    """Equal, or for transposable masks allowed and of equal magnitude in each tile (equal sums may tie)."""
    if isinstance(structure, NM):
        return torch.equal(ours, other.bool())
    structure.check(other.bool(), int(ours.sum()))

    def worth(mask: Tensor) -> Tensor:
        kept = (weight.abs() * mask).double()
        planes = kept.flatten(2).movedim(2, 0) if kept.ndim > 2 else kept.unsqueeze(0)
        return nn.functional.avg_pool2d(planes.unsqueeze(1), 4)

    return torch.allclose(worth(ours), worth(other), rtol=1e-6)


def selections(structure: NM | TransposableNM, weight: Tensor) -> dict[str, Way]:
    """The ways to choose a mask, seen to agree."""
    nnz = structure.budget(weight.shape, 0.5)
    ways: dict[str, Callable[[], Tensor]] = {"ours": lambda: structure.topk(weight.abs(), nnz)}
    for name, choose in eager(structure, weight.device).items():
        ways[name] = partial(choose, weight)
        if not masks_agree(structure, weight, ways["ours"](), ways[name]()):
            raise SparsityError(f"`{structure}` and `{name}` choose different masks for shape {list(weight.shape)}.")
    return dict(ways)


def steps(structure: NM | TransposableNM, weight: Tensor) -> dict[str, Way]:
    """The ways to do SR-STE's part of a step, seen to agree."""
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.device)
    ours = Engine(weight, grad, structure)
    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"ours": ours}
    expected = [t.clone() for t in ours()]
    for name, choose in eager(structure, weight.device).items():
        ways[name] = Eager(weight, grad, choose)
        if isinstance(structure, NM) and not all(map(torch.allclose, ways[name](), expected)):
            raise SparsityError(f"SR-STE by `{structure}` and by `{name}` differ for shape {list(weight.shape)}.")
    return dict(ways)


def eager(structure: NM | TransposableNM, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """The eager ways to choose such a mask."""
    if isinstance(structure, TransposableNM):
        return {"patterns": partial(by_patterns, tiles=all_tiles().to(device))}
    return {name: partial(f, n=structure.n, m=structure.m) for name, f in (("argsort", by_argsort), ("topk", by_topk))}


def seconds(way: Way, repeats: int, device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(ways: dict[str, Way], device: torch.device, rounds: int, least: float) -> dict[str, Row]:
    """Times of each way in ms, alternating; a turn is as many calls as fill `least` seconds."""
    repeats = {}
    for name, way in ways.items():
        seconds(way, 1, device)
        repeats[name] = max(1, min(1000, round(least / seconds(way, 1, device))))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(1e3 * seconds(way, repeats[name], device))
    rows: dict[str, Row] = {}
    for name, one in times.items():
        q1, median, q3 = statistics.quantiles(one, n=4)
        ratio = statistics.quantiles([a / b for a, b in zip(times["ours"], one, strict=True)], n=4)
        rows[name] = {"median_ms": median, "q1_ms": q1, "q3_ms": q3}
        rows[name] |= {"ratio": ratio[1], "ratio_q1": ratio[0], "ratio_q3": ratio[2]}
    return rows


def table(shapes: Sequence[str], device: torch.device, rounds: int, least: float) -> list[Row]:
    """A row for each work, pattern, shape and way; printed as they come."""
    structures: list[NM | TransposableNM] = [*(NM(n, m) for n, m in PATTERNS), TransposableNM(2, 4)]
    rows: list[Row] = []
    for shape in shapes:
        weight = distinct([int(size) for size in shape.split("x")], device)
        for structure in structures:
            for work, make in (("select", selections), ("sr_ste", steps)):
                for way, numbers in measure(make(structure, weight), device, rounds, least).items():
                    row = {"work": work, "pattern": str(structure), "shape": shape, "way": way}
                    rows.append(row | {key: float(f"{value:.4g}") for key, value in numbers.items()})
                    print("  ".join(map(str, rows[-1].values())), flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="weights, as in 512x512x3x3 (default: all three)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--least", type=float, default=0.05, help="seconds of a turn, where one call is shorter")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    rows = table(args.shape, device, args.rounds, args.least)
    where: Row = machine()
    cpu = f"{where.pop('cpu')}, {args.threads} threads"
    where["hardware"] = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    where["rounds"] = args.rounds
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | where for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
