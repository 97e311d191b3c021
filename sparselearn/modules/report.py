"""The decision table of a conversion."""

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from sparselearn.errors import SparsityError


@dataclass(frozen=True)
class Row:
    """One candidate for one layer, and what was decided. Times are medians of one forward pass over the example."""

    layer: str  # name of the module
    shape: str  # of the weight, as 3072x768
    density: float  # of the mask
    inputs: str  # shape of the layer's input on the example; more than one where it is called more than once
    candidate: str = ""  # class; empty where none was tried
    dense_us: float | None = None  # microseconds
    candidate_us: float | None = None
    speedup: float | None = None  # median of dense / candidate
    low: float | None = None  # 95 % confidence interval of that median
    high: float | None = None
    swapped: bool = False
    reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` decided. `str()` is the table."""

    rows: list[Row]
    torch_version: str = torch.__version__
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def swapped(self) -> list[str]:
        """Names of the layers that were swapped."""
        return [row.layer for row in self.rows if row.swapped]

    def __str__(self) -> str:
        head = ("layer", "shape", "density", "input", "candidate", "dense us", "us", "speed-up", "decision")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.insert(1, "-" * max(map(len, text)))
        text.append(f"{len(self.swapped)} layers swapped; torch {self.torch_version}, {self.threads} threads")
        return "\n".join(text)

    def save(self, path: str | Path) -> None:
        """Write the rows, by the file's ending, as .csv or .json."""
        path = check_table(path)
        rows = [asdict(row) | {"torch": self.torch_version, "threads": self.threads} for row in self.rows]
        if path.suffix == ".json":
            path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        else:
            with path.open("w", newline="", encoding="utf-8") as file:
                names = [f.name for f in fields(Row)]
                writer = csv.DictWriter(file, [*names, "torch", "threads"], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def check_table(path: str | Path) -> Path:
    """The path, or an error where its ending is no format of a table."""
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise SparsityError(f"`save_table` must end in .csv or .json; got {str(path)!r}.")
    return path


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "" if row.speedup is None else f"{row.speedup:.2f} ({row.low:.2f} to {row.high:.2f})"
    times = ("" if us is None else f"{us:.1f}" for us in (row.dense_us, row.candidate_us))
    decision = ("swapped" if row.swapped else "kept") + (f": {row.reason}" if row.reason else "")
    return (row.layer, row.shape, f"{row.density:.4f}", row.inputs, row.candidate, *times, ratio, decision)
