"""What an update by magnitude and gradient does to many layers, in plain torch; the kernels agree bit for bit.

For a layer with weight w, gradient g and mask m, all of one shape, flat indices in the order of `w.reshape(-1)`:

    kept   = the n_keep highest |w| where m
    chosen = the n_grow highest |g| where not kept (with `exclude_dropped`: where not m)
    m'     = kept or chosen
    stay   = m and m' (with `reinit`: kept): weights that keep value and optimizer state

among equals the lower index first. Scores are compared as float32, in which ±0 are equal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Item(NamedTuple):
    """A layer's part in an update. All of its tensors have one shape and lie alike in memory, without gaps."""

    weight: Tensor  # changed in place
    grad: Tensor  # dtype of the weight
    mask: Tensor  # bool, True = active
    grown: Tensor  # bool, what the update before grew
    fired: Tensor  # bool, what has been active at any time
    state: tuple[Tensor, ...]  # optimizer state, changed in place
    n_active: int  # active weights of `mask`
    n_keep: int  # at most n_active
    n_grow: int  # at most the number of weights that may grow


class Masks(NamedTuple):
    """The new bool tensors of a layer."""

    mask: Tensor
    inactive: Tensor  # not mask
    grown: Tensor  # active weights that start anew
    fired: Tensor


class Updated(NamedTuple):
    """What `update` gives."""

    masks: list[Masks]  # by item
    active: list[int]  # by item: active weights of the new mask
    grown: int  # in all items: weights that start anew
    earlier: int  # weights that the update before grew
    survivors: int  # those of them that are still active
    squares: float  # Σ(g·m)² over all items, m the old masks


def highest(score: Tensor, k: int) -> Tensor:
    """Flat bool mask of the k highest of a flat score, lower index first among equals."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.sort(descending=True, stable=True).indices[:k]] = True
    return chosen


def new_mask(item: Item, exclude_dropped: bool) -> tuple[Tensor, Tensor]:
    """m' and kept, of the weight's shape."""
    w, g, m = (t.reshape(-1) for t in (item.weight.float().abs(), item.grad.float().abs(), item.mask))
    kept = highest(w.masked_fill(~m, -torch.inf), item.n_keep)
    chosen = highest(g.masked_fill(m if exclude_dropped else kept, -torch.inf), item.n_grow)
    shape = item.weight.shape
    return (kept | chosen).view(shape), kept.view(shape)


def update(items: Sequence[Item], *, exclude_dropped: bool = False, reinit: bool = False) -> Updated | None:
    """New masks of all items; weights and state of positions that moved become zero.

    Those positions are all that are active before or after the update and do not stay. Returns None, having changed
    nothing, where a weight or a gradient is NaN: there is no highest.

    >>> w, g = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0, 7.0])
    >>> m, no = torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.bool)
    >>> update([Item(w, g, m, no, m, (), n_active=2, n_keep=1, n_grow=1)]).masks[0].mask.tolist()
    [True, False, False, True]
    >>> w.tolist()
    [3.0, 0.0, 0.0, 0.0]
    """
    if any(bool(t.isnan().any()) for item in items for t in (item.weight, item.grad)):
        return None
    masks, active, counts, squares = [], [], [0, 0, 0], 0.0
    for item in items:
        mask, kept = new_mask(item, exclude_dropped)
        stay = kept if reinit else item.mask & mask
        grown = mask & ~stay
        for t in (item.weight, *item.state):
            t.masked_fill_((item.mask | mask) & ~stay, 0)
        # Copied onto the old mask's strides: the new tensors lie in memory as the layer does.
        new = (torch.empty_like(item.mask).copy_(t) for t in (mask, ~mask, grown, item.fired | mask))
        masks.append(Masks(*new))
        active.append(int(mask.sum()))
        for i, t in enumerate((grown, item.grown, item.grown & mask)):
            counts[i] += int(t.sum())
        squares += float(item.grad.masked_fill(~item.mask, 0).float().square().sum())
    return Updated(masks, active, counts[0], counts[1], counts[2], squares)
