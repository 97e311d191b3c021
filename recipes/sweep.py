"""A grid of runs of one recipe: finished cells are kept, interrupted ones go on, and a table and a picture come out."""

import csv
import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sparselearn import config as configs
from sparselearn.config import Config
from sparselearn.errors import SparsityError
from sparselearn.recipes import table
from sparselearn.recipes.callbacks import LAST
from sparselearn.recipes.results_picture import Curves, draw, number
from sparselearn.recipes.table import Row
from sparselearn.recipes.train import train, write

MEASURES = ["test_accuracy", "test_loss", "sparsity", "nnz", "training_flops", "seconds"]
PICTURED = ["test_accuracy", "test_loss", "training_flops"]
LONGEST = 200  # bytes of a folder's name; file systems allow 255
OF_SPARSITY = ("variant", "sparsity", "distribution", "select", "exclude", "overrides", "init", "density_scaling")


STATES = ("finished", "started", "new")


class _Run(NamedTuple):
    """A cell, where it is trained, and how far that is: one of STATES."""

    cell: dict[str, str]
    config: Config
    folder: Path
    state: str


def cells(grid: dict[str, list[str]]) -> list[dict[str, str]]:
    """All combinations of the grid's values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def folder_of(out: Path, cell: dict[str, str]) -> Path:
    """The cell's own folder, named by its values; a name that file systems would refuse ends in a digest of them."""
    name = ",".join(f"{key}={value}" for key, value in cell.items()).replace("/", "_")
    if len(whole := name.encode()) > LONGEST:
        name = whole[: LONGEST - 17].decode(errors="ignore") + "-" + hashlib.sha256(whole).hexdigest()[:16]
    return out / (name or "run")


def sweep(
    source: str, grid: dict[str, list[str]], out: str | Path, *, jobs: int = 1, progress: bool = True
) -> list[dict[str, Any]]:
    """Run every cell that is not finished yet, then write results.csv, results.md and results.png.

    Where a run fails, or all are interrupted, the files hold the cells that are finished.

    Cells that are the same run, such as the dense network at several sparsities, are trained once.

    Args:
        grid: key -> values; a key with one value is the same in all cells; `seeds` is `seed`.
        jobs: runs at a time, each in a process of its own when more than one; spread over the GPUs that
            CUDA_VISIBLE_DEVICES names, or over all. Runs on several devices see all of them.

    Returns:
        One mapping a cell: result.json, and under `cell` what was set for it.

    Raises:
        SparsityError: any cell's configuration is wrong, or its folder holds another run (nothing is trained then); a
            run failed.
    """
    out = Path(out)
    grid = {"seed" if key == "seeds" else key: values for key, values in grid.items()}
    wanted = cells(grid)
    resolved = [configs.load(source, [f"{k}={v}" for k, v in cell.items()]) for cell in wanted]
    runs: dict[str, list[_Run]] = {}  # by what is trained
    for cell, config in zip(wanted, resolved, strict=True):
        folder = folder_of(out, cell)
        runs.setdefault(_identity(config), []).append(_Run(cell, config, folder, _state(folder, config)))
    chosen = {key: min(equal, key=lambda run: STATES.index(run.state)) for key, equal in runs.items()}
    files = [chosen[_identity(config)].folder / "result.json" for config in resolved]
    try:
        _train_all(source, [run for run in chosen.values() if run.state != "finished"], jobs, progress)
    finally:
        results = [
            json.loads(file.read_text()) | {"cell": cell}
            for cell, file in zip(wanted, files, strict=True)
            if file.exists()
        ]
        if results:
            _write(results, source, grid, out)
    return results


