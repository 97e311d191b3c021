"""How the report's pictures look, and how a figure becomes SVG that follows the page's light or dark theme."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from sparselearn.recipes.report_runs import Run

# What a picture is drawn with (light theme, and PNG), the page's variable for it, and its colour in the dark theme.
INK, MUTED, LINE = "#1f2430", "#667085", "#e4e7ec"
# Okabe and Ito's colours, which colour-blind readers can tell apart, a little darker where thin lines need it.
RUNS = ("#0072b2", "#d55e00", "#009e73", "#b5579b", "#c98a00", "#3f9fd8", "#6b4fc0", "#6f7683")
RUNS_DARK = ("#4fb0ea", "#ff8f4f", "#35cfa3", "#e398c9", "#f5bd4a", "#9bd6ff", "#ac9af5", "#aab2c0")
THEME = {INK: ("ink", "#e6e9ef"), MUTED: ("muted", "#98a2b3"), LINE: ("line", "#2c3340")} | {
    light: (f"run{index}", dark) for index, (light, dark) in enumerate(zip(RUNS, RUNS_DARK, strict=True))
}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # after eight runs the colours come again with another line

STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.06,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names of runs and layers are no formulas
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # text stays text: it takes the page's font, and can be searched
}
CARD, WIDE = 6.0, 12.5  # inches; a picture is as wide as one column of the page, or as both


@dataclass(frozen=True)
class Picture:
    """A figure with what stands around it: `line` explains it in one sentence, `alt` says what it shows in words."""

    slug: str
    title: str
    line: str
    alt: str
    figure: Figure

    @property
    def wide(self) -> bool:
        return bool(self.figure.get_figwidth() > CARD)


def color(index: int) -> str:
    """The colour of the run at this place of the report."""
    return RUNS[index % len(RUNS)]


def dash(index: int) -> Any:
    """The line style of the run at this place."""
    return DASHES[index // len(RUNS) % len(DASHES)]


def panels(count: int, height: float, *, columns: int = 1, width: float = CARD) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes of this height (inches), filled row by row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, rows * height))
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def legend(figure: Figure, runs: Sequence[tuple[int, Run]], kind: str = "line") -> None:
    """The runs' names over the axes, where there is more than one; the figure grows by their rows."""
    if len(runs) < 2:
        return
    names = [short(run.label) for _, run in runs]
    marks = {"marker": "o", "linestyle": "none"} if kind == "dot" else {}
    handles = [Line2D([], [], color=color(i), **({"linestyle": dash(i)} | marks)) for i, _ in runs]
    columns = max(1, min(len(runs), int(figure.get_figwidth() * 12 / (max(map(len, names)) + 6))))
    figure.set_figheight(figure.get_figheight() + 0.18 * (-(-len(runs) // columns)))
    box = figure.legend(handles, ["x" * len(name) for name in names], loc="outside upper left", ncols=columns)
    for text, name in zip(box.get_texts(), names, strict=True):
        text.set_text(name)  # afterwards: matplotlib leaves out labels that begin with an underscore


def percent(value: float, _: float = 0) -> str:
    """A share as a tick label."""
    return f"{round(100 * value, 6):g} %"


def steps(ax: Axes, last: int, ticks: int = 6) -> None:
    """The horizontal axis of optimizer steps, from 0."""
    ax.set_xlim(-0.02 * last, 1.02 * last)
    ax.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def logarithmic(ax: Axes, unit: Callable[[float, float], str]) -> None:
    """The vertical axis on a logarithmic scale, with plain numbers."""
    low, high = ax.dataLim.intervaly
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    ax.yaxis.set_major_formatter(unit)
    ax.yaxis.set_minor_formatter(NullFormatter())


def short(text: str, most: int = 34) -> str:
    """Cut in the middle: the ends of the names of runs and layers tell them apart."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def tint(share: NDArray[np.floating[Any]], base: str = RUNS[0]) -> NDArray[np.float32]:
    """An RGBA picture of numbers in [0, 1] that is transparent at 0, and so fits a light and a dark page."""
    rgba = np.empty((*share.shape, 4), np.float32)
    rgba[..., :3] = [int(base[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    rgba[..., 3] = np.clip(share, 0, 1)
    return rgba


def image(ax: Axes, rgba: NDArray[np.float32], aspect: float | None = None) -> None:
    """Pixels with a thin frame and no ticks. `aspect`: height over width of the box; default: square pixels."""
    ax.imshow(rgba, interpolation="none", aspect="equal" if aspect is None else "auto")  # pixels are not resampled
    if aspect is not None:
        ax.set_box_aspect(aspect)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.patch.set_alpha(0)
    ax.spines[:].set(visible=True, color=LINE)


def _draw(figure: Figure, target: io.BytesIO | Path, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Gg]lyph .*missing")  # the browser's fonts have it
        figure.savefig(target, format=kind, dpi=160 if kind == "png" else 72, metadata=None if kind == "png" else _BARE)


_BARE = {"Date": None, "Creator": None, "Format": None, "Type": None}


def svg(picture: Picture) -> str:
    """The figure as inline SVG: no XML header, no ids that another picture could have, colours of the page's theme."""
    buffer = io.BytesIO()
    picture.figure.patch.set_alpha(0)
    for ax in picture.figure.axes:
        ax.patch.set_alpha(0)
    _draw(picture.figure, buffer, "svg")
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<\?.*?\?>", "", text, flags=re.S)
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', text, count=1)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{picture.slug}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{picture.slug}-", text)
    text = text.replace("xlink:href", "href")
    return re.sub(r' style="[^"]*"', _themed, text)


def _themed(style: re.Match[str]) -> str:
    return re.sub(r"#[0-9a-f]{6}", lambda m: f"var(--{THEME[m[0]][0]})" if m[0] in THEME else m[0], style[0])


def png(picture: Picture, path: Path) -> None:
    """The figure as a PNG of the light theme, with its title above it."""
    figure = picture.figure
    figure.patch.set_alpha(1)
    figure.set_figheight(figure.get_figheight() + 0.25)
    if figure.legends:  # the layout has one place at the top, which the legend has taken
        figure.legends[0].set_title(picture.title, FontProperties(size=11, weight="bold"))
        figure.legends[0].set_alignment("left")
    else:
        figure.suptitle(picture.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    _draw(figure, path, "png")
