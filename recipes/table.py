"""Tables of runs: rows of a results CSV, their mean ± standard deviation over seeds, and Markdown.

Both `sparselearn sweep` and RESULTS.md are made with these, so a number is computed and rounded in one place.
"""

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselearn.errors import SparsityError

# Key of a result, its heading, and (factor, decimals) of the text; a spread is shown where several seeds may differ.
MEASURES: dict[str, tuple[str, float, int]] = {
    "test_accuracy": ("test accuracy, %", 100, 2),
    "test_loss": ("test loss", 1, 3),
    "sparsity": ("sparsity, %", 100, 3),
    "nnz": ("nonzero parameters", 1, 0),
    "size_mb": ("size, MB", 1, 3),
    "training_flops": ("training FLOPs / dense", 1, 3),
    "inference_flops": ("inference FLOPs / dense", 1, 3),
    "parameter_mb": ("parameters, MB", 1, 1),
    "optimizer_mb": ("optimizer state, MB", 1, 1),
    "gpu_mb": ("peak GPU memory, MB", 1, 0),
    "examples_per_second": ("examples / s", 1, 0),
    "seconds": ("seconds", 1, 0),
}
SPREAD = ("test_accuracy", "test_loss", "examples_per_second")
HEADINGS = {"learning_rate": "learning rate", "optimizer.lr": "learning rate", "density_scaling": "density scaling",
            "drop_fraction": "drop fraction", "method.drop_fraction": "drop fraction", "method.every": "every",
            "method.stop": "stop", "skip_step": "skip step"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run: what was set for it, and what came out (result.json's keys)."""

    settings: Mapping[str, str]
    values: Mapping[str, Any]

    def get(self, key: str) -> str:
        """A setting, or else a value, as the text that groups are made by."""
        return plain(self.settings.get(key, self.values.get(key, "")))

    @property
    def failed(self) -> bool:
        return bool(self.values.get("error"))


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds."""

    keys: tuple[str, ...]
    rows: list[Row] = field(repr=False)

    @property
    def diverged(self) -> int:
        return sum(str(row.values.get("diverged")) == "True" for row in self.rows)

    def numbers(self, measure: str) -> list[float]:
        """The measure of every run that has it."""
        return [float(v) for row in self.rows if (v := row.values.get(measure)) not in (None, "")]

    def mean(self, measure: str) -> float:
        """NaN where no run has it."""
        numbers = self.numbers(measure)
        return statistics.mean(numbers) if numbers else math.nan

    def deviation(self, measure: str) -> float:
        """The sample standard deviation over the runs; 0 for a single one."""
        numbers = self.numbers(measure)
        return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def plain(value: object) -> str:
    """Numbers in their shortest form, so that a setting equals itself however it was written.

    >>> plain("0.90"), plain(0.9), plain("rigl"), plain("True")
    ('0.9', '0.9', 'rigl', 'True')
    """
    text = "" if value is None else str(value).strip()
    try:
        return f"{float(text):.10g}"
    except ValueError:
        return {"true": "True", "false": "False"}.get(text, text)


def read(path: Path) -> list[Row]:
    """The runs of a CSV file, one a line, with a header.

    Columns are those of result.json. Settings have columns of their own named `set KEY` (as `sparselearn sweep` writes
    them), or stand in one column `cell` as `RECIPE key=value ...`. A row with a text in `error` is a run that failed.

    Raises:
        SparsityError: no such file, no rows, or a row that is shorter or longer than the header.
    """
    if not path.is_file():
        raise SparsityError(f"There is no results file `{path}`. A `csv:` entry must name one that lies beside it.")
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    if not records:
        raise SparsityError(f"`{path}` has no rows. It must hold a header and one line for each run.")
    rows = []
    for line, record in enumerate(records, 2):
        if None in record or None in record.values():
            raise SparsityError(f"`{path}` line {line} has not as many values as the header. Write the file again.")
        settings = {key.removeprefix("set "): value for key, value in record.items() if key.startswith("set ")}
        settings |= dict(word.split("=", 1) for word in record.get("cell", "").split()[1:])
        values = {key: value for key, value in record.items() if key != "cell" and not key.startswith("set ")}
        rows.append(Row(settings, values))
    return rows


def group(rows: Sequence[Row], by: Sequence[str]) -> list[Group]:
    """The finished runs by the values of some keys, in the order of their first appearance.

    A run that stands in several lines, as the dense one does in a sweep over sparsities, counts once in a group.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        members = groups.setdefault(tuple(row.get(key) for key in by), []) if not row.failed else None
        if members is not None and not any(row.values == other.values for other in members):
            members.append(row)
    return [Group(keys, members) for keys, members in groups.items()]


def text(found: Group, measure: str) -> str:
    """Mean ± standard deviation of one measure, or what keeps it from being one."""
    if measure in ("test_accuracy", "test_loss") and found.diverged:
        return f"{found.diverged} of {len(found.rows)} diverged"
    numbers = found.numbers(measure)
    if not numbers:
        return "–"
    _, factor, decimals = MEASURES[measure]
    mean = f"{factor * found.mean(measure):,.{decimals}f}"
    if measure not in SPREAD or len(numbers) < 2:
        return mean
    return f"{mean} ± {factor * found.deviation(measure):,.{decimals}f}"


def markdown(
    groups: Sequence[Group],
    by: Sequence[str],
    measures: Sequence[str],
    more: Mapping[str, Callable[[Group], str]] | None = None,
) -> list[str]:
    """The lines of a table: the keys, n, the measures, then further columns by their headings."""
    more = more or {}
    header = [*(HEADINGS.get(key, key) for key in by), "n", *(MEASURES[m][0] for m in measures), *more]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for found in groups:
        cells = [
            *found.keys,
            str(len(found.rows)),
            *(text(found, m) for m in measures),
            *(f(found) for f in more.values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def made_with(rows: Sequence[Row]) -> str:
    """Hardware, versions and commits of the runs, each value once.

    >>> made_with([Row({}, {"hardware": "a GPU", "torch": "2.11", "commit": c}) for c in ("a1", "b2", "a1")])
    'a GPU, torch 2.11, commits a1, b2'
    """
    seen = {key: list(dict.fromkeys(v for row in rows if (v := row.values.get(key)))) for key in _WITH}
    parts = [
        (f"{name}s " if name == "commit" and len(values) > 1 else f"{name} " if name else "") + ", ".join(values)
        for (key, name) in _WITH.items()
        if (values := seen[key])
    ]
    return ", ".join(parts)


_WITH = {"hardware": "", "torch": "torch", "commit": "commit"}
