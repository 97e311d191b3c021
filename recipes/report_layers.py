"""The report's pictures with one place a layer: densities, dead neurons and weights at the end.

Dimension 0 of a weight is taken as its outputs and dimension 1 as its inputs, as in Linear and Conv.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from sparselearn.recipes import report_style as look
from sparselearn.recipes.report_runs import Run
from sparselearn.recipes.report_style import Picture, color, panels, short
from sparselearn.statistics import dead_neurons

MOST_LAYERS = 12


def unused(mask: Tensor) -> int:
    """Inputs without any active weight."""
    return int((~mask.transpose(0, 1).flatten(1).any(1)).sum())


def _by_layer(
    runs: Sequence[Run], slug: str, title: str, line: str, ylabel: str, value: Callable[[Tensor], float], log: bool
) -> Picture | None:
    """A dot for every layer and run, layers in the model's order."""
    shown = [(index, run) for index, run in enumerate(runs) if run.masks]
    if not shown:
        return None
    layers = list(dict.fromkeys(name for _, run in shown for name in run.masks))
    figure, (ax,) = panels(1, 3.3 if len(layers) <= 6 else 4.2, width=look.CARD if len(layers) <= 6 else look.WIDE)
    lowest, alts = 1.0, []
    for place, (index, run) in enumerate(shown):
        values = {name: value(mask) for name, mask in run.masks.items()}
        offset = (place - (len(shown) - 1) / 2) * min(0.14, 0.7 / len(shown))  # equal values stay apart
        x = [layers.index(name) + offset for name in values]
        ax.plot(x, list(values.values()), "o", color=color(index), markersize=6, alpha=0.9)
        lowest = min(lowest, *values.values())
        alts.append(f"{run.label}: " + ", ".join(f"{name} {100 * v:.3g} %" for name, v in values.items()))
    if log and lowest < 0.5:
        look.logarithmic(ax, look.percent)
        ax.set_ylim(lowest / 1.6, 1.3)
    else:
        top = max(0.1, ax.get_ylim()[1])
        ax.set_ylim(-0.03 * top, top)  # dots at 0 are seen whole
    every = -(-len(layers) // 60)
    names = [short(name.removesuffix(".weight"), 26) for name in layers]
    ax.set_xticks(range(0, len(layers), every), names[::every])
    if sum(map(len, names)) > 50:
        ax.tick_params(axis="x", labelrotation=55, labelsize=7.5)
        for text in ax.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    ax.yaxis.set_major_formatter(look.percent)
    ax.set_xlim(-0.6, len(layers) - 0.4)
    ax.set_ylabel(ylabel)
    ax.grid(axis="x", visible=False)
    look.legend(figure, shown, "dot")
    return Picture(slug, title, line, "; ".join(alts) + ".", figure)


def densities(runs: Sequence[Run]) -> Picture | None:
    return _by_layer(
        runs, "layer-densities", "Density of every layer",
        "Share of active weights at the end, from the input to the output of the network.",
        "active weights", lambda mask: float(mask.float().mean()), log=True,
    )  # fmt: skip


def dead(runs: Sequence[Run]) -> Picture | None:
    masks = [mask for run in runs for mask in run.masks.values()]
    count = sum(dead_neurons(mask) for mask in masks)
    line = "Share of each layer's outputs that have no active input weight at the end"
    line += "." if count else ": there are none in these runs."
    return _by_layer(
        runs,
        "dead-by-layer",
        "Dead neurons by layer",
        line,
        "dead outputs",
        lambda m: dead_neurons(m) / len(m),
        log=False,
    )


def histograms(runs: Sequence[Run]) -> Picture | None:
    """Active weights only; the largest layers where there are many."""
    shown = [(index, run) for index, run in enumerate(runs) if run.weights]
    if not shown:
        return None
    names = dict.fromkeys(n for _, r in shown for n in (r.masks or r.weights))
    size = {name: max(run.weights[name].numel() for _, run in shown if name in run.weights) for name in names}
    chosen = set(sorted(size, key=size.__getitem__, reverse=True)[:MOST_LAYERS])
    figure, axes = panels(len(chosen), 2.0, columns=4 if len(chosen) > 3 else len(chosen), width=look.WIDE)
    alts = []
    for ax, name in zip(axes, [name for name in names if name in chosen], strict=True):
        active = {i: _active(run, name) for i, run in shown if name in run.weights}
        reach = max((float(np.quantile(np.abs(w), 0.999)) for w in active.values() if w.size), default=1.0) or 1.0
        for index, weights in active.items():
            counts, edges = np.histogram(weights, 60, (-reach, reach))
            share = counts / max(weights.size, 1)
            ax.stairs(share, edges, color=color(index), linewidth=1.3)
            ax.stairs(share, edges, color=color(index), fill=True, alpha=0.1)
            alts.append(f"{runs[index].label}, {name}: standard deviation {weights.std() if weights.size else 0:.3g}")
        ax.set_title(short(name), loc="left")
        ax.set(yticks=[], ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        ax.spines["left"].set_visible(False)
        ax.axvline(0, color=look.INK, linewidth=0.6, alpha=0.5)
    look.legend(figure, shown)
    line = "How large the active weights are at the end (zeros outside the mask are not counted)"
    line += f"; the {MOST_LAYERS} largest of {len(names)} layers." if len(names) > MOST_LAYERS else "."
    return Picture("weights", "Weights", line, "; ".join(alts) + ".", figure)


def _active(run: Run, name: str) -> NDArray[np.float32]:
    weight = run.weights[name]
    values = weight[run.masks[name]] if name in run.masks else weight.flatten()
    return values[values.isfinite()].numpy()
