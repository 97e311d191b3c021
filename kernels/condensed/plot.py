"""Draws the table of `bench`: `python -m sparselearn.kernels.condensed.plot kernels/results/condensed-cpu.csv`.

The picture lies beside the table, with the ending .png: how many times faster than dense each method is, median over
the layers, for every batch size; a panel for each sparsity, one thread.
"""

import argparse
import csv
import statistics
from importlib import import_module
from pathlib import Path

LINES = {  # method: (label, colour, style)
    "condensed_by_feature": ("condensed, activations by feature", "#1b6ca8", "--"),
    "condensed": ("condensed", "#1b6ca8", "-"),
    "shared": ("condensed, four neurons share their inputs", "#1e8449", "-"),
    "condensed_without_numba": ("condensed without numba", "#7fb3d5", "-"),
    "csr32": ("torch CSR, int32 indices, input transposed for free", "#c0392b", "-"),
    "csr64": ("torch CSR as F.linear takes it (int64)", "#e59866", "-"),
    "scipy": ("scipy CSR", "#909497", "-"),
}


def medians(table: list[dict[str, str]], sparsity: str, method: str) -> dict[int, float]:
    """Batch -> times faster than dense with one thread, median over the layers."""
    rows = [r for r in table if (r["sparsity"], r["method"], r["threads"]) == (sparsity, method, "1")]
    return {
        batch: statistics.median(float(r["over_dense"]) for r in rows if int(r["batch"]) == batch)
        for batch in sorted({int(r["batch"]) for r in rows})
    }


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(prog="python -m sparselearn.kernels.condensed.plot", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("csv", type=Path)
    path: Path = made.parse_args(arguments).csv
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    sparsities = sorted({r["sparsity"] for r in table}, key=float)
    figure, axes = pyplot.subplots(
        1, len(sparsities), figsize=(4.6 * len(sparsities), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, sparsity in zip(axes[0], sparsities, strict=True):
        for method, (label, colour, style) in LINES.items():
            if points := medians(table, sparsity, method):
                axis.plot(list(points), list(points.values()), style, color=colour, label=label, marker="o", ms=4)
        batches = sorted({int(r["batch"]) for r in table})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(batches, [str(b) for b in batches])
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
        axis.axhline(1, color="black", lw=0.8)
        axis.grid(alpha=0.3)
        axis.set_title(f"{float(sparsity):.0%} zeros")
        axis.set_xlabel("rows of the input (batch)")
    axes[0][0].set_ylabel("times faster than dense, one thread")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    layers = len({(r["in_features"], r["out_features"]) for r in table})
    figure.suptitle(f"median over {layers} layers, {table[0]['cpu'].split(' (')[0]}", fontsize=9)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=90, metadata={"Software": None})
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
