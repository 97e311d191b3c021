"""Mask updates of all layers at once on a GPU, for methods of which `sparselearn.kernels.select` holds the formulas."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sparselearn import criteria, distributed
from sparselearn.kernels import select
from sparselearn.methods.drop_grow import Budget, DropGrow
from sparselearn.selection import Weight
from sparselearn.state import LayerState
from sparselearn.structures import Unstructured


@dataclass
class Done:
    """What an update did: the names of the layers, and sums over these."""

    names: set[str] = field(default_factory=set)
    grown: int = 0  # weights that start anew
    earlier: int = 0  # weights that the update before grew
    survivors: int = 0  # those of them that are still active
    squares: float = 0.0  # Σ(g⊙M)², M the old masks


def serves(method: DropGrow) -> bool:
    """Whether each layer by itself keeps its highest |w|, then grows its highest |g|, from zero."""
    return (
        type(method) is DropGrow
        and method.drop is criteria.magnitude
        and method.grow is criteria.gradient
        and method.grow_init is criteria.zeros
        and type(method.structure) is Unstructured
        and method.reallocate is None
        and method.ablation is None
        and method.optimizer_state == "zero"
    )


def update(
    method: DropGrow,
    layers: Mapping[str, tuple[Weight, LayerState]],
    grads: Mapping[str, Tensor],
    slots: Mapping[str, Mapping[str, Tensor]],
    nnz: Mapping[str, int],
) -> Done:
    """New masks of those layers that can be done at once, in place; the others are as they were.

    Weights and state outside the old masks must be zero. Equal to the engine's own way, bit for bit, but for `squares`,
    which is rounded otherwise.
    """
    done = Done()
    if distributed.active() or not serves(method):
        return done
    items = {}
    for name, (weight, layer) in layers.items():
        if name in grads and _plain(layer):
            items[name] = _item(method, weight, layer, grads[name], slots[name], nnz[name])
    names = list(items)
    for where, seen in select.update(
        list(items.values()), exclude_dropped=method.exclude_dropped, reinit=method.reinit
    ):
        for i, masks, active in zip(where, seen.masks, seen.active, strict=True):
            layer = layers[names[i]][1]
            layer.mask, layer.inactive, layer.nnz = masks.mask, masks.inactive, active
            layer.memory |= {"grown": masks.grown, "fired": masks.fired}
            done.names.add(names[i])
        done.grown += seen.grown
        done.earlier += seen.earlier
        done.survivors += seen.survivors
        done.squares += seen.squares
    return done


def _plain(layer: LayerState) -> bool:
    """Whether a layer may grow everywhere, is whole, and remembers nothing of its own."""
    return not distributed.sharded(layer.mask) and layer.support is None and layer.memory.keys() == {"grown", "fired"}


def _item(
    method: DropGrow, weight: Weight, layer: LayerState, grad: Tensor, slots: Mapping[str, Tensor], nnz: int
) -> select.Item:
    keep = method.kept(layer.step, Budget(-1, nnz), layer.nnz, layer.mask.numel() - layer.nnz)
    return select.Item(
        weight.parameter.data, grad, layer.mask, layer.memory["grown"], layer.memory["fired"], tuple(slots.values()),
        layer.nnz, keep, nnz - keep,
    )  # fmt: skip
