"""The sub-commands about checkpoints: inspect, verify, export, diff."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselearn.errors import SparsityError

if TYPE_CHECKING:
    from sparselearn.checkpoint.diff import WeightDiff
    from sparselearn.checkpoint.manifest import WeightInfo

EXPORT_FORMATS = ("safetensors", "huggingface", "sparse-bitmask", "sparse-24-bitmask")
PICTURES = (".png", ".pdf", ".svg")
LAYER_HEADER = ("weight", "encoding", "structure", "dtype", "shape", "nnz", "density", "stored", "of dense")
ENCODING_HEADER = ("encoding", "tensors", "nnz", "density", "stored", "of dense", "of file")
FEW_LABELS = 60  # layers whose names are legible beside the bars


def add_commands(subparsers: Any) -> None:
    """Add the sub-commands to what `ArgumentParser.add_subparsers()` returned; each sets `run(args) -> exit code`."""

    def add(name: str, help: str, run: Callable[[argparse.Namespace], int], example: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = subparsers.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example:\n  sparselearn {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
        parser.set_defaults(run=run)
        return parser

    inspect = add("inspect", "show weights and sizes of a sparse checkpoint", _inspect, "inspect runs/digits/sparse")
    inspect.add_argument("file", type=Path, metavar="FILE", help="the checkpoint")
    inspect.add_argument("--plot", type=Path, metavar="OUT.png", help="also draw density and size per matrix or filter")
    verify = add("verify", "check every byte of a sparse checkpoint", _verify, "verify runs/digits/sparse")
    verify.add_argument("file", type=Path, metavar="FILE", help="the checkpoint")
    export = add(
        "export",
        "write a checkpoint in a format that other programs read",
        _export,
        "export runs/bert/sparse bert-pruned --format huggingface --base bert-base",
    )
    export.add_argument("file", type=Path, metavar="FILE", help="a sparse or a legacy checkpoint")
    export.add_argument("out", type=Path, metavar="OUT", help="a file for safetensors, else a new folder")
    export.add_argument("--format", choices=EXPORT_FORMATS, default="safetensors", help="default: safetensors")
    export.add_argument("--base", type=Path, help="folder of the Hugging Face model that was pruned")
    compare = add("diff", "compare the masks and weights of two checkpoints", _diff, "diff runs/a/sparse runs/b/sparse")
    compare.add_argument("a", type=Path, metavar="A", help="a checkpoint, Hugging Face folder or safetensors file")
    compare.add_argument("b", type=Path, metavar="B", help="another of the same model")


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns: the first row is the header, the last one a total; the first `left` columns are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:-1], rule, lines[-1]))


def size(n: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def share(part: float | None) -> str:
    """A fraction as a table shows it: 1 only where nothing is missing."""
    if part is None:
        return "-"
    return f"{part:.6f}" if part in (0, 1) else f"{min(max(part, 1e-6), 1 - 1e-6):.6f}"


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON has neither nan nor infinity: they become the strings "nan" and "inf"."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _diff(args: argparse.Namespace) -> int:
    from sparselearn.checkpoint.diff import diff

    result = diff(args.a, args.b)
    if args.json:
        _print_json({"total": _diff_entry(result.total), "weights": [_diff_entry(w) for w in result.weights]})
        return 0
    header = ("weight", "shape", "kept a", "kept b", "jaccard", "kept", "bf16 equal", "fp32 equal", "max |a-b|")
    rows = [
        (
            weight.name,
            "x".join(map(str, weight.shape)) or (f"{weight.size:,}" if weight is result.total else "scalar"),
            f"{weight.kept_a:,}" if weight.jaccard is not None else "-",
            f"{weight.kept_b:,}" if weight.jaccard is not None else "-",
            share(weight.jaccard),
            share(weight.kept_fraction),
            share(weight.bf16_fraction),
            share(weight.fp32_fraction),
            f"{weight.max_abs:.3e}",
        )
        for weight in (*result.weights, result.total)
    ]
    print(table([header, *rows], left=2))
    print("jaccard: kept by both / by either; kept: part of a's weights that b keeps; equal: part with the same bits")
    return 0


def _diff_entry(weight: "WeightDiff") -> dict[str, Any]:
    fractions = ("jaccard", "kept_fraction", "bf16_fraction", "fp32_fraction")
    return asdict(weight) | {name: getattr(weight, name) for name in fractions}


def _export(args: argparse.Namespace) -> int:
    from sparselearn.checkpoint.export import export_dense, read_any
    from sparselearn.checkpoint.legacy import write_legacy

    if args.format in ("safetensors", "huggingface"):
        export_dense(args.file, args.out, format=args.format, base=args.base)
    else:
        write_legacy(*read_any(args.file), args.out, args.format, base=args.base)
    files = [args.out] if args.out.is_file() else sorted(args.out.iterdir())
    written = sum(path.stat().st_size for path in files)
    if args.json:
        _print_json({"out": str(args.out), "format": args.format, "bytes": written})
    else:
        print(f"{args.file} -> {args.out}, {args.format}, {size(written)}")
    return 0


@dataclass(frozen=True)
class _Row:
    """One tensor as the tables and the picture show it, or the sum of several."""

    name: str
    encoding: str
    structure: str
    dtype: str
    shape: tuple[int, ...]
    tensors: int
    size: int  # entries
    nnz: int
    stored: int  # bytes
    dense: int  # bytes

    @classmethod
    def of(cls, weight: "WeightInfo") -> "_Row":
        return cls(
            weight.name,
            weight.encoding,
            weight.structure,
            str(weight.dtype).removeprefix("torch."),
            weight.shape,
            1,
            weight.size,
            weight.nnz,
            weight.stored_bytes,
            weight.dense_bytes,
        )

    @classmethod
    def total(cls, name: str, rows: "Sequence[_Row]") -> "_Row":
        size, nnz, stored, dense = (
            sum(getattr(row, field) for row in rows) for field in ("size", "nnz", "stored", "dense")
        )
        return cls(name, "", "", "", (), len(rows), size, nnz, stored, dense)

    def cells(self) -> tuple[str, ...]:
        shape = "x".join(map(str, self.shape)) or (f"{self.size:,}" if self.tensors > 1 else "scalar")
        return (self.name, self.encoding, self.structure, self.dtype, shape, *self._numbers())

    def summary(self, all_stored: int) -> tuple[str, ...]:
        return (self.name, f"{self.tensors:,}", *self._numbers(), _ratio(self.stored, all_stored))

    def _numbers(self) -> tuple[str, ...]:
        return (f"{self.nnz:,}", _ratio(self.nnz, self.size), size(self.stored), _ratio(self.stored, self.dense))

    def entry(self) -> dict[str, Any]:
        return asdict(self) | {"density": self.nnz / self.size if self.size else None}


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.4f}" if whole else "-"


def _verify(args: argparse.Namespace) -> int:
    from sparselearn.checkpoint.api import inspect, verify

    verify(args.file)
    weights = inspect(args.file).weights
    if args.json:
        _print_json({"file": str(args.file), "ok": True, "weights": len(weights)})
    else:
        print(f"{args.file}: all {len(weights)} tensors are as they were saved")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from sparselearn.checkpoint.api import inspect

    weights = [_Row.of(weight) for weight in inspect(args.file).weights]
    if args.plot is not None:
        _plot([row for row in weights if len(row.shape) > 1], args.plot)
    encodings = [
        _Row.total(encoding, [row for row in weights if row.encoding == encoding])
        for encoding in sorted({row.encoding for row in weights})
    ]
    total = _Row.total("total", weights)
    if args.json:
        parts = {"encodings": encodings, "weights": weights}
        _print_json({"total": total.entry()} | {key: [row.entry() for row in rows] for key, rows in parts.items()})
        return 0
    print(table([LAYER_HEADER, *(row.cells() for row in (*weights, total))], left=5))
    print()
    print(table([ENCODING_HEADER, *(row.summary(total.stored) for row in (*encodings, total))]))
    return 0


def _plot(rows: "Sequence[_Row]", out: Path) -> None:
    """Two panels that share the layers: density, and stored bytes before the outline of the dense bytes."""
    if out.suffix not in PICTURES:
        raise SparsityError(f"`--plot` must end in one of {', '.join(PICTURES)}; got `{out}`.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SparsityError("`--plot` needs matplotlib, which is missing. Run `pip install matplotlib`.") from None

    figure = Figure(figsize=(11, min(max(2.5, 1.2 + 0.24 * len(rows)), 16)), layout="constrained")
    FigureCanvasAgg(figure)
    density, stored = figure.subplots(1, 2, sharey=True)
    positions = range(len(rows))
    density.barh(positions, [row.nnz / row.size if row.size else 0 for row in rows], color="#4477aa")
    density.set(xlim=(0, 1), xlabel="density (nnz / size)")
    kib = 1 / 1024
    stored.barh(positions, [row.dense * kib for row in rows], color="none", edgecolor="#999999", label="dense")
    stored.barh(positions, [row.stored * kib for row in rows], color="#4477aa", label="stored")
    stored.set(xlabel="KiB")
    stored.legend(loc="best", frameon=False)
    if len(rows) <= FEW_LABELS:
        density.set_yticks(positions, [row.name for row in rows], fontsize=7)
    else:
        density.set_ylabel("layer, in the order of the file")
    density.invert_yaxis()
    for axes in (density, stored):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
