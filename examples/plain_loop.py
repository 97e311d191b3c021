"""RigL at 90 % in a hand-written loop on scikit-learn's digits: python examples/plain_loop.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import sparselearn as sl


def main(steps: int = 600) -> float:
    """Trains and returns the test accuracy."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    sparsifier = sl.Sparsifier(model, sl.rigl(stop=int(0.75 * steps), every=25), sparsity=0.9, density_scaling=True)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = sl.SparseOptimizer(base, sparsifier)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for _ in range(steps):
        batch = torch.randint(1437, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.before_step()  # only needed where gradients are clipped: the masked ones are
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()

    accuracy = float((model(x[1437:]).argmax(1) == y[1437:]).float().mean())
    print(sparsifier.summary())
    print(f"test accuracy {accuracy:.3f} at sparsity {sparsifier.sparsity:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
