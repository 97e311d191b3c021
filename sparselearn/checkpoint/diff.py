"""What changed between two checkpoints: the overlap of their masks, and how many weights kept their value."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparselearn.checkpoint.export import read_any
from sparselearn.checkpoint.tensors import tied_names
from sparselearn.errors import SparsityError, closest


@dataclass(frozen=True)
class WeightDiff:
    """Counts for one weight, or their sums over all.

    A weight without a mask in either checkpoint has no kept counts, and all its entries are compared. Where one has a
    mask, a missing one means that all entries are kept, and entries that neither keeps are not compared: they are zero
    in both and would pass for an unchanged weight.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    kept_a: int
    kept_b: int
    shared: int  # kept by both
    compared: int
    equal_bf16: int  # same bits after rounding to bfloat16
    equal_fp32: int  # same bits in float32 (in float64, where one of the two is)
    max_abs: float  # largest |a - b| in float32 (float64); nan where only one is nan

    @property
    def jaccard(self) -> float | None:
        """Kept by both / kept by one of them; None where neither keeps any or there are no masks."""
        union = self.kept_a + self.kept_b - self.shared
        return self.shared / union if union else None

    @property
    def kept_fraction(self) -> float | None:
        """The part of a's kept weights that b keeps; None where a keeps none or there are no masks."""
        return self.shared / self.kept_a if self.kept_a else None

    @property
    def bf16_fraction(self) -> float | None:
        """Update sparsity: the part of the compared weights with the same bfloat16 bits; None where there are none."""
        return self.equal_bf16 / self.compared if self.compared else None

    @property
    def fp32_fraction(self) -> float | None:
        """The part of the compared weights with the same float32 bits; None where there are none."""
        return self.equal_fp32 / self.compared if self.compared else None


@dataclass(frozen=True)
class Diff:
    """Per weight, in the order of the first checkpoint, and in total."""

    weights: tuple[WeightDiff, ...]
    total: WeightDiff


def diff(a: str | Path | Mapping[str, Tensor], b: str | Path | Mapping[str, Tensor]) -> Diff:
    """Compare the floating-point tensors of two checkpoints of one model; tied weights count once.

    bfloat16 rounds small updates away, so that update sparsity measured in it (arXiv:2505.11711) says less than the
    float32 figure beside it wherever float32 weights are at hand. Equal means equal bits: 0.0 and -0.0 differ.

    Args:
        a, b: a sparse checkpoint, a legacy one, a Hugging Face folder, a safetensors file, or a state dict (which has
            no masks).

    Raises:
        SparsityError: the two have different names or shapes.

    >>> before, after = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([1.0, 2.001, 4.0, 0.0])
    >>> total = diff({"weight": before}, {"weight": after}).total
    >>> total.bf16_fraction, total.fp32_fraction, total.max_abs
    (0.75, 0.5, 1.0)
    """
    (state_a, masks_a), (state_b, masks_b) = read_any(a), read_any(b)
    for one, other, which in ((state_a, state_b, "second"), (state_b, state_a, "first")):
        if missing := [name for name in tied_names(one) if name not in other]:
            raise SparsityError(
                f"`{missing[0]}` is not in the {which} checkpoint ({len(missing)} such names); both must hold the same "
                f"model. Closest there: {closest(missing[0], other)}."
            )
    weights = tuple(
        _compare(name, state_a[name], state_b[name], masks_a.get(name), masks_b.get(name))
        for name in tied_names(state_a)
        if state_a[name].is_floating_point()
    )
    return Diff(weights, _total(weights))


def _compare(name: str, a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> WeightDiff:
    if a.shape != b.shape:
        raise SparsityError(
            f"`{name}` must have one shape in both checkpoints; it is {list(a.shape)} in the first and {list(b.shape)} "
            "in the second. Compare checkpoints of the same model."
        )
    shape, kept_a, kept_b, shared = a.shape, 0, 0, 0
    if mask_a is not None or mask_b is not None:
        every = torch.ones(shape, dtype=torch.bool)
        mask_a, mask_b = every if mask_a is None else mask_a, every if mask_b is None else mask_b
        kept_a, kept_b, shared = (int(mask.sum()) for mask in (mask_a, mask_b, mask_a & mask_b))
        either = mask_a | mask_b
        a, b = a[either], b[either]
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    x, y = a.detach().cpu().to(wide), b.detach().cpu().to(wide)
    equal = _bits(x) == _bits(y)
    change = (x - y).abs().masked_fill(equal, 0)
    return WeightDiff(
        name=name,
        shape=tuple(shape),
        size=shape.numel(),
        kept_a=kept_a,
        kept_b=kept_b,
        shared=shared,
        compared=x.numel(),
        equal_bf16=int((_bits(x.bfloat16()) == _bits(y.bfloat16())).sum()),
        equal_fp32=int(equal.sum()),
        max_abs=float(change.max()) if change.numel() else 0.0,
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _total(weights: tuple[WeightDiff, ...]) -> WeightDiff:
    largest = torch.tensor([weight.max_abs for weight in weights], dtype=torch.float64)
    return WeightDiff(
        name="total",
        shape=(),
        size=sum(weight.size for weight in weights),
        kept_a=sum(weight.kept_a for weight in weights),
        kept_b=sum(weight.kept_b for weight in weights),
        shared=sum(weight.shared for weight in weights),
        compared=sum(weight.compared for weight in weights),
        equal_bf16=sum(weight.equal_bf16 for weight in weights),
        equal_fp32=sum(weight.equal_fp32 for weight in weights),
        max_abs=float(largest.max()) if weights else 0.0,  # unlike Python's max, it never drops a nan
    )
