"""How small and how fast sparse checkpoints are, beside other ways to store the same model.

    python -m sparselearn.recipes.bench_checkpoint sizes --out kernels/results/checkpoint-sizes.csv
    python -m sparselearn.recipes.bench_checkpoint speed --out kernels/results/checkpoint-speed.csv

`sizes` stores torchvision's ResNet-50 (random masks at 80, 90 and 95 %, every convolution and matrix alike; 2:4 but for
the first convolution, which has 3 channels) in bfloat16 and float32, and counts the bytes of all files.

`speed` stores and loads a transformer of 1 GB (matrices of 1024 x 1024 and 1024 x 4096) as a sparse checkpoint and as
plain safetensors of the dense model. Every repetition is a process of its own, and the order alternates. Times are of
the call alone: `save` includes fsync and all hashes, so plain files are timed with and without fsync; `load` puts the
weights into a model that exists, `layers` does so layer by layer. Sparse files are checked to the last byte, plain ones
not at all. Files are loaded from the page cache ("warm"), where plain ones are only copied, and from the disk ("cold":
their pages are dropped before; TMPDIR must be on a disk). Memory is what the process takes at most (ru_maxrss) beyond
what it had before the call; pages of mapped files count, though the system may take them back.
"""

import argparse
import csv
import json
import os
import platform
import resource
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

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PATTERNS: dict[str, tuple[sl.Structure, float | None]] = {
    "80 %": (sl.Unstructured(), 0.8),
    "90 %": (sl.Unstructured(), 0.9),
    "95 %": (sl.Unstructured(), 0.95),
    "2:4": (sl.NM(2, 4), None),
}
State = dict[str, Tensor]
Row = dict[str, Any]


def machine() -> dict[str, str]:
    """What every row of a table says of where it was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"cpu": f"{cpu}, {os.cpu_count()} cores"} | versions | {"commit": commit}


def write(rows: list[Row], out: Path | None) -> None:
    """As a table on the screen, and as CSV where a file is named."""
    for row in rows:
        print("  ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *machine()])
            writer.writeheader()
            writer.writerows(row | machine() for row in rows)


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


def transformer(dtype: torch.dtype, gigabytes: float) -> nn.Module:
    """Blocks of four matrices [1024, 1024], one [4096, 1024], one [1024, 4096] and a norm, zero."""
    block = {"q": (1024, 1024), "k": (1024, 1024), "v": (1024, 1024), "o": (1024, 1024), "up": (1024, 4096)}
    block["down"] = (4096, 1024)
    count = round(gigabytes * 1e9 / (12 * 2**20 * dtype.itemsize))
    layers = (
        nn.ModuleDict({key: nn.Linear(*size, bias=False) for key, size in block.items()} | {"norm": nn.LayerNorm(1024)})
        for _ in range(count)
    )
    with torch.device("meta"):
        model = nn.ModuleList(layers)
    model = model.to(dtype).to_empty(device="cpu").requires_grad_(False)
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


SAVING = {f.__name__: f for f in (save_plain, save_plain_fsync, save_sparse)}
LOADING = {f.__name__: f for f in (load_plain, load_sparse, layers_plain, layers_sparse, verify_sparse)}
TASKS = [(task, "") for task in SAVING] + [(task, cache) for task in LOADING for cache in ("warm", "cold")]
BASELINE = {"save_sparse": "save_plain_fsync", "load_sparse": "load_plain", "layers_sparse": "layers_plain"}


def drop_pages(folder: Path) -> None:
    """Leave nothing of the files in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(task: str, cache: str, folder: Path, dtype: str, pattern: str, gigabytes: float) -> dict[str, float]:
    """One call in this process: seconds, and megabytes taken beyond what was there before."""
    model = transformer(DTYPES[dtype], gigabytes)
    call: Callable[[], None]
    if task in SAVING:
        masks = fill(model, *PATTERNS[pattern])
        call = partial(SAVING[task], model, masks, folder)
    else:
        call = partial(LOADING[task], model, folder)
    if cache == "cold":
        drop_pages(folder)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": max(0.0, peak - before) / 1e6}


def speed(gigabytes: float, repeats: int) -> Iterator[Row]:
    """Rows of the table of speeds: median, fastest and slowest of the repetitions."""
    for dtype, pattern in (("bfloat16", "90 %"), ("bfloat16", "2:4"), ("float32", "90 %")):
        runs: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in TASKS}
        with tempfile.TemporaryDirectory() as folder:
            for i in range(repeats):
                # What is loaded must have been saved.
                for key in sorted(TASKS, key=lambda key: (key[0] in LOADING, TASKS.index(key) * (-1) ** i)):
                    words = ["measure", "--task", key[0], "--cache", key[1], "--folder", folder, "--dtype", dtype]
                    command = [sys.executable, "-m", __spec__.name, *words, "--pattern", pattern]
                    command += ["--gigabytes", str(gigabytes)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs[key].append(json.loads(done.stdout))
        medians = {key: statistics.median(run["seconds"] for run in found) for key, found in runs.items()}
        for (task, cache), found in runs.items():
            times = [run["seconds"] for run in found]
            plain = medians.get((BASELINE.get(task, ""), cache))
            yield {
                "dtype": dtype,
                "pattern": pattern,
                "task": task,
                "cache": cache,
                "seconds": round(medians[task, cache], 3),
                "fastest": round(min(times), 3),
                "slowest": round(max(times), 3),
                "of_plain": round(medians[task, cache] / plain, 2) if plain else "",
                "peak_mb": round(max(run["peak"] for run in found)),
                "repeats": repeats,
            }


# ---- command ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sizes", "speed", "measure"), help="`measure` is for `speed` itself")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the dense model (speed)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--task")
    parser.add_argument("--cache", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--dtype")
    parser.add_argument("--pattern")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*Sparse CSR tensor support is in beta.*")
    if args.what == "measure":
        print(json.dumps(measure(args.task, args.cache, args.folder, args.dtype, args.pattern, args.gigabytes)))
    else:
        write(list(sizes() if args.what == "sizes" else speed(args.gigabytes, args.repeats)), args.out)


if __name__ == "__main__":
    main()
