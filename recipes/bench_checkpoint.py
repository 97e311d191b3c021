"""How small and how fast sparse checkpoints are, beside other ways to store the same model.

    python -m sparselearn.recipes.bench_checkpoint sizes --out kernels/results/checkpoint-sizes.csv
    python -m sparselearn.recipes.bench_checkpoint speed --out kernels/results/checkpoint-speed.csv

`sizes` stores torchvision's ResNet-50 (random masks at 80, 90 and 95 %, every convolution and matrix alike; 2:4 but for
the first convolution, which has 3 channels) in bfloat16 and float32, and counts the bytes of all files.

`speed` stores and loads a transformer of 1 GB (matrices of 1024 x 1024 and 1024 x 4096) as a sparse checkpoint and as
plain safetensors of the dense model. Each dtype and pattern is a process of its own, whose rows are written when it
ends (in the place of older ones); `--dtypes` and `--patterns` choose some. In it the tasks take turns, every second
time in the opposite order, so that both sides see the same machine. Times are of the call alone:

    save_*     `save` includes all hashes and fsync, so plain files are timed with fsync and without
    load_*     the numbers end in the parameters of a model that exists
    layers_*   the same, layer by layer
    map_plain  plain tensors take the place of the parameters (`assign=True`): nothing is read before it is used

`load` and `verify` check the sparse files to the last byte; plain ones are not checked at all, but for
`load_plain_checked`, which takes the file's SHA-256 before. Files are loaded from the page cache ("warm") and from the
disk ("cold": their pages are dropped before; TMPDIR must be on a disk). `of_plain` compares with save_plain_fsync,
load_plain or layers_plain. Memory is what the process takes at most (VmHWM) beyond what it had before the call; pages
of mapped files count, though the system may take them back, and weights that the model already has do not.
"""

import argparse
import csv
import ctypes
import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

import sparselearn as sl
from sparselearn.checkpoint import iterate, load, save, verify
from sparselearn.checkpoint.legacy import write_legacy
from sparselearn.kernels.timing import commit

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PATTERNS: dict[str, tuple[sl.Structure, float | None]] = {
    "80 %": (sl.Unstructured(), 0.8),
    "90 %": (sl.Unstructured(), 0.9),
    "95 %": (sl.Unstructured(), 0.95),
    "2:4": (sl.NM(2, 4), None),
}
State = dict[str, Tensor]
Row = dict[str, Any]
Runs = dict[str, list[dict[str, float]]]


def machine() -> dict[str, str]:
    """What every row of a table says of where it was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"cpu": f"{cpu}, {os.cpu_count()} cores"} | versions | {"commit": commit()}


def write(rows: list[Row], out: Path | None, keys: tuple[str, ...] = ()) -> None:
    """As a table on the screen, and as CSV where a file is named; there, rows with other `keys` stay."""
    for row in rows:
        print("  ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    if out is None:
        return
    older: list[dict[str, str]] = []
    if keys and out.exists():
        new = {tuple(str(row[key]) for key in keys) for row in rows}
        with out.open(newline="") as file:
            older = [row for row in csv.DictReader(file) if tuple(row[key] for key in keys) not in new]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine()], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*older, *(row | machine() for row in rows)])


# ---- sizes -----------------------------------------------------------------------------------------------------------


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def as_matrix(weight: Tensor) -> Tensor:
    """[out, in, ...] -> [out * ..., in]: groups along the inputs become groups along rows."""
    return weight.movedim(1, -1).reshape(-1, weight.shape[1])


def in_formats(state: State, masks: State, folder: Path) -> Iterator[tuple[str, Path]]:
    """The model in each format: its name and path."""
    save(state, folder / "sparse", masks=masks)
    yield "sparselearn", folder / "sparse"
    dense = folder / "dense.safetensors"
    safetensors.torch.save_file(state, dense)
    yield "plain safetensors", dense
    with zipfile.ZipFile(folder / "dense.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(dense)
    yield "plain safetensors, zipped (deflate 6)", folder / "dense.zip"
    for index in (torch.int64, torch.int32):
        compressed = {name: csr(tensor, index) if name in masks else tensor for name, tensor in state.items()}
        torch.save(compressed, folder / "csr.pt")
        yield f"torch.save of CSR, {str(index).removeprefix('torch.')}", folder / "csr.pt"
    flat = {name: as_matrix(tensor) if name in masks else tensor for name, tensor in state.items()}
    flat_masks = {name: as_matrix(mask) for name, mask in masks.items()}
    write_legacy(flat, flat_masks, folder / "bitmask")
    yield "legacy sparse-bitmask, of matrices", folder / "bitmask"
    if all(mask.shape[1] % 4 == 0 and bool((mask.view(-1, 4).sum(1) == 2).all()) for mask in flat_masks.values()):
        write_legacy(flat, flat_masks, folder / "24", "sparse-24-bitmask")
        yield "legacy sparse-24-bitmask, of matrices", folder / "24"


def csr(weight: Tensor, index: torch.dtype) -> Tensor:
    """As a matrix [out, in * ...] in torch's CSR layout."""
    sparse = weight.reshape(len(weight), -1).to_sparse_csr()
    indices = sparse.crow_indices().to(index), sparse.col_indices().to(index)
    return torch.sparse_csr_tensor(*indices, sparse.values(), sparse.shape, check_invariants=True)


