"""Train with constant fan-in, then convert each layer that is faster that way: python examples/convert_cpu.py"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

import sparselearn as sl
from sparselearn.modules import convert, revert
from sparselearn.structures import ConstantFanIn


def main(steps: int = 300, batch: int = 1) -> float:
    """Trains, converts for inputs of `batch` rows, and returns the converted model's test accuracy."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))

    method = sl.rigl(stop=int(0.75 * steps), every=25, structure=ConstantFanIn())
    sparsifier = sl.Sparsifier(model, method, sparsity=0.95, density_scaling=True)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), sparsifier)
    for _ in range(steps):
        rows = torch.randint(1437, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()

    before = copy.deepcopy(model.state_dict())
    print(convert(model, sparsifier, x[:batch], force=True))  # in place, without timing
    revert(model)  # and back: nothing is lost
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    print(convert(model, sparsifier, x[:batch]))  # each layer only where it is faster on this machine
    accuracy = float((model(x[1437:]).argmax(1) == y[1437:]).float().mean())
    print(f"test accuracy {accuracy:.3f} at sparsity {sparsifier.sparsity:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
