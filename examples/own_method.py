"""A method that the library does not have, in a dozen lines: python examples/own_method.py

Neurons that compete: weights are dropped by their share of the neuron's total, so that every neuron keeps its best
inputs, and grown at random among the inputs that some neuron of the layer finds useful. Its budget falls in steps.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sparselearn as sl


def share_of_neuron(layer: sl.Layer) -> Tensor:
    """|w| / Σ|w| of its row: what the weight is to its neuron."""
    size = layer.weight.abs()
    return size / size.sum(1, keepdim=True).clamp(min=1e-12)


def useful_inputs(layer: sl.Layer) -> Tensor:
    """A random number, times the mean |dL/dw| of the input over all neurons."""
    return layer.rand() * layer.dense_grad().abs().mean(0, keepdim=True)


def competing_neurons(stop: int, every: int = 20) -> sl.DropGrow:
    """Starts at four times the final density; halves it after a third and two thirds of the updates."""
    factor = sl.schedules.stages((0, stop // 3, 2 * stop // 3), (4.0, 2.0, 1.0))
    updates = sl.UpdateSchedule(every, stop, drop_fraction=0.3)
    return sl.DropGrow(share_of_neuron, useful_inputs, updates, density=lambda step, final: final * factor(step))


def main(epochs: int = 12) -> float:
    """Trains on scikit-learn's digits; returns the test accuracy."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    steps = epochs * len(train) // 32
    sparsifier = sl.Sparsifier(model, competing_neurons(stop=int(0.75 * steps)), sparsity=0.9)
    optimizer = sl.SparseOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), sparsifier)
    for step in range(steps):
        batch = train[torch.randint(len(train), (32,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: sparsity {sparsifier.sparsity:.4f}")
    accuracy = float((model(x[test]).argmax(1) == y[test]).float().mean())
    print(f"test accuracy {accuracy:.3f} at sparsity {sparsifier.sparsity:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
