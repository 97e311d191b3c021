"""How many weights of each layer are active, where they may be, and which are at the start."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparselearn.distributions import Distribution, budgets
from sparselearn.errors import SparsityError
from sparselearn.state import generator
from sparselearn.structures import Structure


def checked_sparsity(sparsity: float) -> float:
    """The sparsity, or a clear error."""
    if not 0 <= sparsity < 1:
        raise SparsityError(
            f"`sparsity` is the fraction of zeros and must lie in [0, 1); got {sparsity}. For 90 % write 0.9."
        )
    return sparsity


def required_sparsity(sparsity: float | None, structure: Structure, shapes: Mapping[str, torch.Size]) -> float:
    """The same, where it may be left out if the structure fixes it."""
    shape = next(iter(shapes.values()))
    if structure.unit(shape) == 0:
        fixed = 1 - structure.budget(shape, 1.0) / shape.numel()
        if sparsity is not None and abs(sparsity - fixed) > 1e-3:
            raise SparsityError(
                f"`{structure}` fixes the sparsity to {fixed:g}; `sparsity={sparsity:g}` contradicts it. Leave it "
                "out, or choose another structure; for a dense layer use `exclude`."
            )
        return 0.0
    if sparsity is not None:
        return checked_sparsity(sparsity)
    raise SparsityError("`sparsity` is required with this method: the fraction of zeros, in [0, 1).")


def check_counts(nnz: Mapping[str, int], shapes: Mapping[str, torch.Size]) -> None:
    """Raises where a layer would be empty."""
    for name, n in nnz.items():
        if not 0 < n <= shapes[name].numel():
            raise SparsityError(
                f"`{name}` (shape {list(shapes[name])}) would have {n} active weights; every layer needs at "
                "least one. Lower the sparsity, exclude the layer, or give it a sparsity in `overrides`."
            )


def supports(
    support: float | Mapping[str, Tensor] | None,
    shapes: Mapping[str, torch.Size],
    fixed: Mapping[str, float],
    nnz: Mapping[str, int],
    structure: Structure,
    distribution: Distribution,
    seed: int,
) -> dict[str, Tensor]:
    """Fixed supports by name: drawn at a density, or as given; each with room for its layer's nnz.

    `fixed` names layers outside the distribution, which get no drawn support.
    """
    if support is None:
        return {}
    if isinstance(support, Mapping):
        if unknown := [name for name in support if name not in shapes]:
            raise SparsityError(f"`support` names `{unknown[0]}`, which is not a sparse weight of the model.")
        result = {name: mask.bool() for name, mask in support.items()}
    else:
        free = {name: shape for name, shape in shapes.items() if name not in fixed}
        result = {}
        for name, n in budgets(structure, free, distribution(free, support)).items():
            score = torch.rand(shapes[name], generator=generator(seed, 0, f"support/{name}"))
            result[name] = structure.topk(score, n)
    for name, mask in result.items():
        room = int(mask.sum())
        if mask.shape != shapes[name] or room < nnz[name]:
            raise SparsityError(
                f"The support of `{name}` must have shape {list(shapes[name])} and room for {nnz[name]} "
                f"active weights; it has shape {list(mask.shape)} and room for {room}. Use a denser support."
            )
    return result


def random_score(name: str, shape: torch.Size, support: Tensor | None, seed: int) -> Tensor:
    """Uniform numbers for a layer's first mask, on the CPU; -inf outside its support."""
    score = torch.rand(shape, generator=generator(seed, 0, f"init/{name}"))
    return score if support is None else score.masked_fill(~support.cpu(), -torch.inf)
