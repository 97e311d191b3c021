"""Every method of the library once, set for a run of 12 steps; and a tiny network of convolution and Linear layers."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import sparselearn as sl
from sparselearn import criteria
from sparselearn.distributions import uniform
from sparselearn.methods import dense_then, then_dense
from sparselearn.schedules import constant, cosine
from sparselearn.state import generator
from sparselearn.wrappers import group_supports

STEPS = 12
CLOCK: dict[str, Any] = {"stop": 11, "every": 3}  # updates at 3, 6 and 9
LINEARS = {"3.weight": torch.Size([16, 72]), "5.weight": torch.Size([4, 16])}


@dataclass(frozen=True)
class Case:
    """A method and what its Sparsifier needs."""

    method: Any
    options: dict[str, Any] = field(default_factory=dict)
    sparsity: float | None = 0.7

    @property
    def straight_through(self) -> bool:
        return isinstance(self.method, sl.StraightThrough)


def hard(method: Any, **options: Any) -> Case:
    return Case(method, options)


def fixed(method: Any, **options: Any) -> Case:
    """The structure says how sparse."""
    return Case(method, options, None)


HALF = constant(0.5)
METHODS = {
    "static": hard(sl.static()),
    "static-fan-in": hard(sl.static(structure=sl.ConstantFanIn())),
    "set": hard(sl.set_(**CLOCK, drop_fraction=0.5)),
    "rigl": hard(sl.rigl(**CLOCK, drop_fraction=0.5)),
    "rigl-stepping": hard(sl.rigl(**CLOCK, drop_fraction=HALF, skip_step=False, exclude_dropped=True)),
    "rigl-initial": hard(sl.rigl(**CLOCK, drop_fraction=HALF, grow_init=criteria.initial_distribution(2))),
    "rigl-block": hard(sl.rigl(**CLOCK, drop_fraction=HALF, structure=sl.Block(2, 2)), distribution=uniform),
    "rigl-support": hard(sl.rigl(**CLOCK, drop_fraction=HALF), support=0.6),
    "srigl": hard(sl.srigl(**CLOCK, drop_fraction=0.5, gamma=0.3)),
    "srigl-groups": hard(sl.srigl(**CLOCK, drop_fraction=0.5, gamma=0.0, group=2)),
    "snfs": hard(sl.snfs(**CLOCK)),
    "snfs-lite": hard(sl.snfs_lite(**CLOCK, drop_fraction=0.5)),
    "dsr": hard(sl.dsr(target=60, initial_threshold=0.02, **CLOCK)),
    "itop-rigl": hard(sl.itop(**CLOCK)),
    "itop-set": hard(sl.itop(**CLOCK, grow=criteria.random)),
    "itop-unfired": hard(sl.itop(**CLOCK, grow=criteria.random_unfired())),
    "granet": hard(sl.granet(**CLOCK, prune_stop=9)),
    "granet-uniform": hard(sl.granet(**CLOCK, prune_stop=8, prune_start=3, initial_density=0.8, scope="layer")),
    "gmp": hard(sl.gmp(**CLOCK)),
    "gmp-global": hard(sl.gmp(**CLOCK, start=3, scope="global")),
    "gmp-support": hard(sl.gmp(**CLOCK, initial_density=0.5), support=0.5),
    "mest": hard(sl.mest(**CLOCK)),
    "mest-soft": hard(sl.mest(**CLOCK, soft=True, weight=0.5)),
    "top-kast": hard(sl.top_kast(exploration=0.2, every=3, stop_exploration=8)),
    "top-kast-support": hard(sl.top_kast(exploration=0.2), support=0.6),
    "acdc": hard(sl.acdc(switches=(3, 6, 9))),
    "acdc-uniform": hard(sl.acdc(switches=(2, 4, 7), scope="layer")),
    "dst-ee": hard(sl.dst_ee(c=1e-2, epsilon=1.0, **CLOCK, drop_fraction=0.5)),
    "harmonic": hard(sl.harmonic(stop=11, every=2, waves=2, amplitude=0.9)),
    "static-reinit": hard(sl.static_reinit(**CLOCK, drop_fraction=HALF)),
    "g2gnet": hard(
        sl.g2gnet(**CLOCK, drop_fraction=HALF),
        exclude=["0.*"],
        support=group_supports(LINEARS, groups=4, links=0.5),
        distribution=uniform,
    ),
    "ste": fixed(sl.ste(sl.NM(2, 4))),
    "ste-fan-in": hard(sl.ste(sl.ConstantFanIn(), every=2)),
    "sr-ste": fixed(sl.sr_ste(sl.NM(2, 4), decay=0.1, every=2, stop=8)),
    "mdgf": fixed(sl.mdgf(sl.NM(1, 4), start=2, stop=9)),
    "mdgf-chain": fixed(sl.mdgf(sl.NM(1, 4), stop=9, kind="exponential", gradient="chain", every=2)),
    "sdgf": fixed(sl.sdgf(1, 4, stop=9, start=2)),
    "pretrain-24": fixed(sl.pretrain_24(steps=STEPS, decay=0.1, every=4)),
    "s-ste": fixed(sl.s_ste()),
    "cast": fixed(sl.cast(sl.NM(2, 4), decay=cosine(0.01, stop=11), stop=8, every=3)),
    "asp": fixed(sl.asp(), initial=criteria.magnitude),
    "n-m-rigl": fixed(sl.n_m_rigl(2, 4, **CLOCK, drop_fraction=HALF, grow=criteria.gradient)),
    "dense-then": fixed(dense_then(sl.ste(sl.NM(2, 4)), start=5)),
    "then-dense": fixed(then_dense(sl.ste(sl.TransposableNM(2, 4)), stop=9)),
}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.9, centered=True),
}


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Input [n, 4, 5, 5], 4 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 4)
    ).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32, n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(n, 4, 5, 5, generator=g).to(dtype), torch.randint(4, (n,), generator=g)


def build(
    case: Case, optimizer: str = "sgd", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Sequential, sl.Sparsifier, sl.SparseOptimizer]:
    model = network(dtype)
    sparsifier = sl.Sparsifier(model, case.method, **{"sparsity": case.sparsity} | case.options | options)
    return model, sparsifier, sl.SparseOptimizer(OPTIMIZERS[optimizer](model.parameters()), sparsifier)


def backward(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], parts: int = 1) -> None:
    """The gradient of the mean loss, in one pass or several."""
    for x, y in zip(data[0].chunk(parts), data[1].chunk(parts), strict=True):
        (nn.functional.cross_entropy(model(x).double(), y) / parts).backward()


def train(model: nn.Module, optimizer: sl.SparseOptimizer, start: int = 0, stop: int = STEPS, parts: int = 1) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(start, stop):
        optimizer.zero_grad()
        backward(model, batch(step, dtype), parts)
        optimizer.step()


def snapshot(model: nn.Module, sparsifier: sl.Sparsifier) -> dict[str, Any]:
    """Copies of all that training changes; dense weights where a method has them."""
    with sparsifier.dense_weights():
        dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "dense": dense,
        "masks": {name: mask.clone() for name, mask in sparsifier.masks.items()},
        "nnz": {name: layer.nnz for name, layer in sparsifier.state.layers.items()},
        "memory": {
            name: {key: value.clone() for key, value in layer.memory.items()}
            for name, layer in sparsifier.state.layers.items()
        },
        "step": sparsifier.step,
    }


def assert_equal(a: dict[str, Any], b: dict[str, Any], parts: tuple[str, ...] = ("weights", "dense", "masks")) -> None:
    """Bit for bit."""
    for part in parts:
        assert a[part].keys() == b[part].keys()
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), f"{part} of {name}"


def with_stepping(method: Any) -> Any:
    """The method without an update in place of the optimizer's step."""
    return replace(method, skip_step=False)


