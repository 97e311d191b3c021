"""Drop and grow for all layers at once: exact selection by magnitude and gradient, ties to the lower index.

`reference.update` holds the meaning in plain torch; `launch.update` is the same, bit for bit, in a fixed number of
Triton launches. `update` is for layers of any kind. Nothing here imports triton before there is a layer on a GPU.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from sparselearn.kernels.select.reference import Item, Masks, Updated

__all__ = ["LONGEST", "Item", "Masks", "Updated", "fits", "highest_of_lines", "update"]

LONGEST = 16  # numbers of a line that is called short


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def fits(item: Item) -> bool:
    """Whether the kernels can take this layer: on a CUDA device where triton is installed, see `launch.fits`."""
    if not item.weight.is_cuda or not _has_triton():
        return False
    from sparselearn.kernels.select import launch

    return launch.fits(item)


def highest_of_lines(score: Tensor, k: int) -> Tensor | None:
    """Bool mask of the k highest along the last dimension, in every line by itself, ties to the lower index.

    None where the kernel cannot take it: elsewhere than on a CUDA device with triton, or lines longer than LONGEST.
    """
    short = score.shape[-1] <= LONGEST and 0 < score.numel() < 2**31 - 2**10
    if not score.is_cuda or not short or not _has_triton():
        return None
    from sparselearn.kernels.select import triton_lines

    return triton_lines.highest(score, k)


def _at_once(items: Sequence[Item], exclude_dropped: bool, reinit: bool) -> Updated | None:
    from sparselearn.kernels.select import launch

    return launch.update(items, exclude_dropped=exclude_dropped, reinit=reinit)


def kind(item: Item) -> tuple[object, ...]:
    """What the items of one set of launches have in common."""
    return item.weight.device, item.weight.dtype, *(t.dtype for t in item.state)


def update(
    items: Sequence[Item], *, exclude_dropped: bool = False, reinit: bool = False
) -> list[tuple[list[int], Updated]]:
    """`reference.update` of those items that the kernels can take, with one wait for each kind of them.

    Returns (indices into items, what `reference.update` gives for these) by kind. Items that are in none were left as
    they were: they do not fit, or among those of their kind is a NaN.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, item in enumerate(items):
        if fits(item):
            kinds.setdefault(kind(item), []).append(i)
    all_done = [(where, _at_once([items[i] for i in where], exclude_dropped, reinit)) for where in kinds.values()]
    return [(where, done) for where, done in all_done if done is not None]
