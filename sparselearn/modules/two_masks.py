"""Layers with one N:M mask for the forward pass and another for the gradient of their input (BDWP, Bi-Mask).

    Y = X·(W⊙M_F)ᵀ        dX = G·(W⊙M_B)        dW = GᵀX, to all of the dense W

Both products are then N:M along the dimension that they sum over, without one mask that serves both ways. The gradient
of the input is biased on purpose. Such layers keep their dense weights and need no Sparsifier; `finish` makes them
exactly sparse.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from sparselearn.errors import SparsityError
from sparselearn.structures import NM

Kind = Literal["bdwp", "bi_mask"]


class TwoMasks(torch.autograd.Function):
    """Linear or convolution with these masks; see above. `conv` holds stride, padding, dilation and groups."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, forward: Tensor, backward: Tensor, conv: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, backward)
        ctx.conv, ctx.biased = conv, bias is not None
        masked = weight.masked_fill(~forward, 0)
        return F.linear(x, masked, bias) if conv is None else F.conv2d(x, masked, bias, *conv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, backward = ctx.saved_tensors
        masked = weight.masked_fill(~backward, 0).to(grad.dtype)
        outputs = 1 if ctx.conv is not None else grad.ndim - 1
        bias = grad.sum([d for d in range(grad.ndim) if d != outputs]) if ctx.biased else None
        if ctx.conv is None:
            rows = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            return grad @ masked, rows.to(weight.dtype), bias, None, None, None
        to_input = conv2d_input(x.shape, masked, grad, *ctx.conv)
        to_weight = conv2d_weight(x, weight.shape, grad, *ctx.conv)
        return to_input, to_weight, bias, None, None, None


class _Masked(nn.Module):
    """What both layers share: the masks, chosen from the dense weight in every `every`-th training pass."""

    weight: Any
    bias: Any
    forward_mask: Tensor
    backward_mask: Tensor
    passes: Tensor

    def set_up(self, n: int, m: int, every: int, kind: Kind, seed: int) -> None:
        self.n, self.m, self.every, self.kind, self.seed = n, m, every, kind, seed
        for name in ("forward_mask", "backward_mask"):
            self.register_buffer(name, torch.ones_like(self.weight, dtype=torch.bool))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose both masks from the dense weight."""
        score = self.weight.abs().float()
        along_inputs, along_outputs = NM(self.n, self.m), NM(self.n, self.m, dim=0)
        self.forward_mask.copy_(along_inputs.topk(score, along_inputs.budget(score.shape, 1.0)))
        nnz = along_outputs.budget(score.shape, 1.0)
        if self.kind == "bdwp":
            self.backward_mask.copy_(along_outputs.topk(score, nnz))
            return
        kept = score.masked_fill(~self.forward_mask, 0)
        generator = torch.Generator().manual_seed(self.seed + int(self.passes))
        best, most = self.backward_mask, -1.0
        for _ in range(100):
            order = torch.randperm(len(kept), generator=generator).to(kept.device)
            mask = torch.empty_like(best)
            mask[order] = along_outputs.topk(kept[order], nnz)
            if (total := float(kept.masked_fill(~mask, 0).sum())) > most:
                best, most = mask, total
        self.backward_mask.copy_(best & self.forward_mask)

    def _apply_masks(self, x: Tensor, conv: Any) -> Tensor:
        if self.training:
            if int(self.passes) % self.every == 0:
                self.refresh()
            self.passes += 1
        out: Tensor = TwoMasks.apply(x, self.weight, self.bias, self.forward_mask, self.backward_mask, conv)
        return out


class TwoMaskLinear(_Masked, nn.Linear):
    """nn.Linear with two masks; made by `two_masks`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_masks(x, None)


class TwoMaskConv2d(_Masked, nn.Conv2d):
    """nn.Conv2d (zero padding) with two masks; made by `two_masks`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_masks(x, (self.stride, self.padding, self.dilation, self.groups))


def _layers(model: nn.Module) -> Iterator[_Masked]:
    return (module for module in model.modules() if isinstance(module, _Masked))


def two_masks(
    model: nn.Module,
    n: int,
    m: int,
    *,
    every: int = 1,
    kind: Kind = "bdwp",
    exclude: tuple[str, ...] = (),
    seed: int = 0,
) -> nn.Module:
    """Turn the Linear and Conv2d layers of a model into layers with two N:M masks, in place; returns the model.

    Parameters, their names and the optimizer that holds them stay. Convolutions group over input channels forward and
    over output channels backward.

    Args:
        every: training forward passes between choices of the masks.
        kind: "bdwp" (arXiv 2309.13015): M_B is the best mask of the dense weight along the outputs. "bi_mask" (Zhang et
            al., arXiv 2302.06058): M_B is within M_F, from the forward weights, after the best of 100 random
            permutations of the outputs; its authors refresh every 100 passes.
        exclude: names of layers to leave dense.

    Raises:
        SparsityError: a layer whose inputs or outputs are no multiple of m; `exclude` names no layer.

    Differs: BDWP's paper was read in its abstract alone; no fidelity is claimed. Bi-Mask's SR-STE decay is weight decay
    of the user's own.

    >>> model = two_masks(nn.Sequential(nn.Linear(8, 4)), 2, 4)
    >>> model(torch.randn(2, 8)).sum().backward()
    >>> int((finish(model)[0].weight != 0).sum())
    16
    """
    names = dict(model.named_modules())
    if unknown := [name for name in exclude if name not in names]:
        raise SparsityError(f"`exclude` names `{unknown[0]}`, which is no layer of the model.")
    for name, module in names.items():
        if name in exclude or type(module) not in (nn.Linear, nn.Conv2d):
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            raise SparsityError(f"`{name}`: two masks need zero padding given in numbers. Leave it out with `exclude`.")
        module.__class__ = TwoMaskLinear if isinstance(module, nn.Linear) else TwoMaskConv2d
        assert isinstance(module, _Masked)
        try:
            module.set_up(n, m, every, kind, seed)
        except SparsityError as error:
            raise SparsityError(f"`{name}`: {error}") from error
    return model


@torch.no_grad()
def finish(model: nn.Module) -> nn.Module:
    """Back to ordinary layers with exactly N:M weights, in place: those of the forward masks; returns the model."""
    for module in list(_layers(model)):
        module.refresh()
        module.weight.masked_fill_(~module.forward_mask, 0)
        for name in ("forward_mask", "backward_mask", "passes"):
            delattr(module, name)
        module.__class__ = nn.Linear if isinstance(module, TwoMaskLinear) else nn.Conv2d  # type: ignore[assignment]
    return model
