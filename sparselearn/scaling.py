"""Density scaling: initial variance and learning rate of sparse layers, so that training does not depend on density.

A unit that sums over ρ·n inputs instead of n has an output variance ρ times smaller, and each optimizer step moves
its output ρ times less. After Dey et al., "Sparse maximal update parameterization" (SμPar, arXiv 2405.15743), a layer
of density ρ therefore has

    initial weights · ρ^(-1/2)          learning rate · ρ^(-1)          weight decay · ρ

The rate's rule is the same for both families of optimizers, for two reasons. Adam-type: |Δw| ≈ lr, so the output
moves by lr·Σ|x| over ρ·n inputs. SGD-type: Δw = lr·δ·x, so it moves by lr·δ·Σx² over ρ·n inputs, and δ, the gradient of
the output, does not depend on ρ once the initial variance is corrected (as μP's 1/width for SGD has no counterpart:
the head does not shrink with density). `tests/test_scaling.py` checks both in a coordinate check.

Differs: the paper scales by ρ/ρ_base against a tuned base model; here ρ_base = 1, the dense model whose learning rate
the user has. The weight decay's factor keeps lr·weight_decay, the fraction that a step decays, as in the dense model;
it is ours.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OWN_KEYS = ("params", "lr", "weight_decay")


def rate_multiplier(density: float) -> float:
    """The factor of the learning rate of a layer of this density."""
    return 1.0 / density


@torch.no_grad()
def rescale_initial(weight: Tensor, mask: Tensor, fan_in_dims: tuple[int, ...], by: str) -> None:
    """Scale initial weights in place for the inputs that the mask leaves.

    by = "density": all by ρ^(-1/2) (SμPar). by = "fan_in": each output by √(fan-in / its active inputs), so that the
    variance is right for every neuron (Evci et al., arXiv 2010.03533, eq. 2); a neuron without inputs is left alone.
    """
    if by == "density":
        weight.mul_((mask.numel() / mask.sum()) ** 0.5)
    elif by == "fan_in":
        active = mask.sum(dim=fan_in_dims, keepdim=True)
        fan_in = 1
        for dim in fan_in_dims:
            fan_in *= mask.shape[dim]
        weight.mul_((fan_in / active.clamp(min=1)).sqrt().to(weight.dtype))


def scaled_groups(optimizer: Optimizer, multipliers: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    """The optimizer's groups, split where weights have a learning rate of their own.

    Each part is a copy of its group with lr·m and weight_decay/m; `merge_groups` carries back what an optimizer writes
    into its group. The optimizer's own groups, which schedulers and checkpoints see, stay as they are.
    """
    groups = []
    for group in optimizer.param_groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(multipliers.get(parameter, 1.0), []).append(parameter)
        for multiplier, parameters in parts.items():
            part = {**group, "params": parameters, "lr": group["lr"] * multiplier}
            if "weight_decay" in group:
                part["weight_decay"] = group["weight_decay"] / multiplier
            groups.append(part)
    return groups


def merge_groups(originals: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    """Write back to each original group what the optimizer changed in its parts (counters kept in groups)."""
    owner = {id(p): group for group in originals for p in group["params"]}
    for part in parts:
        group = owner[id(part["params"][0])]
        group.update({k: v for k, v in part.items() if k not in OWN_KEYS})
