"""Times the masked optimizer against torch's optimizers, alone and within a training step, on a GPU.

    python -m sparselearn.kernels.masked_optimizer.bench --seconds 120
    python -m sparselearn.kernels.masked_optimizer.bench --sections training --seconds 60 --out training.csv

AdamW, float32 weights; replays of CUDA graphs, so that the host's pace does not count. Columns, in µs: `plain`: torch's
fused AdamW without masks. `fused`, `foreach`: torch's, with gradients masked before and weights masked after it, as the
engine does. `ours`: one pass, with the configuration named in `config` (all of them in `configs`). `step` is what
`masked_optimizer.step` takes with its default configuration. `roof`: the bytes at the bandwidth that a copy of 1 GiB
reaches here. In rows "training" all of forward, backward and optimizer.

Rows "sr_ste": one step of SR-STE, penalty, update, new 2:4 mask and projected weights; there `plain` is AdamW alone.

Rows are written at once, after those of a file that is there.
"""

import argparse
import csv
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparselearn.errors import SparsityError
from sparselearn.kernels import masked_optimizer
from sparselearn.kernels.masked_optimizer import Target, reference
from sparselearn.kernels.masked_optimizer.reference import Rule
from sparselearn.kernels.timing import commit, graph_seconds

RULE = Rule(1e-3, 0.9, 0.999, 1e-8, 0.01, decoupled=True)
CONFIGS = ((512, 2), (512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8))  # weights of a program, warps
DECAY = 2e-4
Row = dict[str, Any]


def microseconds(call: Callable[[], object], rounds: int = 5) -> float:
    return graph_seconds([call], rounds=rounds) * 1e6


def copy_bandwidth() -> float:
    """Bytes per µs that are read and written by a copy."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.itemsize / microseconds(partial(target.copy_, source))


class Layers:
    """Parameters with gradients, masks, and AdamW after its first step; zero outside the masks."""

    def __init__(self, shapes: list[tuple[int, int]], density: float, **options: Any) -> None:
        self.parameters = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
        self.masks = [torch.rand(p.shape, device="cuda") < density for p in self.parameters]
        self.inactive = [~mask for mask in self.masks]
        self.grads = [torch.randn_like(p).masked_fill_(~m, 0) for p, m in zip(self.parameters, self.masks, strict=True)]
        for p, grad in zip(self.parameters, self.grads, strict=True):
            p.grad = grad
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, capturable=True, **options)
        self.masked_step()

    def masked_step(self) -> None:
        """The engine's way."""
        for grad, hidden in zip(self.grads, self.inactive, strict=True):
            grad.masked_fill_(hidden, 0)
        self.optimizer.step()
        for p, hidden in zip(self.parameters, self.inactive, strict=True):
            p.data.masked_fill_(hidden, 0)

    def targets(self) -> dict[nn.Parameter, Target]:
        both = zip(self.parameters, self.grads, self.masks, strict=True)
        return {p: Target(p.data, grad, mask, clean=True) for p, grad, mask in both}

    def items(self, **options: Any) -> list[Any]:
        from sparselearn.kernels.masked_optimizer.launch import Item

        slots = [self.optimizer.state[p] for p in self.parameters]
        both = zip(self.parameters, self.grads, slots, self.masks, strict=True)
        return [Item(RULE, p.data, g, (s["exp_avg"], s["exp_avg_sq"]), m, s["step"], **options) for p, g, s, m in both]


def best(items: list[Any], **options: Any) -> Row:
    """The kernel in all configurations."""
    from sparselearn.kernels.masked_optimizer import launch

    times = {
        f"{block}x{warps}": microseconds(partial(launch.run, items, block=block, warps=warps, **options))
        for block, warps in CONFIGS
    }
    name = min(times, key=times.__getitem__)
    return {"ours": times[name], "config": name, "configs": " ".join(f"{n}={t:.1f}" for n, t in times.items())}


def alone(shapes: list[tuple[int, int]], density: float, clean: bool, bandwidth: float) -> Row:
    layers, foreach = Layers(shapes, density, fused=True), Layers(shapes, density, foreach=True)
    weights = sum(rows * columns for rows, columns in shapes)
    sectors = 1 - (1 - density) ** 8 if clean else 1.0  # with an active weight among 8 neighbours
    row = {
        "plain": microseconds(layers.optimizer.step), "fused": microseconds(layers.masked_step),
        "foreach": microseconds(foreach.masked_step), **best(layers.items(), clean=clean),
        "step": microseconds(partial(masked_optimizer.step, layers.optimizer, layers.targets())),
        "roof": weights * (5 + 24 * sectors) / bandwidth,
    }  # fmt: skip
    return row


