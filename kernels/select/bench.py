"""Times a mask update of whole networks on a GPU: all layers at once against layer by layer.

    python -m sparselearn.kernels.select.bench --out kernels/results/select-h200.csv
    python -m sparselearn.kernels.select.bench --quick --profile    # within 90 s, with the time of each kernel
    python -m sparselearn.kernels.select.bench --tune GPT           # other sizes of blocks, nothing is written

Sparsity 0.9, drop fraction 0.3, random weights and gradients. Columns, in seconds, medians over rounds with the lowest
and the highest in `..._spread`; every round takes each way once, from the same weights:

- `at_once`: `launch.update`, from the call to its result on the host: new masks, moved weights and optimizer state.
- `device`: the same between two CUDA events, queued behind a pause, so that the host does not count.
- `by_layer`: the same work by the operations that the engine does layer after layer where there is no kernel.
- `topk`, `sort`: only the new masks, by torch.topk with ties to the lower index, and by a stable torch.sort.

Before anything is timed, the masks and the moved weights of all ways are compared; a difference ends the run. The
table is written after every row.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.kernels.masked_optimizer.bench import place
from sparselearn.kernels.select import Item, Updated, reference

DENSITY, DROP = 0.1, 0.3
TUNED = ((512, 32, 4, 8192), (1024, 16, 8, 8192), (1024, 16, 4, 8192), (256, 32, 2, 8192))
PAUSE = 30_000_000  # cycles, more than the host needs for all launches
Shapes = Sequence[tuple[int, ...]]
Way = Callable[[Sequence[Item]], Sequence[Tensor]]
"""Items -> their new masks."""


def resnet50() -> list[tuple[int, ...]]:
    """The 53 convolutions and the classifier of ResNet-50 (arXiv 1512.03385)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for blocks, width in [(3, 64), (4, 128), (6, 256), (3, 512)]:
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, inputs, 1, 1)] if block == 0 else []
            inputs = 4 * width
    return [*shapes, (1000, inputs)]


