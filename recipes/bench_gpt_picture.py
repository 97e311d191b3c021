"""Draws the table of `bench_gpt`: `python -m sparselearn.recipes.bench_gpt_picture gpt.csv`.

The picture lies beside the table, with the ending .png: validation loss over steps and over seconds, the mean over
seeds, and the range of the seeds where there are several. Of several learning rates each variant shows its best.
"""

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

Point = tuple[float, float, float, float, float]
"""Step, seconds, and mean, lowest and highest validation loss."""


def curves(table: list[dict[str, str]]) -> dict[str, list[Point]]:
    """Label -> points, in the table's order of variants. Places in a training are matched by their number: at equal
    seconds two seeds can differ by some steps."""
    trainings: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for row in table:
        trainings[row["variant"], row["lr"], row["seed"]].append(row)
    several = len({row["lr"] for row in table}) > 1
    found: dict[str, list[Point]] = {}
    for variant in dict.fromkeys(row["variant"] for row in table):
        rates = {
            lr: [rows for (v, r, _), rows in trainings.items() if (v, r) == (variant, lr)]
            for lr in dict.fromkeys(row["lr"] for row in table if row["variant"] == variant)
        }
        best = min(rates, key=lambda lr: statistics.mean(float(rows[-1]["val_loss"]) for rows in rates[lr]))
        points = []
        for rows in zip(*rates[best], strict=False):
            losses = [float(row["val_loss"]) for row in rows]
            step, seconds = (statistics.mean(float(row[key]) for row in rows) for key in ("step", "seconds"))
            points.append((step, seconds, statistics.mean(losses), min(losses), max(losses)))
        found[f"{variant}, rate {float(best):g}" if several else variant] = points
    return found


def draw(table: list[dict[str, str]], out: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from sparselearn.recipes import report_style as look

    lines = curves(table)
    with matplotlib.rc_context(look.STYLE):
        figure = Figure(figsize=(look.WIDE, 4.4))
        axes = figure.subplots(1, 2, sharey=True)
        for place, (ax, label) in enumerate(zip(axes, ("optimizer steps", "seconds of training"), strict=True)):
            for index, (name, points) in enumerate(lines.items()):
                shown = points[1:]  # the first is before training
                x = [point[place] for point in shown]
                style = {"color": look.color(index), "linestyle": look.dash(index)}
                ax.plot(x, [p[2] for p in shown], label=f"{name}: {points[-1][2]:.3f}", marker="o", **style)
                ax.fill_between(x, [p[3] for p in shown], [p[4] for p in shown], color=look.color(index), alpha=0.15)
            ax.set_xlabel(label)
        last = [points[-1][2] for points in lines.values()]
        second = [point[2] for points in lines.values() for point in points[1:3]]
        axes[0].set_ylim(min(last) - 0.05, max(second) + 0.05)
        axes[0].set_ylabel("validation loss, nats a byte")
        axes[1].legend(fontsize=8, title="variant: loss at the end", title_fontsize=8)
        row, seeds = table[0], len({r["seed"] for r in table})
        figure.suptitle(
            f"GPT of {row['depth']} layers on bytes of text, {int(row['batch']) * int(row['context']):,} bytes a step, "
            f"{seeds} seed{'s' if seeds > 1 else ''}, {row['gpu']}",
            x=0.01, ha="left", fontweight="bold",
        )  # fmt: skip
        figure.savefig(out, dpi=90, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(prog="python -m sparselearn.recipes.bench_gpt_picture", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("csv", type=Path)
    made.add_argument("--out", type=Path, help="PNG file to write")
    args = made.parse_args(arguments)
    with args.csv.open(newline="") as file:
        table = list(csv.DictReader(file))
    out = args.out or args.csv.with_suffix(".png")
    draw(table, out)
    for name, points in curves(table).items():
        step, seconds, mean, low, high = points[-1]
        print(f"{name:<28} {mean:.4f} ({low:.4f} to {high:.4f}) after {step:.0f} steps, {seconds:.1f} s")
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
