"""DRESS: several sparse networks in one set of weights, each inside the one before, switchable at run time."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparselearn.errors import SparsityError
from sparselearn.sparsifier import Sparsifier
from sparselearn.structures import ConstantFanIn, top_indices


def row_masks(weight: Tensor, mask: Tensor, densities: Sequence[float]) -> list[Tensor]:
    """Masks nested in `mask`, the same number of weights in every row: the highest |w| of each row.

    Args:
        weight, mask: [out, in, ...]; every row of the mask has as many weights as any other.
        densities: of each mask, as fractions of the row, not above the mask's.
    """
    score = weight.detach().abs().float().masked_fill(~mask, -torch.inf).flatten(1)
    fan_in = score.shape[1]
    nested, inside = [], score
    for density in densities:
        k = max(1, round(density * fan_in))
        chosen = torch.stack([top_indices(row, k) for row in inside])
        inside = inside.masked_fill(~chosen, -torch.inf)
        nested.append((chosen & (inside > -torch.inf)).view(mask.shape))
    return nested


class NestedSubnets(nn.Module):
    """K subnets M_1 ⊃ ... ⊃ M_K of one sparse model, trained jointly (DRESS, Gao et al., arXiv 2207.00670).

    `sparsifier` holds M_1 (static(structure=ConstantFanIn()), the density of the first subnet). Call the module with
    `subnet=k`; each subnet has batch norms of its own. In a step, add up the losses and go back once:

        loss = sum(criterion(nested(x, subnet=k), y) for k in range(3)) / 3

    then `optimizer.step()` of the SparseOptimizer, and `nested.refresh()` once an epoch. `nested.export(k)` is a plain
    model with subnet k's weights.

    Args:
        densities: descending, the first that of the sparsifier.

    Differs: only the abstract was read; the losses' weights π_k are the caller's (the paper's choice is not known).
    """

    def __init__(self, model: nn.Module, sparsifier: Sparsifier, densities: Sequence[float]) -> None:
        super().__init__()
        if not isinstance(sparsifier.method.structure, ConstantFanIn):
            raise SparsityError("`NestedSubnets` needs a sparsifier with the structure `ConstantFanIn()`.")
        if list(densities) != sorted(set(densities), reverse=True) or not 0 < densities[-1] <= densities[0] <= 1:
            raise SparsityError(f"`densities` must descend within (0, 1]; got {list(densities)}.")
        self.model, self.sparsifier, self.densities = model, sparsifier, tuple(densities)
        norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
        self._norm_names = norms
        self.norms = nn.ModuleList(
            nn.ModuleList(copy.deepcopy(model.get_submodule(name)) for name in norms) for _ in densities[1:]
        )
        self._masks: list[dict[str, Tensor]] = []
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the nested masks anew from the weights."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        self._masks = [{} for _ in self.densities]
        for name, mask in self.sparsifier.masks.items():
            for k, nested in enumerate(row_masks(named[name], mask, self.densities)):
                self._masks[k][name] = nested & mask

    def masks(self, subnet: int) -> dict[str, Tensor]:
        """The masks of one subnet, by name."""
        return self._masks[subnet]

    def _values(self, subnet: int) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] * mask for name, mask in self._masks[subnet].items()}

    def _own_norms(self, subnet: int) -> dict[str, nn.Module]:
        """The batch norms of a subnet; the first uses the model's."""
        if subnet == 0:
            return {}
        own = self.norms[subnet - 1]
        assert isinstance(own, nn.ModuleList)
        return dict(zip(self._norm_names, own, strict=True))

    def forward(self, *args: Any, subnet: int = 0, **kwargs: Any) -> Any:
        """The output of one subnet; 0 is the densest."""
        values: dict[str, Tensor] = self._values(subnet)
        for name, norm in self._own_norms(subnet).items():
            values |= {f"{name}.{key}": p for key, p in [*norm.named_parameters(), *norm.named_buffers()]}
        return torch.func.functional_call(self.model, values, args, kwargs)

    def export(self, subnet: int) -> nn.Module:
        """A copy of the model with this subnet's weights and norms."""
        model = copy.deepcopy(self.model)
        for name, norm in self._own_norms(subnet).items():
            model.get_submodule(name).load_state_dict(norm.state_dict())
        named = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in self._values(subnet).items():
                named[name].copy_(value)
        return model
