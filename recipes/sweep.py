"""A grid of runs of one recipe: finished cells are kept, interrupted ones go on, and a table and a picture come out."""

import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparselearn import config as configs
from sparselearn.errors import SparsityError
from sparselearn.recipes.train import LAST, train, write

COLUMNS = {
    "test_accuracy": "test accuracy",
    "sparsity": "sparsity",
    "nnz": "nonzero parameters",
    "training_flops": "training FLOPs / dense",
    "seconds": "seconds",
}


def cells(grid: dict[str, list[str]]) -> list[dict[str, str]]:
    """All combinations of the grid's values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def folder_of(out: Path, cell: dict[str, str]) -> Path:
    """The cell's own folder, named by its values."""
    name = ",".join(f"{key}={value}" for key, value in cell.items()).replace("/", "_")
    return out / (name or "run")


def sweep(
    source: str, grid: dict[str, list[str]], out: str | Path, *, jobs: int = 1, progress: bool = True
) -> list[dict[str, Any]]:
    """Run every cell that is not finished yet, then write results.csv, results.md and results.png.

    Args:
        grid: key -> values; a key with one value is the same in all cells.
        jobs: runs at a time, each in a process of its own when more than one.

    Raises:
        SparsityError: any cell's configuration is wrong, or its folder holds another run (nothing is trained then); a
            run failed.
    """
    out = Path(out)
    wanted = cells(grid)
    resolved = [configs.load(source, [f"{k}={v}" for k, v in cell.items()]) for cell in wanted]
    todo = []
    for cell, config in zip(wanted, resolved, strict=True):
        folder = folder_of(out, cell)
        recorded = folder / "config.yaml"
        same = recorded.exists() and recorded.read_text() == configs.to_yaml(config)
        if recorded.exists() and not same:
            raise SparsityError(
                f"`{folder}` holds a run with another configuration (see its config.yaml). Choose another --out."
            )
        if not (same and (folder / "result.json").exists()):
            todo.append((cell, config, folder, same and (folder / LAST).exists()))
    if jobs > 1:
        with ThreadPoolExecutor(jobs) as pool:
            threads = str(max(1, (os.cpu_count() or 1) // jobs))  # else the runs fight for the cores
            list(pool.map(lambda item: _in_process(source, item[0], item[2], item[3], threads), todo))
    else:
        for cell, config, folder, started in todo:
            if progress:
                print(f"== {', '.join(f'{k}={v}' for k, v in cell.items())}", flush=True)
            if train(config, folder, resume=started, progress=progress).get("interrupted"):
                raise KeyboardInterrupt
    results = [json.loads((folder_of(out, cell) / "result.json").read_text()) | {"cell": cell} for cell in wanted]
    _write_tables(results, grid, out)
    return results


def _in_process(source: str, cell: dict[str, str], folder: Path, started: bool, threads: str) -> None:
    command = [sys.executable, "-m", "sparselearn.cli", "train", source, *[f"{k}={v}" for k, v in cell.items()]]
    command += ["--out", str(folder), "--quiet", *(["--resume"] if started else [])]
    print(f"== {folder.name}", flush=True)
    done = subprocess.run(
        command, check=False, env={**os.environ, "OMP_NUM_THREADS": threads}, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise SparsityError(f"The run `{folder.name}` failed (exit code {done.returncode}): {last}")


def summarise(results: list[dict[str, Any]], keys: list[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, one row per combination of the other keys."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results:
        groups.setdefault(tuple(row["cell"].get(k, row.get(k)) for k in keys), []).append(row)
    summary = []
    for values, rows in groups.items():
        diverged = sum(row["diverged"] for row in rows)
        line: dict[str, Any] = {"keys": values, "n": len(rows), "diverged": diverged}
        for column in COLUMNS:
            numbers = [float(row[column]) for row in rows]
            line[column] = statistics.mean(numbers)
            line[f"{column}_sd"] = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        summary.append(line)
    return summary


def _cell(line: dict[str, Any], column: str) -> str:
    value, deviation = line[column], line[f"{column}_sd"]
    if column == "test_accuracy" and line["diverged"]:
        return f"{line['diverged']} of {line['n']} diverged"
    if column == "test_accuracy":
        return f"{100 * value:.2f} ± {100 * deviation:.2f} %" if line["n"] > 1 else f"{100 * value:.2f} %"
    if column == "sparsity":
        return f"{100 * value:.3f} %"
    return {"nnz": f"{value:,.0f}", "training_flops": f"{value:.3f}"}.get(column, f"{value:.0f}")


def _write_tables(results: list[dict[str, Any]], grid: dict[str, list[str]], out: Path) -> None:
    varied = [key for key, values in grid.items() if len(values) > 1 and key != "seed"] or ["variant"]
    summary = summarise(results, varied)
    with (out / "results.csv").open("w", newline="") as file:
        rows = [{f"set {k}": v for k, v in row["cell"].items()} | row for row in results]
        writer = csv.DictWriter(file, [key for key in rows[0] if key != "cell"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    header = [*varied, "n", *COLUMNS.values()]
    texts = [[*map(str, line["keys"]), str(line["n"]), *(_cell(line, c) for c in COLUMNS)] for line in summary]
    first = results[0]
    caption = (
        f"Mean ± standard deviation over n seeds; {first['recipe']}, {first['steps']} optimizer steps, "
        f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}."
    )
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in texts]
    write(out / "results.md", "\n".join([*lines, "", caption, ""]))
    table = Table(*header, title=str(first["recipe"]))
    for row in texts:
        table.add_row(*row)
    Console().print(table)
    _draw(summary, str(first["recipe"]), out / "results.png")
    print(f"Table: {out / 'results.md'}   Picture: {out / 'results.png'}")


def _draw(summary: list[dict[str, Any]], title: str, path: Path) -> None:
    """Accuracy and training cost of every row, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [", ".join(map(str, line["keys"])) for line in summary]
    accuracy = [100 * line["test_accuracy"] for line in summary]
    deviation = [100 * line["test_accuracy_sd"] for line in summary]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.6 + 0.4 * len(names)), sharey=True)
    left.errorbar(accuracy, range(len(names)), xerr=deviation, fmt="o", capsize=4)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("test accuracy, % (bars: standard deviation over seeds)")
    left.grid(axis="x", alpha=0.3)
    bars = right.barh(range(len(names)), [line["training_flops"] for line in summary], color="tab:gray")
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.set_xlim(0, 1.15)
    right.set_xlabel("training FLOPs / dense")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
