"""What users compare methods by: numbers about masks and how they move, and the table of a sparse model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparselearn import distributed
from sparselearn.selection import Weight
from sparselearn.state import LayerState


def dead_neurons(mask: Tensor) -> int:
    """Outputs (rows of [out, in, ...]) without an active weight."""
    return int((~mask.flatten(1).any(1)).sum())


def gradient_norm(grads: Mapping[str, Tensor], layers: Mapping[str, LayerState], known: float = 0.0) -> float:
    """√Σ(g⊙M)² over all layers: the gradient flow of a sparse network (arXiv 2102.01732). `known` joins the sum."""
    squares = []
    for name, grad in grads.items():
        masked = grad.masked_fill(layers[name].inactive, 0)
        squares.append(distributed.full(masked.float().square().sum()))
    if squares:
        known += float(torch.stack([square.to(squares[0].device) for square in squares]).sum())
    return math.sqrt(known)


def of_masks(layers: Mapping[str, LayerState]) -> dict[str, float]:
    """Metrics of the masks as they are, by name.

    sparsity, nnz: over all sparse weights. density/<layer>: nnz / size. dead_neurons: outputs without an active weight,
    over all layers. exploration_rate: the fraction of weights that have been active at any time (ITOP's R_s, arXiv
    2102.02887), where masks move.
    """
    size = sum(layer.mask.numel() for layer in layers.values())
    nnz = sum(layer.nnz for layer in layers.values())
    values = {"sparsity": 1 - nnz / size, "nnz": float(nnz)}
    values |= {f"density/{name}": layer.nnz / layer.mask.numel() for name, layer in layers.items()}
    values["dead_neurons"] = float(sum(dead_neurons(distributed.full(layer.mask)) for layer in layers.values()))
    fired = [layer.memory["fired"] for layer in layers.values() if "fired" in layer.memory]
    if fired:
        values["exploration_rate"] = sum(int(distributed.full(f).sum()) for f in fired) / sum(f.numel() for f in fired)
    return values


def table(weights: Mapping[str, Weight], layers: Mapping[str, LayerState], values: Callable[[str], Tensor]) -> str:
    """Per layer: shape, density of the mask, nnz, and nonzero weights (fewer, just after growth at zero)."""
    rows = [("layer", "shape", "density", "nnz", "nonzero", "nonzero density")]
    nonzero_total, size_total, nnz_total = 0, 0, 0
    for name in weights:
        layer = layers[name]
        shape, nonzero = layer.mask.shape, int((values(name) != 0).sum())
        n = shape.numel()
        nonzero_total, size_total, nnz_total = nonzero_total + nonzero, size_total + n, nnz_total + layer.nnz
        dims = "x".join(map(str, shape))
        rows.append((name, dims, f"{layer.nnz / n:.4f}", f"{layer.nnz:,}", f"{nonzero:,}", f"{nonzero / n:.4f}"))
    rows.append(
        ("total", f"{size_total:,}", f"{nnz_total / size_total:.4f}", f"{nnz_total:,}", f"{nonzero_total:,}",
         f"{nonzero_total / size_total:.4f}")
    )  # fmt: skip
    return aligned(rows)


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns of text, the first two to the left, a rule below the first row and above the last."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def group_changes(old: Tensor, new: Tensor, m: int) -> float:
    """The fraction of groups of m along dimension 1 whose mask changed; sizes that m does not divide count as 0."""
    if old.shape[1] % m:
        return 0.0
    return float((old != new).movedim(1, -1).unflatten(-1, (-1, m)).any(-1).float().mean())


def flips(old: Tensor, new: Tensor) -> Tensor:
    """Σ|M - M'|, a 0-d tensor: the layer's sparse architecture divergence (SAD, arXiv 2102.04010 §3.2)."""
    return (old != new).sum()


def of_samples(samples: Mapping[str, Sequence[tuple[Any, Any]]]) -> dict[str, float]:
    """Flips and groups as (value, positions) per layer, noise as `noise` gives it, to numbers over all layers."""
    values: dict[str, float] = {}
    if flipped := samples.get("flips"):
        values["sad"] = float(sum(int(count) for count, _ in flipped))
        values["flip_rate"] = values["sad"] / sum(n for _, n in flipped)
    if groups := samples.get("groups"):
        values["groups_changed"] = sum(float(share) * n for share, n in groups) / sum(n for _, n in groups)
    if seen := samples.get("noise"):
        total = sum(float(square) for _, square in seen)
        values["gradient_noise"] = math.sqrt(sum(float(square) for square, _ in seen) / total) if total else 0.0
    return values


def noise(grad: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Σ(g⊙(1-M))² and Σg² as 0-d tensors: how much of the gradient reaches weights that forward does not use."""
    squares = grad.float().square()
    return squares.masked_fill(mask, 0).sum(), torch.sum(squares)
