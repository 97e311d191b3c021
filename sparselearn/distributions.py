"""Distributions: the density of every layer from one global density; and whole-number budgets.

A distribution is a function (shapes, density) -> densities by name, in the order of the layers in the model.
Options are keywords; bind them with functools.partial, or `{fn: ..., option: ...}` in a recipe.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparselearn.errors import SparsityError, closest
from sparselearn.structures import Structure, top_indices

Shapes = Mapping[str, torch.Size]
Distribution = Callable[[Shapes, float], dict[str, float]]


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise SparsityError(f"A density must lie in (0, 1], that is, a sparsity in [0, 1); got density {density:g}.")


def uniform(shapes: Shapes, density: float, *, first_dense: bool = False, compensate: bool = False) -> dict[str, float]:
    """The same density everywhere.

    `first_dense` keeps the first layer dense (RigL's uniform, arXiv 1911.11134 §3(1)). `compensate` then takes
    its weights from the other layers so that the global density holds (SRigL's code); where the first layer
    alone is over the budget the others keep `density`, as there.

    >>> uniform({"a": torch.Size([10, 10]), "b": torch.Size([90, 10])}, 0.1, first_dense=True, compensate=True)
    {'a': 1.0, 'b': 0.0}
    """
    _check_density(density)
    result = dict.fromkeys(shapes, density)
    if first_dense and shapes:
        first = next(iter(shapes))
        result[first] = 1.0
        n_first, n_total = shapes[first].numel(), sum(s.numel() for s in shapes.values())
        if compensate and n_total > n_first:
            rest = (density * n_total - n_first) / (n_total - n_first)
            result.update({name: rest for name in shapes if name != first and rest >= 0})
    return result


def uniform_plus(shapes: Shapes, density: float, *, last_density: float = 0.2) -> dict[str, float]:
    """First layer dense, last layer at least `last_density`, the rest share what remains (Random_Pruning code;
    after Gale et al., arXiv 1902.09574).

    Differs: that code divides by the count of all layers and undershoots; here the global density holds.
    """
    _check_density(density)
    names = list(shapes)
    if len(names) < 3:
        raise SparsityError(f"`uniform_plus` needs at least 3 layers; got {len(names)}. Use `uniform`.")
    result = {names[0]: 1.0, names[-1]: max(density, last_density)}
    n = {name: shapes[name].numel() for name in names}
    budget = density * sum(n.values()) - sum(result[name] * n[name] for name in result)
    rest = budget / sum(n[name] for name in names[1:-1])
    if not 0 < rest <= 1:
        raise SparsityError(
            f"`uniform_plus` at density {density:g}: the first and the last layer alone need more than the "
            f"whole budget (the others would get {rest:.4f}). Raise the density or use `erk`."
        )
    return {name: result.get(name, rest) for name in names}


def _er(shapes: Shapes, density: float, raw: Mapping[str, float], name: str) -> dict[str, float]:
    """RigL's fix-point: densities eps·raw; layers that would exceed 1 become dense and leave the sum."""
    _check_density(density)
    n = {layer: shape.numel() for layer, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(n):
        budget = sum(density * n[k] for k in n if k not in dense) - sum((1 - density) * n[k] for k in dense)
        eps = budget / sum(raw[k] * n[k] for k in n if k not in dense)
        if eps <= 0:
            break
        top = max(raw[k] for k in n if k not in dense)
        if top * eps <= 1 + 1e-12:
            return {k: 1.0 if k in dense else min(1.0, eps * raw[k]) for k in n}
        dense |= {k for k in n if k not in dense and raw[k] == top}
    if density == 1:
        return dict.fromkeys(n, 1.0)
    raise SparsityError(f"`{name}` cannot meet density {density:g} on {len(n)} layers. Use `uniform`.")


def er(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdős–Rényi: density ∝ (n_out + n_in)/(n_out·n_in) (Mocanu et al. 2018), kernel dimensions ignored."""
    return _er(shapes, density, {k: (s[0] + s[1]) / (s[0] * s[1]) for k, s in shapes.items()}, "er")


def erk(shapes: Shapes, density: float, *, power: float = 1.0) -> dict[str, float]:
    """Erdős–Rényi-kernel: density ∝ (Σ dims / Π dims)^power (arXiv 1911.11134 §3(1), `erk_power_scale`).

    power = 0 is `uniform`.

    >>> d = erk({"a": torch.Size([10, 10]), "b": torch.Size([100, 100])}, 0.2)
    >>> round(d["a"], 4), round(d["b"], 4)
    (1.0, 0.192)
    """
    return _er(shapes, density, {k: (sum(s) / s.numel()) ** power for k, s in shapes.items()}, "erk")


def balanced(shapes: Shapes, density: float) -> dict[str, float]:
    """The same number of weights in every layer (Random_Pruning code).

    Differs: what small layers cannot hold goes to the others, so that the global density holds.

    >>> s = {"a": torch.Size([10, 10]), "b": torch.Size([20, 20]), "c": torch.Size([40, 40])}
    >>> [round(v, 5) for v in balanced(s, 0.1).values()]
    [0.7, 0.175, 0.04375]
    """
    _check_density(density)
    n = {name: shape.numel() for name, shape in shapes.items()}
    budget, share, left = density * sum(n.values()), 0.0, len(n)
    for size in sorted(n.values()):  # water-filling, smallest layer first
        share = budget / left
        if size >= share:
            break
        budget, left = budget - size, left - 1
    return {name: min(1.0, share / size) for name, size in n.items()}


def pyramidal(shapes: Shapes, density: float) -> dict[str, float]:
    """d_l = r^l for the l-th layer, l = 1..L, with the r in (0, 1] that meets the budget (Random_Pruning code).

    >>> s = {"a": torch.Size([10, 10]), "b": torch.Size([20, 20]), "c": torch.Size([40, 40])}
    >>> round(pyramidal(s, 0.1)["a"], 5)
    0.40301
    """
    _check_density(density)
    sizes = [shape.numel() for shape in shapes.values()]
    budget, low, high = density * sum(sizes), 0.0, 1.0
    for _ in range(200):
        r = (low + high) / 2
        if sum(n * r**i for i, n in enumerate(sizes, 1)) > budget:
            high = r
        else:
            low = r
    return {name: high**i for i, name in enumerate(shapes, 1)}


def explicit(shapes: Shapes, density: float, *, densities: Mapping[str, float]) -> dict[str, float]:
    """Densities by name pattern (as in a shell: `*`, `?`); the first that matches counts.

    Layers that no pattern names share what remains of the global density; a pattern that matches nothing is
    an error. Bind it: partial(explicit, densities={"fc.*": 0.5}).
    """
    _check_density(density)
    result: dict[str, float] = {}
    for pattern, value in densities.items():
        _check_density(value)
        matched = fnmatch.filter(shapes, pattern)
        if not matched:
            raise SparsityError(
                f"`densities` pattern `{pattern!r}` matched no layer. Closest names: {closest(pattern, shapes)}."
            )
        for name in matched:
            result.setdefault(name, value)
    free = [name for name in shapes if name not in result]
    if free:
        n = {name: shape.numel() for name, shape in shapes.items()}
        rest = density * sum(n.values()) - sum(result[k] * n[k] for k in result)
        share = rest / sum(n[k] for k in free)
        if not 0 < share <= 1:
            raise SparsityError(
                f"`explicit` at density {density:g} leaves {share:.4f} for {len(free)} unnamed layers (the first: "
                f"`{free[0]}`); it must lie in (0, 1]. Name them too, or change the densities."
            )
        result.update(dict.fromkeys(free, share))
    return {name: result[name] for name in shapes}


def by_score(shapes: Shapes, density: float, *, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """The per-layer densities that a global ranking of `scores` gives; at least one weight a layer.

    With `snip_scores` or `grasp_scores` these are the SNIP and GraSP ratios of arXiv 2202.02643: only the
    ratios are used, positions are drawn at random.
    """
    _check_density(density)
    missing = [name for name in shapes if name not in scores]
    if missing:
        raise SparsityError(f"`by_score` has no score for `{missing[0]}`. Scores were given for: {list(scores)}.")
    flat = torch.cat([scores[name].reshape(-1).float() for name in shapes])
    chosen = top_indices(flat, round(density * flat.numel()))
    parts = chosen.split([shape.numel() for shape in shapes.values()])
    return {name: max(int(part.sum()), 1) / part.numel() for name, part in zip(shapes, parts, strict=True)}


def _scored(model: nn.Module, names: list[str] | None) -> dict[str, nn.Parameter]:
    named = {k: p for k, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    return {k: p for k, p in named.items() if names is None or k in names}


def snip_scores(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], names: list[str] | None = None
) -> dict[str, Tensor]:
    """|g·w| on one batch for every weight of two or more dimensions (SNIP, arXiv 1810.02340).

    `loss` maps the model to a scalar loss on the batch.
    """
    weights = _scored(model, names)
    grads = torch.autograd.grad(loss(model), list(weights.values()))
    return {k: (g * w).abs().detach() for (k, w), g in zip(weights.items(), grads, strict=True)}


def grasp_scores(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], names: list[str] | None = None
) -> dict[str, Tensor]:
    """w·Hg on one batch: keep what keeps the gradient flowing (GraSP, arXiv 2002.07376, eq. 8, sign as kept)."""
    weights = _scored(model, names)
    params = list(weights.values())
    grads = torch.autograd.grad(loss(model), params, create_graph=True)
    dot = torch.stack([(g * g.detach()).sum() for g in grads]).sum()
    hessian_gradient = torch.autograd.grad(dot, params)
    return {k: (h * w).detach() for (k, w), h in zip(weights.items(), hessian_gradient, strict=True)}


def budgets(
    structure: Structure, shapes: Shapes, densities: Mapping[str, float], most: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Whole numbers of active weights. The only place where a density is rounded.

    Each layer gets what `structure.budget` says, RigL's rounding; where the structure lets nnz vary, single units
    are then taken from the layers that it rounded up most until the total is that of the densities. A layer keeps
    at least one unit, so that a network of tiny layers may stay above the total. `most` bounds the layers it names:
    a method that only prunes cannot give back a weight that an earlier rounding took.

    Differs: RigL rounds each layer by itself; here the global sparsity is exact too.
    """
    most = {name: shape.numel() for name, shape in shapes.items()} | dict(most or {})
    nnz = {name: min(structure.budget(shape, densities[name]), most[name]) for name, shape in shapes.items()}
    wanted = {name: densities[name] * shape.numel() for name, shape in shapes.items()}
    spare = round(sum(wanted.values())) - sum(nnz.values())
    step = 1 if spare > 0 else -1
    units = {name: structure.unit(shape) for name, shape in shapes.items() if not math.isclose(densities[name], 1.0)}
    moved = True
    while spare and moved:  # once, but for layers that cannot take their share
        moved = False
        for name in sorted(units, key=lambda k: -step * (wanted[k] - nnz[k])):
            unit = units[name]
            if unit and unit <= abs(spare) and 0 < nnz[name] + step * unit <= most[name]:
                nnz[name] += step * unit
                spare -= step * unit
                moved = True
    return nnz
