"""SRigL: RigL with a constant fan-in, and the ablation of neurons that goes with it."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparselearn.criteria import Layer
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import DropGrow, part_of, rigl
from sparselearn.schedules import Schedule
from sparselearn.structures import ConstantFanIn, rows, top_indices


@dataclass(frozen=True)
class salient_neurons:
    """SRigL's neuron ablation (arXiv 2305.02299, §3): a neuron stays active if enough of its weights are salient.

    Salient are the weights that magnitude keeps in the layer as a whole, and as many of the highest growth score as are
    dropped, anywhere. A neuron needs γ·K of them (γ < 1, rounded down, at least 1; K is the fan-in without ablation) or
    γ of them (γ >= 1); γ = 0 ablates none. Where fewer neurons would stay than can hold the budget, the next best stay,
    with all that are as good.

    Args:
        group: neurons are ablated in groups of this many, by their mean count.
        permanent: ablated neurons do not come back.
        protect: name patterns of layers, or of their weights, without ablation.
    """

    gamma: float
    group: int = 1
    permanent: bool = False
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise SparsityError(f"`gamma` of `srigl` must be at least 0; it is {self.gamma}.")

    def __call__(self, layer: Layer, keep_score: Tensor, grow_score: Tensor, nnz: int, n_drop: int) -> Tensor:
        out, fan_in = rows(layer.mask).shape
        every = torch.ones(out, dtype=torch.double, device=layer.mask.device)
        names = layer.name, layer.name.rpartition(".")[0]
        if self.gamma == 0 or any(fnmatch.fnmatchcase(n, pattern) for pattern in self.protect for n in names):
            return every.bool()
        flat_keep, flat_grow = keep_score.reshape(-1), grow_score.reshape(-1)
        n_keep = int(layer.mask.sum()) - n_drop
        salient = top_indices(flat_keep, n_keep) & (flat_keep > -math.inf)
        salient |= top_indices(flat_grow, n_drop) & (flat_grow > -math.inf)
        group = torch.arange(out, device=every.device) // self.group  # of each neuron

        def total(numbers: Tensor) -> Tensor:
            return every.new_zeros(-(-out // self.group)).index_add_(0, group, numbers)

        sizes = total(every)
        counts = total(salient.view(out, fan_in).sum(1).double()) / sizes
        if self.permanent:
            counts = counts.masked_fill(total(rows(layer.mask).any(1).double()) == 0, -1)
        needed = self.gamma if self.gamma >= 1 else max(1, part_of(self.gamma, nnz // out))
        ordered, order = counts.sort(descending=True, stable=True)
        room = sizes[order].cumsum(0) * fan_in  # of the best neurons
        least = ordered[room >= nnz][0]  # of the last that the budget needs
        return (counts >= least.clamp(max=needed))[group]


def srigl(
    *,
    stop: int,
    every: int = 100,
    start: int | None = None,
    drop_fraction: float | Schedule = 0.3,
    gamma: float = 0.3,
    group: int = 1,
    permanent_ablation: bool = False,
    protect: Sequence[str] = (),
    skip_step: bool = False,
) -> DropGrow:
    """SRigL: RigL with a constant fan-in and neuron ablation (Lasby et al., arXiv 2305.02299, Alg. 1).

    drop: layer-wide the least |w|, and of every neuron what exceeds its new fan-in K; grow: per neuron up to K by
    |dL/dw|; K = ⌊budget / active neurons⌋. A neuron is ablated where fewer than γ·K0 of its weights are salient, K0 the
    fan-in without ablation (`salient_neurons`). The paper: γ = 0.3 for CNNs, 0.95 for ViTs, with last layers protected.

    Args:
        stop, every, start, drop_fraction: as in `rigl`.
        gamma: γ < 1 relative to K0, γ >= 1 a number of weights, 0 never ablates.
        group: this many neighbouring neurons share their inputs (and are ablated together).
        permanent_ablation: ablated neurons stay so; the reference lets them revive.
        protect: name patterns of layers (or their weights) whose neurons are never ablated, e.g. ["fc"].
        skip_step: the reference steps first and rewires with the same gradient.

    Differs: surplus weights of a row are trimmed by |w| (the reference sorts booleans), no layer is protected or
    ablated by an accident of names, and scores of ablated rows are not modified in place. Kept weights that are exactly
    zero count as kept. Neurons whose whole gradient is zero grow at random (by index in the reference).
    """
    return replace(
        rigl(stop=stop, every=every, start=start, drop_fraction=drop_fraction, skip_step=skip_step),
        structure=ConstantFanIn(group),
        ablation=salient_neurons(gamma, group, permanent_ablation, tuple(protect)),
    )
