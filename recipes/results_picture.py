"""One picture of a results table: a measure over a setting, a line for each variant, bars for the spread of seeds."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from sparselearn.recipes import table
from sparselearn.recipes.table import Row

DIGEST = "Source"  # the PNG's text field with the hash of what was drawn


@dataclass(frozen=True)
class Curves:
    """What is drawn: `lines` maps a name to [(x, mean, standard deviation), ...], in the measure's own unit.

    x is a number, or a word where the setting has words. A line with the one point x = 0, the dense network's among
    several sparsities, is drawn as a level.
    """

    lines: dict[str, list[tuple[float | str, float, float]]]
    xlabel: str
    ylabel: str
    alt: str = ""
    log: bool = False

    @classmethod
    def of(cls, rows: Sequence[Row], spec: Mapping[str, Any]) -> "Curves":
        """The mean of measure `y` by the values of `x`, for each combination of the keys in `lines`."""
        heading, factor, _ = table.MEASURES[spec["y"]]
        lines: dict[str, list[tuple[float | str, float, float]]] = {}
        for group in table.group(rows, [spec["x"], *spec["lines"]]):
            if group.diverged or not group.numbers(spec["y"]):
                continue
            x, *names = group.keys
            labels = [_label(key, name) for key, name in zip(spec["lines"], names, strict=True)]
            place = lines.setdefault(", ".join(filter(None, labels)) or heading, [])
            place.append((number(x), factor * group.mean(spec["y"]), factor * group.deviation(spec["y"])))
        if all(isinstance(x, float) for points in lines.values() for x, *_ in points):
            lines = {name: sorted(points) for name, points in lines.items()}
        xlabel = table.HEADINGS.get(spec["x"], spec["x"])
        return cls(lines, xlabel, heading, spec.get("alt", ""), bool(spec.get("log", False)))

    def digest(self) -> str:
        """Equal numbers and names have equal digests."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def number(text: str) -> float | str:
    """The text as a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _label(key: str, value: str) -> str:
    """A truth value and a bare number need their key beside them, a name does not."""
    key = table.HEADINGS.get(key, key)
    if value in ("True", "False"):
        return key if value == "True" else ""
    return f"{key} {value}" if value and isinstance(number(value), float) else value


def drawn(path: Path) -> str:
    """The digest of what a picture shows; empty where it is not there or not ours."""
    from PIL import Image

    if not path.is_file():
        return ""
    with Image.open(path) as picture:
        return str(picture.info.get(DIGEST, ""))


def draw(panels: Sequence[Curves], title: str, path: Path) -> None:
    """Write the PNG, one panel beside the other, unless it shows the same numbers already."""
    digest = " ".join(curves.digest() for curves in panels)
    if drawn(path) == digest:
        return
    import matplotlib
    from matplotlib.figure import Figure

    from sparselearn.recipes import report_style as look

    with matplotlib.rc_context(look.STYLE):
        figure = Figure(figsize=(2.2 + 5.0 * len(panels), 4.0))
        for place, curves in enumerate(panels):
            ax = figure.add_subplot(1, len(panels), place + 1)
            if any(isinstance(x, str) for points in curves.lines.values() for x, *_ in points):
                _words(ax, curves)
            else:
                _lines(ax, curves)
            if place == 0 and len(curves.lines) > 1:
                ax.legend(fontsize=8)
        figure.suptitle(fill(title, 75), x=0.01, ha="left", fontweight="bold")
        figure.savefig(path, dpi=100, metadata={DIGEST: digest})


def _lines(ax: Any, curves: Curves) -> None:
    """The measure over a number; a level for a line whose one point is at 0."""
    from sparselearn.recipes import report_style as look

    for index, (name, points) in enumerate(curves.lines.items()):
        style: dict[str, Any] = {"color": look.color(index), "label": name, "linestyle": look.dash(index)}
        if [p[0] for p in points] == [0]:
            ax.axhline(points[0][1], **style | {"linestyle": "--", "linewidth": 1.2})
        else:
            x, mean, deviation = zip(*points, strict=True)
            ax.errorbar(x, mean, deviation, fmt="o", capsize=3, **style)
    if curves.log:
        ax.set_xscale("log")
    ticks = sorted({p[0] for points in curves.lines.values() for p in points} - {0})
    if len(ticks) <= 10:  # settings, each with its own; a measure that varies keeps matplotlib's
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    ax.set(xlabel=curves.xlabel, ylabel=curves.ylabel)


def _words(ax: Any, curves: Curves) -> None:
    """The measure of each word, one below the other."""
    from sparselearn.recipes import report_style as look

    words = list(dict.fromkeys(str(x) for points in curves.lines.values() for x, *_ in points))
    for index, (name, points) in enumerate(curves.lines.items()):
        y = [words.index(str(p[0])) for p in points]
        mean, deviation = [p[1] for p in points], [p[2] for p in points]
        ax.errorbar(mean, y, xerr=deviation, fmt="o", capsize=3, color=look.color(index), label=name)
    ax.set_yticks(range(len(words)), words)
    ax.margins(x=0.1, y=0.15)
    ax.invert_yaxis()
    ax.set(xlabel=curves.ylabel)
