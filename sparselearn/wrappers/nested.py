"""DRESS: several sparse networks in one set of weights, each inside the one before, switchable at run time."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparselearn.errors import SparsityError
from sparselearn.sparsifier import Sparsifier
from sparselearn.state import pack, unpack
from sparselearn.structures import ConstantFanIn, top_indices


def row_masks(weight: Tensor, mask: Tensor, densities: Sequence[float]) -> list[Tensor]:
    """Masks nested in `mask`, the same number of weights in every row: the highest |w| of each row.

    Args:
        weight, mask: [out, in, ...]; every row of the mask that is not empty has as many weights as any other.
        densities: descending; densities[0] stands for all of `mask`, the others for their share of it, rounded.
    """
    score = weight.detach().abs().float().masked_fill(~mask, -torch.inf).flatten(1)
    fan_in = int(mask.flatten(1).sum(1).max())
    nested, inside = [], score
    for density in densities:
        k = max(1, round(density / densities[0] * fan_in))
        chosen = torch.stack([top_indices(row, k) for row in inside])
        inside = inside.masked_fill(~chosen, -torch.inf)
        nested.append((chosen & (inside > -torch.inf)).view(mask.shape))
    return nested


class NestedSubnets(nn.Module):
    """K subnets M_1 ⊃ ... ⊃ M_K of one sparse model, trained jointly (DRESS, Gao et al., arXiv 2207.00670).

    `sparsifier` holds M_1 (static(structure=ConstantFanIn()), the density of the first subnet). Call the module with
    `subnet=k`; each subnet has batch norms of its own. In a step, add up the losses and go back once:

        loss = sum(criterion(nested(x, subnet=k), y) for k in range(3)) / 3

    then `optimizer.step()` of the SparseOptimizer, which has `nested.parameters()`, and `nested.refresh()` once an
    epoch; a change of the sparsifier's masks refreshes by itself. `nested.export(k)` is a plain model with subnet k's
    weights. `state_dict()` holds the masks, too.

    Args:
        densities: descending, the first that of the sparsifier; where its distribution gives a layer another density,
            the layer's subnets have the same shares of it.

    Differs: only the abstract was read, and no fidelity is claimed; the losses' weights π_k are the caller's (the
    paper's choice is not known), and M_1 is the sparsifier's mask, not chosen anew from dense weights.
    """

    def __init__(self, model: nn.Module, sparsifier: Sparsifier, densities: Sequence[float]) -> None:
        super().__init__()
        if not isinstance(sparsifier.method.structure, ConstantFanIn):
            raise SparsityError("`NestedSubnets` needs a sparsifier with the structure `ConstantFanIn()`.")
        descending = list(densities) == sorted(set(densities), reverse=True)
        if not densities or not descending or not 0 < densities[-1] <= densities[0] <= 1:
            raise SparsityError(f"`densities` must descend within (0, 1]; got {list(densities)}.")
        self.model, self.sparsifier, self.densities = model, sparsifier, tuple(densities)
        norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
        self._norm_names = norms
        self.norms = nn.ModuleList(
            nn.ModuleList(copy.deepcopy(model.get_submodule(name)) for name in norms) for _ in densities[1:]
        )
        self._masks: list[dict[str, Tensor]] = []
        self.refresh()
        sparsifier.on_update(self.refresh)

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the nested masks anew from the weights."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        self._masks = [{} for _ in self.densities]
        for name, mask in self.sparsifier.masks.items():
            for k, nested in enumerate(row_masks(named[name], mask, self.densities)):
                self._masks[k][name] = nested

    def get_extra_state(self) -> list[dict[str, Tensor]]:
        """For `state_dict`: the masks, one bit per weight."""
        return [{name: pack(mask).cpu() for name, mask in masks.items()} for masks in self._masks]

    def set_extra_state(self, state: list[dict[str, Tensor]]) -> None:
        """For `load_state_dict`."""
        now = self.sparsifier.masks
        self._masks = [
            {name: unpack(bits.to(now[name].device), now[name].shape) for name, bits in masks.items()}
            for masks in state
        ]

    def masks(self, subnet: int) -> dict[str, Tensor]:
        """The masks of one subnet, by name."""
        if not 0 <= subnet < len(self.densities):
            raise SparsityError(
                f"`subnet` must be one of 0 to {len(self.densities) - 1}, the densest first; got {subnet}."
            )
        return self._masks[subnet]

    def _values(self, subnet: int) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] * mask for name, mask in self.masks(subnet).items()}

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
