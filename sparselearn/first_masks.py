"""How many weights of each layer are active, where they may be, and which are at the start."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselearn.distributions import Distribution, budgets
from sparselearn.errors import SparsityError
from sparselearn.schedules import DensitySchedule
from sparselearn.selection import Weight, match_all
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


def overridden(overrides: Mapping[str, float] | None, weights: Mapping[str, Weight]) -> dict[str, float]:
    """Density by name of the layers that `overrides` (pattern -> sparsity) takes out of the distribution."""
    return {
        name: 1 - checked_sparsity(value)
        for pattern, value in reversed(list((overrides or {}).items()))
        for name in match_all("overrides", [pattern], weights)[pattern]
    }


@dataclass(frozen=True)
class Budgets:
    """nnz of every layer, by the distribution at the global density of the moment.

    Args:
        shapes: of all sparse weights.
        distribution, density: the global density at the end, and how layers share it.
        overrides: density of layers outside the distribution.
    """

    shapes: Mapping[str, torch.Size]
    distribution: Distribution
    density: float
    overrides: Mapping[str, float]

    def __call__(
        self,
        structure: Structure | None,
        schedule: DensitySchedule | None,
        step: int,
        most: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """At a step of the density's schedule, in masks of this structure (None = dense); at most `most` if given."""
        if structure is None:
            return {name: shape.numel() for name, shape in self.shapes.items()}

        def at(density: float) -> float:
            return density if schedule is None else schedule(step, density)

        free = {name: shape for name, shape in self.shapes.items() if name not in self.overrides}
        most = None if most is None else {name: most[name] for name in free}
        try:
            nnz = budgets(structure, free, self.distribution(free, at(self.density)), most) if free else {}
            for name, density in self.overrides.items():
                nnz[name] = structure.budget(self.shapes[name], at(density) if density < 1 else 1.0)
        except SparsityError as error:
            raise SparsityError(self._blame(structure, str(error))) from error
        self._check(nnz)
        return {name: nnz[name] for name in self.shapes}

    def _blame(self, structure: Structure, message: str) -> str:
        """The message with the name of the layer that the structure refused, if it was one."""
        for name, shape in self.shapes.items():
            try:
                structure.budget(shape, 1.0)
            except SparsityError as error:
                return f"`{name}`: {error} Or leave this layer out with `exclude`."
        return message

    def _check(self, nnz: Mapping[str, int]) -> None:
        for name, n in nnz.items():
            if not 0 < n <= self.shapes[name].numel():
                raise SparsityError(
                    f"`{name}` (shape {list(self.shapes[name])}) would have {n} active weights; every layer needs at "
                    "least one. Lower the sparsity, exclude the layer, or give it a sparsity in `overrides`."
                )

    def supports(
        self, support: float | Mapping[str, Tensor] | None, nnz: Mapping[str, int], structure: Structure, seed: int
    ) -> dict[str, Tensor]:
        """Fixed supports by name: drawn at a density for the layers of the distribution, or as given; each with room
        for its layer's nnz."""
        if support is None:
            return {}
        if isinstance(support, Mapping):
            if unknown := [name for name in support if name not in self.shapes]:
                raise SparsityError(f"`support` names `{unknown[0]}`, which is not a sparse weight of the model.")
            result = {name: mask.bool().clone() for name, mask in support.items()}
        else:
            free = {name: shape for name, shape in self.shapes.items() if name not in self.overrides}
            result = {}
            for name, n in budgets(structure, free, self.distribution(free, support)).items():
                score = torch.rand(self.shapes[name], generator=generator(seed, 0, f"support/{name}"))
                result[name] = structure.topk(score, n)
        for name, mask in result.items():
            room = int(mask.sum())
            if mask.shape != self.shapes[name] or room < nnz[name]:
                raise SparsityError(
                    f"The support of `{name}` must have shape {list(self.shapes[name])} and room for {nnz[name]} "
                    f"active weights; it has shape {list(mask.shape)} and room for {room}. Use a denser support."
                )
        return result


def random_score(name: str, shape: torch.Size, support: Tensor | None, seed: int) -> Tensor:
    """Uniform numbers for a layer's first mask, on the CPU; -inf outside its support."""
    score = torch.rand(shape, generator=generator(seed, 0, f"init/{name}"))
    return score if support is None else score.masked_fill(~support.cpu(), -torch.inf)
