"""The picture of the table that `bench` writes."""

import csv
from importlib import import_module
from pathlib import Path


def plot(path: Path) -> Path:
    """Speed-up over tokens for each sparsity and V, from the rows of `grid`; a picture beside the table."""
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")

    with path.open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["section"] == "grid" and r["method"] == "layer"]
    sparsities = sorted({r["sparsity"] for r in rows})
    figure, axes = pyplot.subplots(1, max(len(sparsities), 1), figsize=(4.5 * max(len(sparsities), 1), 4), sharey=True,
                                   squeeze=False)  # fmt: skip
    for axis, sparsity in zip(axes[0], sparsities, strict=True):
        for group in sorted({int(r["group"]) for r in rows}):
            cells = sorted((int(r["tokens"]), float(r["speedup"])) for r in rows
                           if r["sparsity"] == sparsity and int(r["group"]) == group)  # fmt: skip
            axis.plot([t for t, _ in cells], [s for _, s in cells], marker="o", label=f"V = {group}")
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{float(sparsity):.1%} sparse")
        axis.axhspan(0.1, 1, color="0.93", zorder=0)  # slower than dense
        tokens = sorted({int(r["tokens"]) for r in rows})
        axis.set_xticks(tokens, [str(t) for t in tokens])
        axis.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
        axis.set_ylim(0.45, 4.6)
        axis.minorticks_off()
    axes[0][0].set_ylabel("speed-up over dense (cuBLAS)")
    axes[0][0].legend(ncols=2, fontsize="small")
    figure.suptitle(f"A layer of 4096 x 4096, bfloat16, {rows[0]['gpu'] if rows else ''}; shaded: slower than dense")
    figure.tight_layout()
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=150)
    return out
