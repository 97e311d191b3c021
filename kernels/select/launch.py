"""Starts the kernels: the same few launches for any number of layers, and one wait at the end."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sparselearn.kernels.devices import on
from sparselearn.kernels.masked_optimizer.launch import to_device
from sparselearn.kernels.select import triton_kernels as kernels
from sparselearn.kernels.select import triton_search
from sparselearn.kernels.select.reference import Item, Masks, Updated

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LOW = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # bits of the key that are always zero
ROUNDS = 4  # of counting, 8 bits each of 31
BLOCK, STEPS, WARPS, SAMPLE = 512, 32, 4, 8192
GUESS_WARPS, NARROW_WARPS = 16, 8
GROUP, TILE = 16, 512  # packed keys: one program for those of GROUP others, TILE slots of the buffer at once


def layout(t: Tensor) -> tuple[int, int] | None:
    """(inner, channels): [out, channels, inner] lies in memory as [out, inner, channels]; (1, 1) where nothing moves.
    None for tensors that lie otherwise."""
    if t.is_contiguous():
        return 1, 1
    if t.ndim > 2 and t.movedim(1, -1).is_contiguous():
        return t.shape[2:].numel(), t.shape[1]
    return None


def order(t: Tensor) -> list[int]:
    """Strides of dimensions longer than 1; those of others say nothing, and differ between a 1×1 convolution's weight
    and its gradient."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def fits(item: Item) -> bool:
    """Whether the kernels can take this layer: dtypes, at most three states of one dtype, one layout, size."""
    w = item.weight
    bools, alike = (item.mask, item.grown, item.fired), (item.grad, *item.state)
    return (
        w.is_cuda and w.dtype in DTYPES and item.grad.dtype == w.dtype and len(item.state) <= 3
        and len({t.dtype for t in item.state} | {torch.float32}) <= 2
        and all(t.dtype in DTYPES for t in item.state) and all(t.dtype == torch.bool for t in bools)
        and layout(w) is not None and 0 < w.numel() < 2**31 - 2**17
        and all(t.device == w.device and t.shape == w.shape and order(t) == order(w) for t in (*bools, *alike))
    )  # fmt: skip


