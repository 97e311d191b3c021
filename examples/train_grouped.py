"""Train without a dense weight: 16 neurons share their inputs, and only those weights exist.

    python examples/train_grouped.py

Values, gradients and optimizer state are [groups, 16, fan-in] from the first step on. On a GPU each layer first
measures which way of computing it is the fastest.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import sparselearn as sl
from sparselearn.modules.grouped import GroupedFanInLinear, measure_layers
from sparselearn.modules.update import captured, update_condensed
from sparselearn.structures import ConstantFanIn


def main(steps: int = 600, batch: int = 64) -> float:
    """Trains and returns the test accuracy."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x = (torch.tensor(images, dtype=torch.float32)[order] / 16).to(device)
    y = torch.tensor(labels)[order].to(device)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    model = model.to(device)

    method = sl.rigl(stop=int(0.75 * steps), every=25, structure=ConstantFanIn(group=16))
    first = sl.Sparsifier(model, method, sparsity=0.9, init="density", exclude=["4"])  # ten neurons make no group
    for name, mask in first.masks.items():
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        model.set_submodule(path, GroupedFanInLinear.from_dense(layer, mask, group=16))
    measure_layers(model, batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)  # after the layers: it trains their values
    for step in range(steps):
        rows = torch.randint(1437, (batch,), device=device)
        if method.due(step):  # in place of the optimizer's step
            with captured(model) as traffic:
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            update_condensed(model, method, optimizer, traffic, step=step)
        else:
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        optimizer.zero_grad()

    layers = [module for module in model if isinstance(module, GroupedFanInLinear)]
    sparsity = 1 - sum(layer.nnz for layer in layers) / sum(layer.weight_shape.numel() for layer in layers)
    accuracy = float((model(x[1437:]).argmax(1) == y[1437:]).float().mean())
    print(*layers, f"test accuracy {accuracy:.3f} at sparsity {sparsity:.4f}", sep="\n")
    return accuracy


if __name__ == "__main__":
    main()
