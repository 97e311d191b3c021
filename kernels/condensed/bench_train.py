"""Times training steps of an MLP with condensed layers: `python -m sparselearn.kernels.condensed.bench_train --help`.

A step is forward, cross-entropy, backward and SGD with momentum, on random data. `masked` multiplies the dense weights
with their masks in every forward; `in_place` masks gradients before and weights after the optimizer's step, as
`sparselearn.SparseOptimizer` does; `dense` has no masks. The condensed networks hold no dense weight, gradient or
moment of the sparse layers. The last layer is dense in all of them. Loss and gradients are compared before the clock
starts.
"""

import argparse
import itertools
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearn.kernels.condensed import Plan, linear, prepare
from sparselearn.kernels.condensed.bench import condensed_layer, environment, interleaved, ratios, save
from sparselearn.kernels.condensed.torch_ops import TorchOps

METHODS = ("masked", "in_place", "dense", "condensed", "condensed_without_numba")


class Masked(nn.Module):
    """A dense layer that may multiply its weight with its mask."""

    def __init__(self, weight: Tensor, mask_forward: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(torch.zeros(len(weight)))
        self.mask, self.mask_forward = (weight != 0).float(), mask_forward

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask if self.mask_forward else self.weight, self.bias)


class Condensed(nn.Module):
    """A condensed layer, with or without the compiled loops."""

    def __init__(self, values: Tensor, indices: Tensor, in_features: int, numba: bool) -> None:
        super().__init__()
        self.values, self.bias = nn.Parameter(values.clone()), nn.Parameter(torch.zeros(len(values)))
        self.plan: Plan = prepare(values, indices, in_features)
        if not numba:
            self.plan._ops = TorchOps(indices.long(), in_features)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.values, self.plan, self.bias)


def network(method: str, sizes: list[int], sparsity: float) -> nn.Sequential:
    """An MLP whose hidden layers are sparse; equal numbers for every method."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for seed, (inputs, neurons) in enumerate(itertools.pairwise(sizes[:-1])):
        values, indices, weight = condensed_layer(inputs, neurons, sparsity, seed)
        scale = (2 / values.shape[1]) ** 0.5
        if method.startswith("condensed"):
            layers.append(Condensed(values * scale, indices, inputs, method == "condensed"))
        else:
            layers.append(Masked(weight * scale, method == "masked"))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def training_step(method: str, sizes: list[int], sparsity: float, batch: int) -> Callable[[], Tensor]:
    """A function that does one step and returns the loss before it."""
    model = network(method, sizes, sparsity)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, sizes[0], generator=generator)
    target = torch.randint(sizes[-1], (batch,), generator=generator)
    masked = [m for m in model if isinstance(m, Masked)] if method == "in_place" else []
    masks = [m.mask for m in masked]

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        if masked:
            torch._foreach_mul_([m.weight.grad for m in masked if m.weight.grad is not None], masks)
        optimizer.step()
        if masked:
            torch._foreach_mul_([m.weight.data for m in masked], masks)
        return loss.detach()

    return step


def _check(steps: dict[str, Callable[[], Tensor]]) -> None:
    """Three steps give the same losses: forward, backward and optimizer agree. (`dense` trains more weights.)"""
    losses = {name: torch.stack([step() for _ in range(3)]) for name, step in steps.items() if name != "dense"}
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["masked"], atol=1e-4, rtol=1e-4)


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(prog="python -m sparselearn.kernels.condensed.bench_train", description=__doc__)
    made.add_argument("--sizes", nargs="+", type=int, default=[784, 1000, 1000, 10], help="of the MLP")
    made.add_argument("--sparsity", nargs="+", type=float, default=[0.9, 0.95, 0.98])
    made.add_argument("--batch", nargs="+", type=int, default=[128, 256])
    made.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    made.add_argument("--rounds", type=int, default=11)
    made.add_argument("--out", type=Path, help="CSV file to write")
    made.add_argument("--append", action="store_true", help="keep the lines that the file has")
    args = made.parse_args(arguments)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    table: list[dict[str, object]] = []
    where = environment()
    for threads, sparsity, batch in itertools.product(args.threads, args.sparsity, args.batch):
        torch.set_num_threads(threads)
        steps = {name: training_step(name, args.sizes, sparsity, batch) for name in METHODS}
        _check(steps)
        times = interleaved({name: (step, threads) for name, step in steps.items()}, args.rounds, 20e-3)
        for name in times:
            middle, low, high = ratios(times, name, "masked")
            in_place = ratios(times, name, "in_place")[0]
            table.append({
                "sizes": "-".join(map(str, args.sizes)), "sparsity": sparsity, "batch": batch, "threads": threads,
                "method": name, "median_ms": round(statistics.median(times[name]) * 1e3, 3),
                "over_masked": round(middle, 3), "over_masked_p10": round(low, 3), "over_masked_p90": round(high, 3),
                "over_in_place": round(in_place, 3),
            } | where)  # fmt: skip
            print(
                f"{threads} threads, {sparsity:.0%}, batch {batch}: {name} {middle:.2f}x masked, "
                f"{in_place:.2f}x in_place"
            )
    if args.out:
        save(table, args.out, args.append)


if __name__ == "__main__":
    main()