# ---- one layer by hand -----------------------------------------------------------------------------------------


def layer_of(weight: Any, mask: Any = None, grad: Any = None, *, step: int = 100, name: str = "w", seed: int = 0,
             **more: Any) -> sl.Layer:  # fmt: skip
    """What a method sees of a layer with these weights; active where they are not zero, if no mask is given."""
    weight = torch.as_tensor(weight, dtype=torch.float32)
    mask = weight != 0 if mask is None else torch.as_tensor(mask).bool()
    grad = None if grad is None else torch.as_tensor(grad, dtype=torch.float32)
    return sl.Layer(name, weight, grad, mask, {}, step, generator(seed, step, name))._replace(**more)


def active(mask: torch.Tensor) -> list[int]:
    """The flat positions that are True."""
    return mask.flatten().nonzero().flatten().tolist()


def masks_after(method: sl.DropGrow, *layers: sl.Layer, nnz: list[int] | None = None) -> list[list[int]]:
    """The active positions of each layer after an update."""
    counts = [int(layer.mask.sum()) for layer in layers] if nnz is None else nnz
    return [active(mask) for mask, _ in method.new_masks(layers, counts)]


class OneLayer:
    """A bias-free Linear with given weights [in] or [out, in] and masks, driven by given gradients."""

    def __init__(self, weight: Any, method: Any, *, mask: Any = None, lr: float = 0.0, momentum: float = 0.0,
                 **options: Any) -> None:  # fmt: skip
        weight = torch.as_tensor(weight, dtype=torch.float32)
        weight = weight.view(1, -1) if weight.ndim == 1 else weight
        mask = (weight != 0) if mask is None else torch.as_tensor(mask).bool().view_as(weight)
        self.model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.model.weight.data.copy_(weight)
        if isinstance(method, sl.DropGrow):  # the first masks are drawn with random numbers: hand them in as scores
            options = {"initial": lambda layer: mask.float()} | options
        options = {"sparsity": 1 - float(mask.float().mean())} | options
        self.sparsifier = sl.Sparsifier(self.model, method, **options)
        sgd = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)
        self.optimizer = sl.SparseOptimizer(sgd, self.sparsifier)
        self.state = self.sparsifier.state.layers["weight"]

    def step(self, grad: Any) -> list[int]:
        """One optimizer step with this gradient; the active positions after it."""
        self.model.weight.grad = torch.as_tensor(grad, dtype=torch.float32).view_as(self.model.weight).clone()
        self.optimizer.step()
        return active(self.state.mask)

    @property
    def weight(self) -> list[float]:
        return self.model.weight.detach().flatten().tolist()

    @property
    def momentum(self) -> list[float]:
        return self.optimizer.state[self.model.weight]["momentum_buffer"].flatten().tolist()
