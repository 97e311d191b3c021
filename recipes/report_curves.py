"""The report's pictures of what was logged: curves over the optimizer steps, and the cost of each run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sparselearn.recipes import report_style as look
from sparselearn.recipes.report_runs import PREFIX, Run
from sparselearn.recipes.report_style import Picture, color, dash, panels, short, steps

DENSITY = "sparsity/density/"
PICTURED = tuple(
    f"sparsity/{name}"
    for name in ("churn", "grown", "survival", "exploration_rate", "dead_neurons", "gradient_norm", "nnz")
)
OF_UPDATES = ("sparsity/churn", "sparsity/grown_fraction", "sparsity/survival", "sparsity/gradient_norm")
MOST_PANELS = 12
NOISY = 150  # points; a curve with more is drawn pale, under its running mean


def _having(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[int, Run]]:
    return [(i, run) for i, run in enumerate(runs) if any(name in run.series for name in names)]


def _curve(ax: Axes, values: dict[int, float], index: int, **style: Any) -> None:
    """One run's line; a gap where a value is not finite."""
    x, y = np.array(list(values)), np.array(list(values.values()))
    marker = max(3.0, 6 - index) if len(y) <= 25 else 0.0  # points of equal runs stay visible around each other
    style = {"color": color(index), "linestyle": dash(index), "marker": "o", "markersize": marker} | style
    if len(y) > NOISY:
        ax.plot(x, y, color=color(index), alpha=0.25, linewidth=0.8)
        width = len(y) // 40
        y = np.convolve(np.pad(y, (width, width), "edge"), np.ones(2 * width + 1) / (2 * width + 1), "valid")
    ax.plot(x, y, **style)


def _values(run: Run, name: str) -> dict[int, float]:
    """One metric; without the end of training where the last update's number was only logged once more."""
    values = run.series.get(name, {})
    points = list(values.items())
    repeated = name in OF_UPDATES and len(points) > 1 and points[-1][1] == points[-2][1]
    return dict(points[:-1]) if repeated else values


def _alt(runs: Sequence[tuple[int, Run]], names: Sequence[str], unit: Callable[[float], str]) -> str:
    parts = []
    for _, run in runs:
        for name in names:
            if values := _values(run, name):
                step, value = list(values.items())[-1]
                parts.append(f"{run.label}, {name}: {unit(value)} at step {step:,}")
    return "; ".join(parts) + "."


def _last(runs: Sequence[Run]) -> int:
    return max(1, *(run.step for run in runs))


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _over_steps(
    runs: Sequence[Run], slug: str, title: str, line: str, names: Sequence[str], ylabel: str = "",
    share: bool = False, log: bool = False, from_zero: bool = False,
) -> Picture | None:  # fmt: skip
    """One axis; a run's second metric (a test loss beside the training loss) is dotted."""
    shown = _having(runs, names)
    if not shown:
        return None
    figure, (ax,) = panels(1, 3.3)
    lowest = []
    for index, run in shown:
        for place, name in enumerate(name for name in names if name in run.series):
            _curve(ax, _values(run, name), index, **({"linestyle": ":"} if place else {}))
            lowest.append(min(run.series[name].values()))
    if log and min(lowest) > 0:
        look.logarithmic(ax, lambda value, _: f"{value:g}")
    if share:
        ax.yaxis.set_major_formatter(look.percent)
    elif from_zero:
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))  # a count
    if from_zero:
        ax.set_ylim(bottom=0)
    ax.set(xlabel="optimizer step", ylabel=ylabel)
    steps(ax, _last(runs))
    look.legend(figure, shown)
    return Picture(slug, title, line, _alt(shown, names, _percent if share else _number), figure)


def accuracy(runs: Sequence[Run]) -> Picture | None:
    return _over_steps(
        runs, "accuracy", "Test accuracy", "Share of the test examples that the network gets right as it trains.",
        ["test_accuracy"], share=True,
    )  # fmt: skip


def loss(runs: Sequence[Run]) -> Picture | None:
    names = sorted({name for run in runs for name in run.series if name.endswith("loss")}, key=lambda n: n[::-1])
    names.sort(key=lambda name: name != "train_loss")
    line = "The loss that training minimises, on a logarithmic scale where it is positive; lower is better."
    if len(names) > 1:
        line += f" Solid: {names[0]}; dotted: {', '.join(names[1:])}."
    return _over_steps(runs, "loss", "Loss", line, names, log=True)


def exploration(runs: Sequence[Run]) -> Picture | None:
    return _over_steps(
        runs, "exploration", "Exploration rate",
        "Share of all weights that were active at any time so far: what the masks have tried (R_s of ITOP).",
        ["sparsity/exploration_rate"], share=True, from_zero=True,
    )  # fmt: skip


def gradient_norm(runs: Sequence[Run]) -> Picture | None:
    return _over_steps(
        runs, "gradient-norm", "Gradient norm",
        "Length of the gradient of the active weights at each mask update; it shows whether the signal still flows.",
        ["sparsity/gradient_norm"], log=True,
    )  # fmt: skip


def dead_neurons(runs: Sequence[Run]) -> Picture | None:
    return _over_steps(
        runs, "dead-neurons", "Dead neurons",
        "Number of outputs without any active input weight, which are constant whatever the input is.",
        ["sparsity/dead_neurons"], from_zero=True,
    )  # fmt: skip