def gpt(blocks: int, width: int) -> list[tuple[int, ...]]:
    """The matrices of a GPT's blocks, without embeddings."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * blocks


def make_items(shapes: Shapes, dtype: torch.dtype, states: int, device: str, channels_last: bool = False) -> list[Item]:
    g = torch.Generator(device).manual_seed(0)
    items = []
    for shape in shapes:
        order = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
        w, grad, *state = (
            torch.randn(shape, generator=g, device=device).to(dtype, memory_format=order) for _ in range(2 + states)
        )
        mask, grown, fired = (torch.rand(shape, generator=g, device=device) < p for p in (DENSITY, DENSITY / 4, 0.3))
        mask, grown, fired = (
            torch.empty_like(w, dtype=torch.bool).copy_(t) for t in (mask, mask & grown, mask | fired)
        )
        for t in (w, *state):
            t.masked_fill_(~mask, 0)
        active = int(mask.sum())
        n_grow = int(DROP * active)
        items.append(Item(w, grad, mask, grown, fired, tuple(state), active, active - n_grow, n_grow))
    return items


def highest(score: Tensor, k: int) -> Tensor:
    """`reference.highest` by a threshold, as `sparselearn.structures` does it."""
    threshold = torch.topk(score, k, sorted=False).values.min()
    above, ties = score > threshold, score == threshold
    return above | ties & (ties.cumsum(0, dtype=torch.int32) <= k - above.sum(dtype=torch.int32))


def choose(item: Item) -> tuple[Tensor, Tensor]:
    """The new mask, and the weights that were kept."""
    w, g, m = item.weight.abs().float(), item.grad.abs().float(), item.mask
    kept = highest(w.masked_fill(~m, -torch.inf).reshape(-1), item.n_keep).view_as(m)
    return kept | highest(g.masked_fill(kept, -torch.inf).reshape(-1), item.n_grow).view_as(m), kept


def by_layer(items: Sequence[Item]) -> list[Tensor]:
    """An update layer after layer: scores checked, masks counted, weights and state moved, numbers for the logger."""
    masks, counts, squares = [], [], []
    for item in items:
        squares.append(item.grad.masked_fill(~item.mask, 0).float().square().sum())
        for score in (item.weight, item.grad):
            if bool(score.isnan().any()):
                raise SparsityError("NaN among random numbers.")
        mask, _ = choose(item)
        if int(mask.sum()) != item.n_keep + item.n_grow:
            raise SparsityError("A mask has another number of active weights than it was asked for.")
        stay, inactive = item.mask & mask, ~mask
        for t in (item.weight, *item.state):
            t.masked_fill_(~stay, 0)
        grown = mask & ~stay
        counts.append(torch.stack([grown.sum(), item.grown.sum(), (item.grown & mask).sum()]))
        masks.append((mask, inactive, grown, item.fired | mask))
    torch.stack([*torch.stack(counts).sum(0).double(), torch.stack(squares).sum().double()]).tolist()
    return [mask for mask, *_ in masks]


def by_topk(items: Sequence[Item]) -> list[Tensor]:
    return [choose(item)[0] for item in items]


def by_sort(items: Sequence[Item]) -> list[Tensor]:
    return [reference.new_mask(item, exclude_dropped=False)[0] for item in items]


def at_once(update: Callable[[Sequence[Item]], Updated | None], items: Sequence[Item]) -> list[Tensor]:
    done = update(items)
    if done is None:
        raise SparsityError("The kernels refused the random weights of this benchmark: they are not right here.")
    return [masks.mask for masks in done.masks]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def whole_seconds(call: Callable[[], object], device: str) -> float:
    """From the call to the end of its work on the device."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def device_seconds(call: Callable[[], object]) -> float:
    """The device's part: all is queued while it pauses."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait("cuda")
    torch.cuda._sleep(PAUSE)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


class Restored:
    """Weights that can be put back. States are not: no way reads them, and all zero the same places."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.weights = [item.weight.clone() for item in items]

    def again(self) -> None:
        for item, weight in zip(self.items, self.weights, strict=True):
            item.weight.copy_(weight)


def check(ways: dict[str, Way], before: Restored) -> None:
    """Every way gives the same masks, and those that move weights the same weights."""
    expected: list[Tensor] = []
    weights: list[Tensor] = []
    for name, way in ways.items():
        before.again()
        masks = way(before.items)
        seen = [item.weight.clone() for item in before.items] if name in ("at_once", "by_layer") else []
        expected, weights = expected or list(masks), weights or seen
        if not all(map(torch.equal, masks, expected)) or not all(map(torch.equal, seen, weights)):
            raise SparsityError(f"`{name}` gives other masks or weights than `at_once`.")


def profile(call: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, microseconds) of all that a call does on the device, in order."""
    wait("cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        wait("cuda")
    events = [e for e in seen.events() or () if e.device_type.name == "CUDA"]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name, e.time_range.elapsed_us()) for e in events]


def show(parts: Sequence[tuple[str, float]]) -> None:
    """Prints the launches of our kernels in order, then sums by name, longest first."""
    print("  in order, us: " + ", ".join(f"{name.removesuffix('_kernel')} {t:.0f}" for name, t in parts if t >= 20))
    sums: dict[str, list[float]] = {}
    for name, t in parts:
        sums.setdefault(name, []).append(t)
    longest = sorted(sums.items(), key=lambda item: -sum(item[1]))
    for name, times in longest[:12]:
        print(f"  {sum(times) / 1e3:8.3f} ms in {len(times):2} of {name[:80]}")
    print(f"  {sum(t for _, t in parts) / 1e3:8.3f} ms in all", flush=True)


def measure(
    shapes: Shapes, update: Callable[[Sequence[Item]], Updated | None], rounds: int, device: str = "cuda",
    dtype: torch.dtype = torch.float32, states: int = 1, channels_last: bool = False, profiled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One row of the table."""
    before = Restored(make_items(shapes, dtype, states, device, channels_last))
    ways: dict[str, Way] = {"at_once": partial(at_once, update), "by_layer": by_layer, "topk": by_topk, "sort": by_sort}
    check(ways, before)
    calls: dict[str, Callable[[], float]] = {
        name: partial(whole_seconds, partial(way, before.items), device) for name, way in ways.items()
    }
    if device == "cuda":
        calls["device"] = partial(device_seconds, partial(ways["at_once"], before.items))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before.again()
            times[name].append(call())
    if profiled:
        before.again()
        show(profile(partial(ways["at_once"], before.items)))
    row: dict[str, Any] = {"layers": len(shapes), "weights": sum(w.numel() for w in before.weights), "rounds": rounds}
    for name, seen in times.items():
        row |= {name: statistics.median(seen), f"{name}_spread": f"{min(seen):.4g}-{max(seen):.4g}"}
    return row | {f"{name}/at_once": row[name] / row["at_once"] for name in ("by_layer", "topk", "sort")}