def resnet50(structure: sl.Structure, sparsity: float | None) -> tuple[State, State]:
    """State (float32) and masks."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    exclude = ["conv1.weight"] if sparsity is None else []
    method = sl.static(structure=structure)
    sparsifier = sl.Sparsifier(model, method, sparsity=sparsity, distribution=sl.distributions.uniform, exclude=exclude)
    return model.state_dict(), sparsifier.masks


def sizes() -> Iterator[Row]:
    """Rows of the table of sizes."""
    for pattern, (structure, sparsity) in PATTERNS.items():
        full, masks = resnet50(structure, sparsity)
        for name, dtype in DTYPES.items():
            state = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in full.items()}
            dense = sum(tensor.nbytes for tensor in state.values())
            with tempfile.TemporaryDirectory() as folder:
                for format, path in in_formats(state, masks, Path(folder)):
                    row = {"model": "ResNet-50", "dtype": name, "pattern": pattern, "format": format}
                    yield row | {"bytes": size_of(path), "of_dense": round(size_of(path) / dense, 4)}


# ---- speed -----------------------------------------------------------------------------------------------------------


def skeleton(dtype: torch.dtype, gigabytes: float) -> nn.Module:
    """Blocks of four matrices [1024, 1024], one [4096, 1024], one [1024, 4096] and a norm, without memory."""
    block = {"q": (1024, 1024), "k": (1024, 1024), "v": (1024, 1024), "o": (1024, 1024), "up": (1024, 4096)}
    block["down"] = (4096, 1024)
    count = round(gigabytes * 1e9 / (12 * 2**20 * dtype.itemsize))
    layers = (
        nn.ModuleDict({key: nn.Linear(*size, bias=False) for key, size in block.items()} | {"norm": nn.LayerNorm(1024)})
        for _ in range(count)
    )
    with torch.device("meta"):
        return nn.ModuleList(layers).to(dtype)


def transformer(dtype: torch.dtype, gigabytes: float) -> nn.Module:
    """The same with memory that is in use, zero."""
    model = skeleton(dtype, gigabytes).to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    return model


def fill(model: nn.Module, structure: sl.Structure, sparsity: float | None) -> State:
    """Random weights and masks, which are returned; layer by layer, so that little more memory is taken than kept."""
    masks: State = {}
    of_shape: dict[torch.Size, tuple[Tensor, Tensor]] = {}
    for i, (name, weight) in enumerate(model.named_parameters()):
        if weight.ndim < 2:
            weight.fill_(1)
            continue
        if weight.shape not in of_shape:
            torch.manual_seed(i)
            nnz = structure.budget(weight.shape, 1 - (sparsity or 0.5))
            values = torch.randn(weight.shape).mul_(0.02).to(weight.dtype)
            of_shape[weight.shape] = values, structure.topk(torch.rand(weight.shape), nnz)
        values, mask = of_shape[weight.shape]
        masks[name] = mask.roll(i, 0)  # another layer, without the time for random numbers
        weight.copy_(values.roll(i, 0)).masked_fill_(~masks[name], 0)
    return masks


def save_plain(model: nn.Module, masks: State, folder: Path) -> None:
    safetensors.torch.save_file(model.state_dict(), folder / "dense.safetensors")


def save_plain_fsync(model: nn.Module, masks: State, folder: Path) -> None:
    save_plain(model, masks, folder)
    with (folder / "dense.safetensors").open("rb") as file:
        os.fsync(file.fileno())


def save_sparse(model: nn.Module, masks: State, folder: Path) -> None:
    save(model, folder / "sparse", masks=masks)


def load_plain(model: nn.Module, folder: Path) -> None:
    model.load_state_dict(safetensors.torch.load_file(folder / "dense.safetensors"))


def load_plain_checked(model: nn.Module, folder: Path) -> None:
    with (folder / "dense.safetensors").open("rb") as file:
        hashlib.file_digest(file, "sha256").hexdigest()
    load_plain(model, folder)


def map_plain(model: nn.Module, folder: Path) -> None:
    with torch.device("meta"):
        shell = nn.ParameterDict({name.replace(".", "/"): torch.empty_like(p) for name, p in model.named_parameters()})
    state = safetensors.torch.load_file(folder / "dense.safetensors")
    shell.load_state_dict({name.replace(".", "/"): tensor for name, tensor in state.items()}, assign=True)


def load_sparse(model: nn.Module, folder: Path) -> None:
    load(folder / "sparse", model)


def layers_plain(model: nn.Module, folder: Path) -> None:
    weights = dict(model.named_parameters())
    with safetensors.safe_open(folder / "dense.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            weights[name].copy_(file.get_tensor(name))


def layers_sparse(model: nn.Module, folder: Path) -> None:
    weights = dict(model.named_parameters())
    for name, tensor, _ in iterate(folder / "sparse"):
        weights[name].copy_(tensor)


def verify_sparse(model: nn.Module, folder: Path) -> None:
    verify(folder / "sparse")


Saving = Callable[[nn.Module, State, Path], None]
Loading = Callable[[nn.Module, Path], None]
SAVING: dict[str, Saving] = {f.__name__: f for f in (save_plain, save_plain_fsync, save_sparse)}
_LOADING: tuple[Loading, ...] = (load_plain, load_sparse, load_plain_checked, map_plain, layers_plain, layers_sparse,
                                 verify_sparse)  # fmt: skip
LOADING = {f.__name__: f for f in _LOADING}
TASKS = [(task, "") for task in SAVING] + [(task, cache) for task in LOADING for cache in ("warm", "cold")]
BASELINE = {
    "save_sparse": "save_plain_fsync",
    "load_sparse": "load_plain",
    "load_plain_checked": "load_plain",
    "layers_sparse": "layers_plain",
}


def drop_pages(folder: Path) -> None:
    """Leave nothing of the files in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def call(function: Callable[[], None]) -> dict[str, float]:
    """Seconds, and megabytes taken beyond what was there before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left must not serve this one unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _kilobytes("VmRSS")
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": max(0, _kilobytes("VmHWM") - before) * 1024 / 1e6}


def _kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(folder: Path, dtype: str, pattern: str, gigabytes: float, repeats: int) -> Runs:
    """All tasks in this process, taking turns: "task cache" -> each call."""
    runs: Runs = {f"{task} {cache}": [] for task, cache in TASKS}
    model = transformer(DTYPES[dtype], gigabytes)
    masks = fill(model, *PATTERNS[pattern])
    for tasks in ([key for key in TASKS if key[0] in SAVING], [key for key in TASKS if key[0] in LOADING]):
        for i in range(repeats):
            for task, cache in tasks[:: (-1) ** i]:
                if task in SAVING:
                    function = partial(SAVING[task], model, masks, folder)
                else:
                    function = partial(LOADING[task], model, folder)
                if cache == "cold":
                    drop_pages(folder)
                runs[f"{task} {cache}"].append(call(function))
    return runs


def speed(dtype: str, pattern: str, gigabytes: float, repeats: int) -> list[Row]:
    """Rows of the table of speeds: median, fastest and slowest of the repetitions."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["measure", "--folder", folder, "--dtypes", dtype, "--patterns", pattern]
        words += ["--gigabytes", str(gigabytes), "--repeats", str(repeats)]
        command = [sys.executable, "-m", __spec__.name, *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    runs: Runs = json.loads(done.stdout)
    medians = {key: statistics.median(run["seconds"] for run in found) for key, found in runs.items()}
    rows: list[Row] = []
    for key, found in runs.items():
        task, cache = key.split(" ")
        times = [run["seconds"] for run in found]
        plain = medians.get(f"{BASELINE.get(task, '')} {cache}")
        rows.append(
            {
                "dtype": dtype,
                "pattern": pattern,
                "task": task,
                "cache": cache,
                "seconds": round(medians[key], 4),
                "fastest": round(min(times), 4),
                "slowest": round(max(times), 4),
                "of_plain": round(medians[key] / plain, 2) if plain else "",
                "peak_mb": round(max(run["peak"] for run in found)),
                "repeats": repeats,
            }
        )
    return rows


# ---- command ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sizes", "speed", "measure"), help="`measure` is for `speed` itself")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the dense model (speed)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(speed)")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["90 %", "95 %", "2:4"], help="(speed)")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*Sparse CSR tensor support is in beta.*")
    if args.what == "sizes":
        write(list(sizes()), args.out)
    elif args.what == "measure":
        print(json.dumps(measure(args.folder, args.dtypes[0], args.patterns[0], args.gigabytes, args.repeats)))
    else:
        for dtype in args.dtypes:
            for pattern in args.patterns:
                write(speed(dtype, pattern, args.gigabytes, args.repeats), args.out, ("dtype", "pattern", "task"))


if __name__ == "__main__":
    main()