@lru_cache(maxsize=8)
def blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """int32 [programs, 2] = (segment, block of it), and each segment's first program."""
    counts = torch.tensor([-(-size // block) for size in sizes])
    first = counts.cumsum(0) - counts
    segment = torch.arange(len(sizes)).repeat_interleave(counts)
    number = torch.arange(int(counts.sum())) - first[segment]
    return torch.stack([segment, number], 1).int().to(device), first.tolist()


def table(items: Sequence[Item], masks: Sequence[Masks], first: Sequence[int], exclude_dropped: bool) -> Tensor:
    """int64 [segments, ROW], on the host; the columns are those of `triton_kernels`."""
    rows = []
    for item, new, program in zip(items, masks, first, strict=True):
        n, never = item.weight.numel(), item.n_active if exclude_dropped else item.n_keep
        old = [t.data_ptr() for t in item[:5]]
        states = [*(t.data_ptr() for t in item.state), 0, 0, 0][:3]
        numbers = [n, *(layout(item.weight) or ()), program, item.n_keep, item.n_active, item.n_grow, n - never]
        rows.append(old + states + [t.data_ptr() for t in new] + numbers)
    return torch.tensor(rows)


def update(
    items: Sequence[Item], *, exclude_dropped: bool = False, reinit: bool = False, block: int = BLOCK,
    steps: int = STEPS, warps: int = WARPS, sample: int = SAMPLE,
) -> Updated | None:  # fmt: skip
    """`reference.update`, bit for bit, of items of one `kind` that all fit.

    Args:
        block, steps: a program sees `steps` blocks of `block` weights, a power of 2; a thread at most 255 of them.
        sample: weights of a layer that its threshold is guessed from, a power of 2.
    """
    w, device = items[0].weight, items[0].weight.device
    masks = [Masks(*(torch.empty_like(item.mask) for _ in range(4))) for item in items]
    with on(device):
        sizes = tuple(item.weight.numel() for item in items)
        programs, first = blocks(sizes, block * steps, device)
        groups, _ = blocks(sizes, block * steps * GROUP, device)
        rows = table(items, masks, first, exclude_dropped)
        aligned = bool((rows[:, : triton_search.SIZE.value + 1] % 16 == 0).all())
        rows = to_device(rows, device)
        zeros = torch.zeros(1 + 4 * len(items), dtype=torch.int32, device=device)
        bad, totals = zeros[:1], zeros[1:]
        squares = torch.empty(len(programs), device=device)
        shared = {
            "W": DTYPES[w.dtype], "LOW": LOW[w.dtype], "STRIDED": any(layout(i.weight) != (1, 1) for i in items),
        }  # fmt: skip
        passes = shared | {"ALIGNED": aligned, "BLOCK": block, "STEPS": steps}
        passes |= {"LANES": 32 * warps, "num_warps": warps}
        drop, grow = (
            Search(rows, programs, groups, bad, {"GROW": grow, "EXCLUDE": exclude_dropped and grow}, passes)
            for grow in (False, True)
        )
        drop.guess(drop, shared, sample)
        kernels.drop_kernel[(len(programs),)](rows, programs, *drop.all, **passes)
        dropped = drop.find()
        grow.guess(drop, shared, sample)
        kernels.grow_kernel[(len(programs),)](
            rows, programs, *dropped, *grow.all, squares, EXCLUDE=exclude_dropped, **passes
        )
        state = items[0].state
        kernels.apply_kernel[(len(programs),)](
            rows, programs, *grow.find(), bad, totals, EXCLUDE=exclude_dropped, REINIT=reinit,
            STATES=len(state), S=DTYPES[state[0].dtype if state else w.dtype], **passes,
        )  # fmt: skip
        numbers = torch.cat([zeros, squares.double().sum().view(1)]).tolist()  # the one wait
    if numbers[0]:
        return None
    active, grown, earlier, survivors = (list(map(int, numbers[1 + i : -1 : 4])) for i in range(4))
    return Updated(masks, active, sum(grown), sum(earlier), sum(survivors), numbers[-1])


class Search:
    """The threshold of each segment: of what to drop, or of what to grow."""

    def __init__(
        self, rows: Tensor, programs: Tensor, groups: Tensor, bad: Tensor, what: dict[str, Any], passes: dict[str, Any]
    ) -> None:
        integers: dict[str, Any] = {"dtype": torch.int32, "device": rows.device}
        self.rows, self.groups, self.bad, self.what, self.passes = rows, groups, bad, what, passes
        self.search = torch.empty((len(rows), triton_search.SEARCH.value), **integers)
        self.counts = torch.zeros((len(rows), triton_search.COUNTS.value), **integers)
        self.tallies = torch.empty((len(programs), triton_search.TALLY.value), **integers)
        self.lengths = torch.empty((len(programs), passes["LANES"]), **integers)
        self.ties = torch.empty(len(programs), **integers)
        self.all = self.search, self.counts, self.tallies, self.lengths

    def guess(self, drop: "Search", shared: dict[str, Any], sample: int) -> None:
        triton_search.guess_kernel[(len(self.rows),)](
            self.rows, self.search, drop.search, **self.what, **shared, SAMPLE=sample, num_warps=GUESS_WARPS
        )

    def find(self) -> tuple[Tensor, Tensor, Tensor]:
        """After the pass over the layer: each segment's threshold; the ties of each program, and their running sum."""
        rows, grow = self.rows, self.what["GROW"]
        tiles = self.what | self.passes | {"GROUP": GROUP, "TILE": TILE}
        triton_search.judge_kernel[(len(rows),)](
            rows, self.search, self.counts, self.bad, GROW=grow, LOW=self.passes["LOW"], num_warps=1
        )
        for i in range(ROUNDS):
            triton_search.count_kernel[(len(self.groups),)](rows, self.groups, *self.all, MANY=i == 0, **tiles)
            triton_search.narrow_kernel[(len(rows),)](
                rows, self.search, self.counts, self.bad, GROW=grow, LAST=i == ROUNDS - 1, num_warps=NARROW_WARPS
            )
        triton_search.ties_kernel[(len(self.groups),)](
            rows, self.groups, self.search, self.tallies, self.lengths, self.ties, **tiles
        )
        return self.search, self.ties, self.ties.cumsum(0)
