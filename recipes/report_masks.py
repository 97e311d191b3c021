"""The report's pictures of single masks: the first layer, attention heads, and layers that the user chooses.

Dimension 0 of a weight is taken as its outputs and dimension 1 as its inputs, as in Linear and Conv.
"""

import itertools
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from sparselearn.errors import SparsityError, closest
from sparselearn.recipes import report_style as look
from sparselearn.recipes.report_runs import Run, flat
from sparselearn.recipes.report_style import Picture, color, image, panels, short, tint

MOST_RUNS, MOST_FILTERS, MOST_PIXELS = 4, 48, 160
IMAGES = ("digits", "mnist", "cifar", "image", "svhn")  # data sets whose flat inputs are pictures
PACKED = re.compile(r"in_proj_weight|(qkv|c_attn|in_proj)\.weight")  # queries, keys and values in one weight
SEPARATE = re.compile(r"(?:^|[._])(q|k|v|query|key|value)(?:_proj|_lin|_linear)?[._]weight$")


def masked(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    return [(index, run) for index, run in enumerate(runs) if run.masks]


def _first(shown: Sequence[tuple[int, Run]]) -> tuple[list[tuple[int, Run]], str]:
    """As many runs as fit beside each other, and what the explanation says of the others."""
    left_out = len(shown) - MOST_RUNS
    return list(shown[:MOST_RUNS]), f" The first {MOST_RUNS} of {len(shown)} runs." if left_out > 0 else ""


def _name(ax: Axes, index: int, run: Run) -> None:
    ax.set_title(short(run.label), loc="left", color=color(index), fontweight="bold")


def _scale(ax: Axes, low: str, high: str) -> None:
    """A small colour scale under the axes, from transparent to the full colour."""
    strip = ax.inset_axes((0.3, -0.08, 0.4, 0.025))
    image(strip, tint(np.linspace(0, 1, 64, dtype=np.float32)[None]))
    strip.set_aspect("auto")
    for x, text, side in ((-0.04, low, "right"), (1.04, high, "left")):
        strip.text(x, 0.5, text, transform=strip.transAxes, ha=side, va="center", color=look.MUTED, fontsize=8)


# ---- the first layer -----------------------------------------------------------------------------------------


def first_filters(runs: Sequence[Run]) -> Picture | None:
    """Kernels of a first convolution, the input channels of a filter beside each other."""
    shown, more = _first(
        [(i, r) for i, r in masked(runs) if (w := r.weights[next(iter(r.masks))]).ndim == 4 and w.shape[1] <= 4]
    )
    if not shown:
        return None
    figure, axes = panels(len(shown), 4.2, columns=4, width=_width(shown))
    for ax, (index, run) in zip(axes, shown, strict=True):
        name = next(iter(run.masks))
        image(ax, _filters(run.weights[name][:MOST_FILTERS], run.masks[name][:MOST_FILTERS]))
        ax.spines[:].set_visible(False)
        _name(ax, index, run)
    line = (
        "Each small square is a filter of the first layer (its input channels side by side): blue weights are "
        f"positive, orange ones negative, grey ones inactive.{more}"
    )
    alt = "; ".join(f"{run.label}: {_shape(run, next(iter(run.masks)))}" for _, run in shown) + "."
    return Picture("first-filters", "Filters of the first layer", line, alt, figure)


def _width(shown: Sequence[object]) -> float:
    return look.CARD if len(shown) == 1 else look.WIDE


def _filters(weight: Tensor, mask: Tensor) -> NDArray[np.float32]:
    """[n, c, h, w] -> one RGBA picture with a gap of one pixel around every filter."""
    n, c, h, w = weight.shape
    columns = max(1, round(math.sqrt(n * (h + 1) / (c * w + 1))))
    rows = -(-n // columns)
    share = weight.abs() / weight.abs().max().clamp(min=1e-12)
    picture = np.zeros((rows * (h + 1) - 1, columns * (c * w + 1) - 1, 4), np.float32)
    for k in range(n):
        values, active, positive = (t[k].transpose(0, 1).reshape(h, c * w).numpy() for t in (share, mask, weight > 0))
        tile = np.where(positive[..., None], tint(0.12 + 0.88 * values), tint(0.12 + 0.88 * values, look.RUNS[1]))
        tile[~active] = (0.5, 0.5, 0.5, 0.22)
        top, left = k // columns * (h + 1), k % columns * (c * w + 1)
        picture[top : top + h, left : left + c * w] = tile
    return picture


def fan_out(runs: Sequence[Run]) -> Picture | None:
    """Connections per pixel, where the first layer is linear and its input is a picture."""
    found = [(i, run, side) for i, run in masked(runs) if (side := _side(run))]
    if not found:
        return None
    shown, more = _first([(i, run) for i, run, _ in found])
    maps = []
    for (_, run), (*_, side) in zip(shown, found, strict=False):
        mask = next(iter(run.masks.values()))
        maps.append(mask.sum(0).view(-1, side, side).sum(0).numpy().astype(np.float32))
    most = max(1.0, max(float(m.max()) for m in maps))
    figure, axes = panels(len(shown), 3.4, columns=4, width=_width(shown))
    for ax, (index, run), counts in zip(axes, shown, maps, strict=True):
        image(ax, tint(counts / most))
        _name(ax, index, run)
        _scale(ax, "0", f"{most:.0f} weights")
    line = f"Each square is a pixel of the input; the stronger its colour, the more active weights leave it.{more}"
    alt = "; ".join(
        f"{run.label}: {counts.min():.0f} to {counts.max():.0f} weights a pixel, mean {counts.mean():.1f}, "
        f"{counts[side // 4 : -(side // 4), side // 4 : -(side // 4)].mean():.1f} in the middle"
        for (_, run), (*_, side), counts in zip(shown, found, maps, strict=False)
    )
    return Picture("fan-out", "Where the first layer looks", line, alt + ".", figure)


def _side(run: Run) -> int:
    """Height and width of the pictures that the first layer sees; 0 where they are none."""
    mask = next(iter(run.masks.values()))
    data = run.config.get("data")
    source = str(data.get("fn", "") if isinstance(data, dict) else "").lower()
    if mask.ndim != 2 or not any(word in source for word in IMAGES):
        return 0
    for channels in (1, 3):
        side = math.isqrt(mask.shape[1] // channels)
        if channels * side * side == mask.shape[1] and side >= 4:
            return side
    return 0


# ---- attention -----------------------------------------------------------------------------------------------


def _heads(run: Run, width: int) -> int:
    """The number of heads that the recipe's model was given, else heads of 64."""
    for key, text in flat(run.config):
        named = key.startswith("model.") and re.fullmatch(r"n_?heads?|num_heads|heads", key.rpartition(".")[2])
        if named and text.isdigit() and int(text) and width % int(text) == 0:
            return int(text)
    return width // 64 if width % 64 == 0 else 1


def head_densities(run: Run) -> dict[str, Tensor]:
    """Part (query, key or value) -> [layers, heads], the share of active weights in each head's rows."""
    rows: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    for name, mask in run.masks.items():
        if mask.ndim != 2:
            continue
        if PACKED.search(name) and len(mask) % 3 == 0:
            parts = dict(zip(rows, mask.chunk(3), strict=True))
        elif found := SEPARATE.search(name):
            parts = {next(part for part in rows if part.startswith(found[1][0])): mask}
        else:
            continue
        for part, block in parts.items():
            rows[part].append(block.view(_heads(run, len(block)), -1).float().mean(1))
    return {part: torch.stack(lines) for part, lines in rows.items() if lines and len({len(r) for r in lines}) == 1}


def attention(runs: Sequence[Run]) -> Picture | None:
    found = [(i, run, parts) for i, run in masked(runs) if (parts := head_densities(run))]
    if not found:
        return None
    found, more = found[:MOST_RUNS], _first([(i, run) for i, run, _ in found])[1]
    most = max(float(values.max()) for *_, parts in found for values in parts.values())
    height = 0.9 + 0.22 * max(len(values) for *_, parts in found for values in parts.values())
    figure = Figure(figsize=(look.WIDE, height * len(found)))
    grid = figure.subplots(len(found), 3, squeeze=False)
    for axes, (index, run, parts) in zip(grid, found, strict=True):
        for ax, part in zip(axes, ("query", "key", "value"), strict=True):
            if part not in parts:
                ax.remove()
                continue
            values = parts[part].numpy()
            image(ax, tint(values / most), aspect=max(0.12, min(0.6, len(values) / values.shape[1])))
            ax.set_title(part, loc="right", color=look.MUTED)
            ax.set(xlabel="head", xticks=range(values.shape[1]), yticks=range(len(values)))
            if part == "query":
                _name(ax, index, run)
                ax.set_ylabel("attention layer")
            _ticks_every(ax, values.shape)
    line = (
        f"Share of active weights in the query, key and value rows of every head, from 0 to {100 * most:.0f} % at full "
        f"colour: pale heads lost their connections.{more}"
    )
    alt = "; ".join(
        f"{run.label}, {part}: {100 * float(v.min()):.1f} % to {100 * float(v.max()):.1f} %"
        for _, run, parts in found for part, v in parts.items()
    )  # fmt: skip
    return Picture("attention", "Attention heads", line, alt + ".", figure)


def _ticks_every(ax: Axes, shape: tuple[int, ...]) -> None:
    ax.set_xticks(range(0, shape[1], -(-shape[1] // 16)))
    ax.set_yticks(range(0, shape[0], -(-shape[0] // 12)))
    ax.tick_params(length=0)


# ---- masks of chosen layers ----------------------------------------------------------------------------------


def choose(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    """The layers whose masks are drawn: those that match, else the first, the largest and the last sparse one.

    Raises:
        SparsityError: a pattern matches no masked layer of any run.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.masks))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = f"Closest: {closest(pattern, names)}." if names else "None of the runs has masks."
            raise SparsityError(f"`--layer` {pattern!r} matched no masked layer of these runs. {known}")
    if patterns:
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    first = next((run.masks for run in runs if run.masks), {})
    sparse = [name for name, mask in first.items() if not bool(mask.all())] or list(first)
    largest = max(sparse, key=lambda name: first[name].numel(), default="")
    return [name for name in sparse if name in (sparse[0], largest, sparse[-1])]


def masks(runs: Sequence[Run], layers: Sequence[str]) -> Picture | None:
    """Rows: layers; columns: runs. The layers of a single run lie beside each other."""
    shown, more = _first([(i, run) for i, run in masked(runs) if any(name in run.masks for name in layers)])
    if not shown:
        return None
    rows = [[(index, run, name) for index, run in shown] for name in layers]
    if len(shown) == 1:
        cells = [row[0] for row in rows]
        rows = [cells[k : k + 3] for k in range(0, len(cells), 3)]
    columns = max(len(row) for row in rows)
    tall = [max(_aspect(run.masks[name]) for _, run, name in row if name in run.masks) for row in rows]
    heights = [0.65 + (look.WIDE / columns - 0.2) * t for t in tall]
    figure = Figure(figsize=(look.WIDE, 0.2 + sum(heights)))
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for place, (axes, row) in enumerate(zip(grid, rows, strict=True)):
        for ax, cell in itertools.zip_longest(axes, row):
            if cell is None or cell[2] not in cell[1].masks:
                ax.remove()
                continue
            index, run, name = cell
            blocks = _blocks(run.masks[name].flatten(1).float())
            image(ax, tint(blocks / max(float(blocks.max()), 1e-12), color(index)), aspect=_aspect(run.masks[name]))
            ax.set_xlabel(f"{short(name)}\n{_shape(run, name)}", fontsize=8, loc="left")
            if place == 0 and len(shown) > 1:
                _name(ax, index, run)
    line = (
        "Active weights of a layer, outputs downwards and inputs to the right; large masks are averaged in blocks, and "
        f"the strongest colour is the densest block.{more}"
    )
    alt = "; ".join(f"{run.label}, {n}: {_shape(run, n)}" for _, run in shown for n in layers if n in run.masks) + "."
    return Picture("masks", "Masks of chosen layers", line, alt, figure)


def _blocks(mask: Tensor) -> NDArray[np.float32]:
    """Means of equal blocks, as small as leave no more than MOST_PIXELS in each direction."""
    block = [-(-n // MOST_PIXELS) for n in mask.shape]
    result: NDArray[np.float32] = torch.nn.functional.avg_pool2d(mask[None], block, ceil_mode=True)[0].numpy()
    return result


def _aspect(mask: Tensor) -> float:
    """Height over width of a mask's picture: as it is, but neither a line nor a tower."""
    return min(0.9, max(0.22, mask.shape[0] / mask.flatten(1).shape[1]))


def _shape(run: Run, name: str) -> str:
    mask = run.masks[name]
    return f"{'×'.join(map(str, mask.shape))}, {int(mask.sum()):,} of {mask.numel():,} active"
