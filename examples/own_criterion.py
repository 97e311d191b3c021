"""A drop criterion that the library does not have, in nine lines: python examples/own_criterion.py

Drop the weights that matter least to the loss by a first-order estimate, |w·g|, instead of the smallest.
"""

import torch
from torch import Tensor, nn

import sparselearn as sl


def taylor(layer: sl.Layer) -> Tensor:
    """|w·dL/dw| (Molchanov et al., arXiv 1611.06440, eq. 4, for single weights)."""
    return (layer.weight * layer.dense_grad()).abs()


def rigl_taylor(stop: int, every: int = 100) -> sl.DropGrow:
    """RigL that drops by `taylor`."""
    updates = sl.UpdateSchedule(every, stop, drop_fraction=0.3)
    return sl.DropGrow(drop=taylor, grow=sl.criteria.gradient, updates=updates, skip_step=True)


def main(steps: int = 300) -> float:
    """Trains on a made-up task, x -> index of the largest of ten inputs; returns the accuracy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 10))
    sparsifier = sl.Sparsifier(model, rigl_taylor(stop=int(0.75 * steps), every=20), sparsity=0.8, density_scaling=True)
    optimizer = sl.SparseOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), sparsifier)
    for _ in range(steps):
        x = torch.randn(256, 10)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x.argmax(1)).backward()
        optimizer.step()
    x = torch.randn(2000, 10)
    accuracy = float((model(x).argmax(1) == x.argmax(1)).float().mean())
    print(f"accuracy {accuracy:.3f} at sparsity {sparsifier.sparsity:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
