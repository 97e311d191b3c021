"""Remove ablated neurons for good, together with the inputs of the layer that reads them."""

from typing import cast

import torch
from torch import Tensor, nn

from sparselearn.errors import SparsityError
from sparselearn.modules.base import copied
from sparselearn.modules.condensed import CondensedLinear

# Each output depends on the input at its own position alone, and on nothing that is drawn or remembered.
ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Threshold,
)  # fmt: skip


def remove_ablated(model: nn.Module) -> list[str]:
    """Shrink every `CondensedLinear` with ablated neurons inside the model's nn.Sequentials, where that is safe.

    Safe is: elementwise activations follow, then an nn.Linear or `CondensedLinear` that reads them, each of the
    layers used at this one place and without hooks. Other layers stay as they are. In place; returns the names of
    the layers that shrank. Outputs stay the same up to rounding. Cannot be undone; see `shrink`.
    """
    uses: dict[nn.Module, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            if child is not None:
                uses[child] = uses.get(child, 0) + 1
    shrunk = []
    for path, chain in model.named_modules():
        if type(chain) is not nn.Sequential:
            continue
        layers = list(chain)
        for i, first in enumerate(layers):
            after = [j for j in range(i + 1, len(layers)) if type(layers[j]) not in ELEMENTWISE]
            if not after or not isinstance(first, CondensedLinear) or len(first.active) == first.out_features:
                continue
            last = after[0]
            hooked = any(m._forward_hooks or m._forward_pre_hooks for m in layers[i : last + 1])
            if not hooked and uses[first] == uses[layers[last]] == 1:
                try:
                    pair = shrink(first, layers[i + 1 : last], layers[last])
                except SparsityError:
                    continue
                chain[i], chain[last] = pair
                layers = list(chain)
                shrunk.append(f"{path}.{i}" if path else str(i))
    return shrunk


@torch.no_grad()
def shrink(
    first: CondensedLinear, activations: list[nn.Module], second: nn.Module
) -> tuple[CondensedLinear, nn.Linear | CondensedLinear]:
    """Two layers that compute `second(activations(first(x)))` without first's ablated neurons.

    An ablated neuron emits the constant c = act(bias); its weight w in the second layer adds w·c to every output,
    which moves into the second layer's bias. The caller makes sure that nothing else reads what `first` emits.

    In a `CondensedLinear` that reads ablated neurons, each such weight becomes a zero at an input that its neuron did
    not have, so that the fan-in stays constant; if the layers are trained further, these weights are live.

    Raises:
        SparsityError: an activation that is not known to act on each number by itself; a second layer of another kind
            or width, or with more weights per neuron than inputs remain.
    """
    for activation in activations:
        if type(activation) not in ELEMENTWISE:
            raise SparsityError(
                f"An ablated neuron can be removed only through elementwise activations; {type(activation).__name__} "
                "is not known to be one. Leave the neurons in place."
            )
    if type(second) not in (nn.Linear, CondensedLinear) or cast(nn.Linear, second).in_features != first.out_features:
        raise SparsityError(
            f"The layer after {first.out_features} neurons must be an nn.Linear or CondensedLinear of as many inputs; "
            f"got {second!r}."
        )
    constant = first.values.new_zeros(first.out_features) if first.bias is None else first.bias.detach().clone()
    for activation in activations:
        constant = activation(constant)
    constant[first.active] = 0
    bias = None if first.bias is None else nn.Parameter(first.bias.detach()[first.active], first.bias.requires_grad)
    everyone = torch.arange(len(first.active), device=first.active.device)
    smaller = CondensedLinear(
        nn.Parameter(first.values.detach().clone(), first.values.requires_grad), first.indices, everyone, bias,
        first.in_features, len(everyone),
    )  # fmt: skip
    shrunk = _fewer_inputs(cast(nn.Linear | CondensedLinear, second), first.active, constant)
    return smaller.train(first.training), shrunk.train(second.training)


def _fewer_inputs(layer: nn.Linear | CondensedLinear, stay: Tensor, constant: Tensor) -> nn.Linear | CondensedLinear:
    """The layer reading only the inputs `stay`; what the others contribute, being constant, is in its bias."""
    if isinstance(layer, CondensedLinear):
        added = layer.values.new_zeros(layer.out_features)
        added[layer.active] = (layer.values * constant[layer.indices.long()]).sum(1)
    else:
        added = layer.weight @ constant
    bias = copied(layer.bias)
    if bias is not None:
        bias.add_(added)
    elif bool((added != 0).any()):
        bias = nn.Parameter(added)
    if isinstance(layer, CondensedLinear):
        values, indices = _repointed(layer, stay)
        return CondensedLinear(
            nn.Parameter(values, layer.values.requires_grad), indices, layer.active, bias, len(stay), layer.out_features
        )
    made = nn.Linear(len(stay), layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(layer.weight[:, stay], layer.weight.requires_grad)
    made.bias = bias  # type: ignore[assignment]
    return made


def _repointed(layer: CondensedLinear, stay: Tensor) -> tuple[Tensor, Tensor]:
    """Values and indices into the inputs `stay`; a weight of another input becomes 0 at the first free one."""
    if layer.fan_in > len(stay):
        raise SparsityError(
            f"Only {len(stay)} inputs remain for a layer with {layer.fan_in} weights per neuron. Leave the neurons in "
            "place."
        )
    weight, mask = layer.scatter(layer.values)[layer.active][:, stay], layer.mask[layer.active][:, stay]
    missing = layer.fan_in - mask.sum(1, keepdim=True)
    free = ~mask
    mask |= free & (free.cumsum(1) <= missing)
    return weight[mask].view(-1, layer.fan_in), mask.nonzero()[:, 1].view(-1, layer.fan_in)
