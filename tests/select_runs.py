"""Models in training whose mask updates may be done at once; two of the same arguments see the same batches."""

import math

import torch
from torch import nn

import sparselearn as sl
from sparselearn.criteria import gradient
from sparselearn.schedules import UpdateSchedule, constant, ramp

CLOCK = {"stop": 28, "every": 5}


def drop_grow(**options):
    return sl.DropGrow(grow=gradient, updates=UpdateSchedule(5, 28, None, constant(0.4)), **options)


METHODS = {
    "rigl": lambda: sl.rigl(**CLOCK),
    "rigl with a step": lambda: sl.rigl(**CLOCK, skip_step=False),
    "rigl, nothing returns": lambda: sl.rigl(**CLOCK, exclude_dropped=True, drop_fraction=constant(0.9)),
    "all moved start anew": lambda: drop_grow(reinit=True, skip_step=True),
    "density rises": lambda: drop_grow(density=ramp(lambda step: 1 - min(step / 20, 1), 0.1)),
    "density falls": lambda: drop_grow(density=ramp(lambda step: 1 - min(step / 20, 1), 0.8), exclude_dropped=True),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


class Run:
    """A network of convolutions and linear layers, one of them dense."""

    layers = 5

    def __init__(self, method, make, device="cpu", dtype=torch.float32, channels_last=False, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 3, groups=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(12 * 16, 20), nn.ReLU(), nn.Linear(20, 4),
        )  # fmt: skip
        self.order = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(device, dtype, memory_format=self.order)
        self.sparsifier = sl.Sparsifier(self.model, method, **{"sparsity": 0.7, "overrides": {"9.weight": 0}} | options)
        self.optimizer = sl.SparseOptimizer(make(self.model.parameters()), self.sparsifier)
        self.device, self.dtype, self.steps = device, dtype, 0

    def backward(self):
        g = torch.Generator().manual_seed(100 + self.steps)
        x = torch.randn(6, 3, 8, 8, generator=g).to(self.device, self.dtype, memory_format=self.order)
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()

    def step(self):
        self.backward()
        self.optimizer.step()
        self.steps += 1

    def tensors(self):
        for name, p in self.model.named_parameters():
            yield name, p.detach()
            yield from ((f"{name} {k}", v) for k, v in self.optimizer.state[p].items() if torch.is_tensor(v))
        for name, layer in self.sparsifier.state.layers.items():
            yield from ((f"{name} {k}", getattr(layer, k)) for k in ("mask", "inactive"))
            yield from ((f"{name} {k}", v) for k, v in layer.memory.items())


def assert_equal(ours, theirs):
    for (name, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(a, b), f"{name} after step {ours.steps}"
        assert a.is_contiguous() == b.is_contiguous(), name
    for name, layer in ours.sparsifier.state.layers.items():
        other = theirs.sparsifier.state.layers[name]
        assert (layer.nnz, layer.step, layer.clean) == (other.nnz, other.step, other.clean)
    seen, expected = ours.sparsifier.metrics(), theirs.sparsifier.metrics()
    norms = [values.pop("sparsity/gradient_norm", 0.0) for values in (seen, expected)]
    assert math.isclose(*norms, rel_tol=1e-5)
    assert seen == expected
