"""What the engine costs per training step: sparse (masked) against dense, side by side in one process.

    python -m sparselearn.recipes.bench_overhead --device cuda --out kernels/results/overhead-h100.csv

Times whole steps (forward, backward, optimizer) of ResNet-18 (SGD) and ViT-S/16 (AdamW) on images of 224 x 224, and of
small versions for 32 x 32, which on a GPU wait for Python rather than for the device. Steps that are dense, static, of
RigL (90 %) and of SR-STE (2:4, masks chosen in every step) alternate in short blocks, so that drift of the clock hits
all alike; the figure is the median over rounds of sparse / dense time. RigL's figure includes its mask updates, one in
100 steps; the first, which compiles kernels on a GPU, comes before the clock starts. Blocks that are no multiple of 100
steps hold more or fewer updates than that.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import sparselearn as sl
from sparselearn.kernels.timing import commit

EVERY = 100  # steps between mask updates, RigL's usual


def resnet18(image: int) -> nn.Module:
    """torchvision's ResNet-18; below 64 pixels with the CIFAR stem (3x3, no pooling)."""
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    if image >= 64:
        return model
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vit(image: int) -> nn.Module:
    """ViT-S/16 (12 blocks, width 384); below 64 pixels 6 blocks and patches of 4."""
    patch, blocks = (16, 12) if image >= 64 else (4, 6)
    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=image, patch_size=patch, num_layers=blocks, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=10
    )
    return model


def make_step(
    build: Callable[[], nn.Module],
    method: sl.DropGrow | sl.StraightThrough | None,
    batch: tuple[Tensor, Tensor],
    optimizer: str,
) -> Callable[[], None]:
    """A function that takes one training step on this batch."""
    images, labels = batch
    device = images.device
    torch.manual_seed(0)
    model = build().to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    base: torch.optim.Optimizer
    if optimizer == "sgd":
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=device.type == "cuda")
    else:
        base = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda")
    if method is not None:
        two_of_four = isinstance(method, sl.StraightThrough)
        first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))  # of 3 channels
        base = sl.SparseOptimizer(
            base,
            sl.Sparsifier(model, method, sparsity=0.5 if two_of_four else 0.9, exclude=[first] if two_of_four else ()),
        )

    def step() -> None:
        base.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        base.step()

    return step


def timed(step: Callable[[], None], n: int, device: torch.device) -> float:
    """Seconds per step over n steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def compare(
    name: str, image: int, batch_size: int, device: torch.device, block: int, rounds: int
) -> list[dict[str, object]]:
    """Rows of one model and batch size."""
    build, optimizer = (resnet18, "sgd") if name == "resnet18" else (vit, "adamw")
    images = torch.randn(batch_size, 3, image, image, device=device)
    batch = (images, torch.randint(10, (batch_size,), device=device))
    methods = {
        "dense": None,
        "static": sl.static(),
        "rigl": sl.rigl(stop=10**9, every=EVERY),
        "sr_ste": sl.sr_ste(sl.NM(2, 4)),
    }
    steps = {key: make_step(partial(build, image), method, batch, optimizer) for key, method in methods.items()}
    for step in steps.values():
        timed(step, EVERY + 1 if device.type == "cuda" else 3, device)
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            times[key].append(timed(step, block, device))
    rows: list[dict[str, object]] = []
    for key in [*methods][1:]:
        ratios = [sparse / dense for sparse, dense in zip(times[key], times["dense"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "model": name,
                "image": image,
                "batch": batch_size,
                "method": key,
                "dense_ms": round(1e3 * statistics.median(times["dense"]), 3),
                "sparse_ms": round(1e3 * statistics.median(times[key]), 3),
                "ratio_median": round(statistics.median(ratios), 4),
                "ratio_q1": round(quartiles[0], 4),
                "ratio_q3": round(quartiles[2], 4),
                "steps": block * rounds,
            }
        )
    return rows


def hardware(device: torch.device) -> str:
    """The device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", default=["resnet18", "vit"], choices=["resnet18", "vit"])
    parser.add_argument("--image", type=int, nargs="+", default=[32, 224], help="height and width of images")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: 16 on a CPU, 64 256 on a GPU)")
    parser.add_argument("--block", type=int, help="steps per block (default: 2 on a CPU, 100 on a GPU)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="append the rows to this CSV file")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    where = {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "commit": commit(),
    }
    for name in args.model:
        for image in args.image:
            for batch in args.batch or ([64, 256] if gpu else [16]):
                rows = compare(name, image, batch, device, args.block or (EVERY if gpu else 2), args.rounds)
                write([{**row, **where} for row in rows], args.out)
    return 0


def write(rows: list[dict[str, object]], out: Path | None) -> None:
    """Print rows, and append them to a file at once: a run that is cut off keeps what it has measured."""
    csv.DictWriter(sys.stdout, rows[0]).writerows(rows)
    sys.stdout.flush()
    if out is not None:
        fresh = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(main())