def churn(runs: Sequence[Run]) -> Picture | None:
    """Churn and survival under each other; runs that were made before churn was logged have the same number as
    `grown_fraction`."""
    names = {
        "replaced": ("sparsity/churn", "sparsity/grown_fraction"),
        "survived": ("sparsity/survival",),
    }
    logged = {title: _having(runs, keys) for title, keys in names.items()}
    logged = {title: shown for title, shown in logged.items() if shown}
    if not logged:
        return None
    figure, axes = panels(len(logged), 3.3, columns=2, width=look.WIDE if len(logged) > 1 else look.CARD)
    axis = {
        "replaced": "active weights replaced by an update",
        "survived": "weights grown by the update before that are still active",
    }
    alts = []
    for ax, (title, shown) in zip(axes, logged.items(), strict=True):
        for index, run in shown:
            _curve(ax, next(_values(run, key) for key in names[title] if key in run.series), index)
        ax.set_title(axis[title], loc="left")
        ax.set_xlabel("optimizer step")
        ax.set_ylim(0, None if title == "replaced" else 1.05)
        ax.yaxis.set_major_formatter(look.percent)
        steps(ax, _last(runs))
        alts.append(_alt(shown, names[title], _percent))
    look.legend(figure, _having(runs, [key for keys in names.values() for key in keys]))
    line = "How much each mask update moves"
    line += ", and how many of the connections it tried were kept." if "survived" in logged else "."
    title = "Mask churn and survival" if "survived" in logged else "Mask churn"
    return Picture("churn", title, line, " ".join(alts), figure)


def _small_panels(
    runs: Sequence[Run], slug: str, title: str, line: str, names: dict[str, str], share: bool
) -> Picture:  # fmt: skip
    """One panel a metric: `names` are metric -> heading. Of many, those that move most or differ most by run."""

    def spread(name: str) -> float:
        values = [v for run in runs for v in run.series.get(name, {}).values() if np.isfinite(v)]
        return max(values, default=0) - min(values, default=0)

    chosen = set(sorted(names, key=spread, reverse=True)[:MOST_PANELS])
    shown = _having(runs, list(names))
    columns = 4 if len(chosen) > 3 else len(chosen)
    figure, axes = panels(len(chosen), 2.2, columns=columns, width=look.WIDE if len(chosen) > 1 else look.CARD)
    for ax, name in zip(axes, [name for name in names if name in chosen], strict=True):
        for place, (index, run) in enumerate(shown):
            if name in run.series:  # equal lines lie on each other: the first ones are broader and stay visible
                _curve(ax, run.series[name], index, linewidth=max(1.4, 3.6 - 1.1 * place), markersize=0)
        ax.set_title(short(names[name]), loc="left")
        if share:
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter(look.percent)
        steps(ax, _last(runs), 4)
    line += f"; the {MOST_PANELS} of {len(names)} with the widest range." if len(names) > MOST_PANELS else "."
    look.legend(figure, shown)
    alt = _alt(shown, [name for name in names if name in chosen], _percent if share else _number)
    return Picture(slug, title, line, alt, figure)


def densities(runs: Sequence[Run]) -> Picture | None:
    names = dict.fromkeys(name for run in runs for name in run.series if name.startswith(DENSITY))
    headings = {name: name.removeprefix(DENSITY).removeprefix(PREFIX) for name in names}
    line = "Share of active weights of each layer over the optimizer steps"
    return _small_panels(runs, "densities", "Layer densities over time", line, headings, True) if names else None


def others(runs: Sequence[Run]) -> Picture | None:
    """What a method logs beside the metrics that have a picture of their own, where it is not constant."""
    names = dict.fromkeys(
        name
        for run in runs
        for name, values in run.series.items()
        if name.startswith("sparsity/") and not name.startswith((DENSITY, *PICTURED)) and len(set(values.values())) > 1
    )
    headings = {name: name.removeprefix("sparsity/") for name in names}
    line = "What the methods logged beside that, under the names in metrics.csv"
    return _small_panels(runs, "others", "Further numbers", line, headings, False) if names else None


def _bar_text(value: float, unit: str = "") -> str:
    if not np.isfinite(value):
        return "?"
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + unit


def cost(runs: Sequence[Run]) -> Picture | None:
    """Bars of what a run took and what its result weighs."""
    shown = [(i, run) for i, run in enumerate(runs) if run.finished and "training_flops" in run.facts]
    if not shown:
        return None
    figure, axes = panels(3, 1.0 + 0.32 * len(shown), columns=3, width=look.WIDE)
    columns = {
        "training FLOPs, share of dense": [100 * run.facts["training_flops"] for _, run in shown],
        "model size, MB": [run.facts.get("size_mb", np.nan) for _, run in shown],
        "training time, seconds": [run.facts.get("seconds", np.nan) for _, run in shown],
    }
    for ax, (title, values) in zip(axes, columns.items(), strict=True):
        bars = ax.barh(range(len(shown)), values, color=[color(i) for i, _ in shown], height=0.62)
        ax.bar_label(bars, [_bar_text(value, " %" if "share" in title else "") for value in values], padding=4)
        ax.set_title(title, loc="left")
        ax.set_yticks(range(len(shown)), [short(run.label) for _, run in shown] if ax is axes[0] else [])
        ax.tick_params(axis="y", length=0, labelcolor=look.INK)
        ax.invert_yaxis()
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.margins(x=0.18)
        ax.set_xlim(left=0)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
    line = (
        "Operations of the whole training (mask updates included) against a dense run, size with float32 values and "
        "one bit per weight for the masks, and wall time."
    )
    alt = " ".join(
        f"{run.label}: " + ", ".join(f"{title} {_bar_text(values[k])}" for title, values in columns.items()) + "."
        for k, (_, run) in enumerate(shown)
    )
    return Picture("cost", "FLOPs, size and time", line, alt, figure)