def tune(network: str, deadline: float) -> None:
    """Prints device times of the cells of a network with other blocks than those of `launch`."""
    from sparselearn.kernels.select import launch

    for known, arguments in cells():
        if network not in known["network"]:
            continue
        shapes, dtype, states, last = (arguments[k] for k in ("shapes", "dtype", "states", "channels_last"))
        before = Restored(make_items(shapes, dtype, states, "cuda", last))
        for block, steps, warps, sample in TUNED:
            if time.monotonic() > deadline:
                return
            update = partial(launch.update, block=block, steps=steps, warps=warps, sample=sample)
            times = []
            for _ in range(4):
                before.again()
                times.append(device_seconds(partial(update, before.items)) * 1e3)
            name = f"{known['network']} {known['dtype']} channels_last={last} {block=} {steps=} {warps=} {sample=}"
            print(f"{name}: {statistics.median(times[1:]):.3f} ms", flush=True)  # the first compiles
        del before
        torch.cuda.empty_cache()


def cells() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(columns, arguments of `measure`)."""
    large = gpt(20, 2048)  # 1.007e9 weights
    for network, shapes, dtype, states, channels_last in [
        ("GPT 20x2048", large, torch.float32, 2, False),
        ("GPT 20x2048", large, torch.bfloat16, 2, False),
        ("ResNet-50", resnet50(), torch.float32, 1, False),
        ("ResNet-50", resnet50(), torch.float32, 1, True),
        ("ResNet-50", resnet50(), torch.bfloat16, 1, True),
    ]:
        known = {"network": network, "dtype": str(dtype).removeprefix("torch."),
                 "optimizer": ("SGD", "momentum", "AdamW")[states], "channels_last": channels_last}  # fmt: skip
        arguments = {"shapes": shapes, "dtype": dtype, "states": states, "channels_last": channels_last}
        yield known | {"sparsity": 1 - DENSITY, "drop_fraction": DROP}, arguments


def write(path: Path, rows: Sequence[dict[str, Any]], constant: dict[str, Any]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *constant], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | constant for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sparselearn.kernels.select.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=240, help="begin nothing after this time (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and nothing begins after 75 seconds")
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel for the GPT rows")
    parser.add_argument("--tune", metavar="NETWORK", help="only print device times with other blocks")
    parser.add_argument("--out", type=Path, default=Path("kernels/results/select-h200.csv"),
                        help="the table, as CSV (%(default)s)")  # fmt: skip
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 3, 75.0
    if not torch.cuda.is_available():
        raise SparsityError("This benchmark needs a CUDA device; there is none.")
    start = time.monotonic()
    if options.tune:
        return tune(options.tune, start + options.seconds)
    from sparselearn.kernels.select import launch

    rows = []
    for known, arguments in cells():
        if time.monotonic() - start > options.seconds:
            print(f"not measured, the time was up: {known}")
            continue
        profiled = options.profile and known["network"].startswith("GPT")
        row = known | measure(update=launch.update, rounds=options.rounds, profiled=profiled, **arguments)
        rows.append({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})
        print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
        write(options.out, rows, place())
        torch.cuda.empty_cache()
    print(f"{options.out}, after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