def sr_ste(shape: tuple[int, int], bandwidth: float) -> Row:
    layers = Layers([shape], 1.0, fused=True)
    (p,), (grad,) = layers.parameters, layers.grads
    mask, forward = reference.project(p.data, 2)
    layers.masks, new = [mask], (torch.empty_like(mask), torch.empty_like(forward))

    def eager() -> None:
        """The engine's operations: penalty, swap, step, swap, mask, projection."""
        grad.add_((p.data * DECAY).masked_fill_(mask, 0))
        forward.copy_(p.data)
        layers.optimizer.step()
        p.data.copy_(forward)
        found, projected = reference.project(p.data, 2)
        new[0].copy_(found)
        new[1].copy_(projected)

    times = {"plain": microseconds(layers.optimizer.step), "fused": microseconds(eager, rounds=3)}
    ours = best(layers.items(penalty=DECAY, projected=new), keep=2)
    return times | ours | {"roof": shape[0] * shape[1] * 34 / bandwidth}


def training(width: int, depth: int, tokens: int, density: float) -> Row:
    """An MLP in bfloat16 autocast."""

    def step_of(kind: str) -> Callable[[], None]:
        torch.manual_seed(0)
        pairs = [[nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)] for _ in range(depth)]
        model = nn.Sequential(*(module for pair in pairs for module in pair)).cuda()
        masks = {p: torch.rand(p.shape, device="cuda") < density for p in model.parameters() if p.ndim > 1}
        inactive = {p: ~mask for p, mask in masks.items()}
        way: Row = {"foreach": True} if kind == "foreach" else {"fused": True}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=True, **way)
        x = torch.randn(tokens, width, device="cuda")

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            grads = {p: p.grad for p in masks if p.grad is not None}
            if kind == "ours" and optimizer.state:
                for p in masks:
                    p.grad = None
                optimizer.step()
                masked_optimizer.step(
                    optimizer, {p: Target(p.data, grads[p], mask, clean=True) for p, mask in masks.items()}
                )
                return
            for p, grad in grads.items() if kind != "plain" else ():
                grad.masked_fill_(inactive[p], 0)
            optimizer.step()
            for p in grads if kind != "plain" else ():
                p.data.masked_fill_(inactive[p], 0)

        return step

    return {kind: microseconds(step_of(kind), rounds=7) for kind in ("plain", "fused", "foreach", "ours")}


SECTIONS = ("training", "sr_ste", "alone")
TIMES = ("plain", "fused", "foreach", "ours", "step", "roof")
COLUMNS = ("what", "layers", "density", "clean", "tokens", *TIMES, "fused/plain", "foreach/plain", "ours/plain",
           "config", "configs", "copy_gb_per_s")  # fmt: skip


def cells(bandwidth: float) -> Iterator[tuple[Row, Callable[[], Row]]]:
    sizes = {"8x1024x4096": [(1024, 4096)] * 8, "24x4096x4096": [(4096, 4096)] * 24, "160x256x256": [(256, 256)] * 160}
    for width, depth, tokens in [(1024, 8, 1024), (1024, 8, 8192), (4096, 2, 4096)]:
        known: Row = {"what": "training", "layers": f"{2 * depth}x{width}x{4 * width}", "density": 0.1}
        yield known | {"tokens": tokens}, partial(training, width, depth, tokens, 0.1)
    for shape in [(4096, 4096), (14336, 4096)]:
        yield {"what": "sr_ste", "layers": "1x{}x{}".format(*shape)}, partial(sr_ste, shape, bandwidth)
    for name, shapes in sizes.items():
        for density, clean in [(0.1, True), (0.1, False), (0.01, True), (0.5, True)]:
            known = {"what": "alone", "layers": name, "density": density, "clean": clean}
            yield known, partial(alone, shapes, density, clean, bandwidth)


def place() -> Row:
    """Hardware, versions and commit, for every line of the table."""
    import triton

    return {"gpu": torch.cuda.get_device_name(), "python": platform.python_version(),
            "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sparselearn.kernels.masked_optimizer.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing after this time (%(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="which rows (all)")
    parser.add_argument("--out", type=Path, default=Path("kernels/results/masked-optimizer.csv"),
                        help="the table, as CSV (%(default)s)")  # fmt: skip
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SparsityError("This benchmark needs a CUDA device; there is none.")
    start, constant = time.monotonic(), place()
    bandwidth = copy_bandwidth()
    for known, measured in cells(bandwidth):
        if known["what"] not in options.sections:
            continue
        if time.monotonic() - start > options.seconds:
            print(f"not measured, the time was up: {known}")
            continue
        row = known | measured()
        row |= {f"{name}/plain": row[name] / row["plain"] for name in ("fused", "foreach", "ours") if name in row}
        write(options.out, row | {"copy_gb_per_s": bandwidth / 1e3}, constant)
        torch.cuda.empty_cache()
    print(options.out)


def write(path: Path, row: Row, constant: Row) -> None:
    """Append a row to a table, which is made if it is not there."""
    columns = [*COLUMNS, *constant]
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    print("  ".join(f"{name}={value}" for name, value in shown.items()), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new and path.read_text(encoding="utf-8").partition("\n")[0] != ",".join(columns):
        raise SparsityError(f"`{path}` has other columns than {','.join(columns)}; name another file.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(shown | constant)


if __name__ == "__main__":
    main()