def _train_all(source: str, todo: Sequence[_Run], jobs: int, progress: bool) -> None:
    if jobs > 1:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}  # else the runs fight for the cores
        gpus: list[str | None] = [*_gpus()] or [None]
        places: SimpleQueue[str | None] = SimpleQueue()
        for job in range(jobs):
            places.put(gpus[job % len(gpus)])

        def start(run: _Run) -> None:
            gpu = places.get()
            try:
                one = {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None and run.config.devices == 1 else {}
                _in_process(source, run, threads | one)
            finally:
                places.put(gpu)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(start, todo))
        return
    for run in todo:
        if progress:
            print(f"== {', '.join(f'{k}={v}' for k, v in run.cell.items())}", flush=True)
        if train(run.config, run.folder, resume=run.state == "started", progress=progress).get("interrupted"):
            raise KeyboardInterrupt


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _identity(config: Config) -> str:
    """Equal for cells that train the same network in the same way: without a method no setting of sparsity counts."""
    ignored = OF_SPARSITY if config.method is None else ()
    return str({key: value for key, value in asdict(config).items() if key not in ignored})


def _state(folder: Path, config: Config) -> str:
    """`finished`, `started` (there is a checkpoint) or `new`."""
    recorded = folder / "config.yaml"
    if not recorded.exists():
        return "new"
    if recorded.read_text() != configs.to_yaml(config):
        raise SparsityError(
            f"`{folder}` holds a run with another configuration (see its config.yaml). Choose another --out."
        )
    if (folder / "result.json").exists():
        return "finished"
    return "started" if (folder / LAST).exists() else "new"


def _in_process(source: str, run: _Run, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "sparselearn.cli", "train", source, *[f"{k}={v}" for k, v in run.cell.items()]]
    command += ["--out", str(run.folder), "--quiet", *(["--resume"] if run.state == "started" else [])]
    print(f"== {run.folder.name}\n", end="", flush=True)  # in one piece: other threads print, too
    done = subprocess.run(command, check=False, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise SparsityError(f"The run `{run.folder.name}` failed (exit code {done.returncode}): {last}")


def _write(results: list[dict[str, Any]], source: str, grid: dict[str, list[str]], out: Path) -> None:
    """results.csv with a line for each cell, and the table and the picture of it."""
    lines = [{f"set {k}": v for k, v in row["cell"].items()} | row for row in results]
    with (out / "results.csv.tmp").open("w", newline="") as file:
        names = list(dict.fromkeys(key for line in lines for key in line if key != "cell"))
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    (out / "results.csv.tmp").replace(out / "results.csv")
    rows = table.read(out / "results.csv")
    varied = [key for key, values in grid.items() if len(values) > 1 and key != "seed"] or ["variant"]
    groups = table.group(rows, varied)
    command = "sparselearn sweep " + shlex.join([source, *(f"{k}={','.join(v)}" for k, v in grid.items())])
    steps = " or ".join(map(str, sorted({int(row["steps"]) for row in results})))
    missing = len(cells(grid)) - len(results)
    caption = f"{missing} of {len(cells(grid))} cells are not finished. " if missing else ""
    caption += (
        f"Mean ± standard deviation over n seeds; {results[0]['recipe']}, {steps} optimizer steps, "
        f"{table.made_with(rows)}.\n\n    {command}"
    )
    lines_of_text = table.markdown(groups, varied, [m for m in MEASURES if m not in varied])
    write(out / "results.md", "\n".join([*lines_of_text, "", caption, ""]))
    _show(lines_of_text, str(results[0]["recipe"]))
    draw([Curves.of(rows, _axes(rows, varied) | {"y": y}) for y in PICTURED], results[0]["recipe"], out / "results.png")
    print(f"Table: {out / 'results.md'}   Picture: {out / 'results.png'}")


def _axes(rows: Sequence[Row], varied: list[str]) -> dict[str, Any]:
    """What lies on the x axis: the first of the varied keys that is a number in every run, or else the first."""
    numbers = [key for key in varied if all(isinstance(number(row.get(key)), float) for row in rows)]
    x = (numbers or varied)[0]
    return {"x": x, "lines": [key for key in varied if key != x]}


def _show(lines: list[str], title: str) -> None:
    """The Markdown table on the terminal."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    shown = Table(*header, title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
