"""Linear layers whose neurons share their inputs in groups, `ConstantFanIn(group=V)`.

Legend of shape suffixes: T tokens (rows of the input), I inputs, N neurons, V neurons of a group, A active groups,
K inputs of a group.
"""

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselearn.kernels.grouped_fan_in as kernel
from sparselearn.errors import SparsityError
from sparselearn.kernels import crossover
from sparselearn.kernels.condensed.reference import unsigned
from sparselearn.modules.base import SparseModule, apply_product, copied, masked_weight
from sparselearn.modules.condensed import condense, index_dtype


def group_of(mask: Tensor) -> int:
    """The largest number of neighbouring neurons, of those the kernels serve, that share their inputs in a mask [N, I].

    Raises:
        SparsityError: not even 8 do.

    >>> group_of(torch.eye(4).bool().repeat_interleave(16, 0))
    16
    """
    for group in reversed(kernel.GROUPS):
        if len(mask) % group == 0 and _shared(mask, group):
            return group
    raise SparsityError(
        f"A grouped layer needs {kernel.GROUPS[0]} or more neighbouring neurons with the same inputs; those of this "
        f"mask (shape {list(mask.shape)}) have not. Train with `ConstantFanIn(group=32)`, or use `CondensedLinear`."
    )


def _shared(mask: Tensor, group: int) -> bool:
    groups = mask.unflatten(0, (-1, group))
    return bool((groups == groups[:, :1]).all())


def condense_groups(weight: Tensor, mask: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """A masked matrix [N, I] -> values [A, V, K], indices [A, K] (ascending) and active groups [A].

    Raises:
        SparsityError: N is no multiple of V, neurons of a group differ in their inputs, groups in their number.

    >>> condense_groups(torch.tensor([[0., 5., 7.], [0., 6., 8.]]), torch.tensor([[0, 1, 1], [0, 1, 1]]).bool(), 2)[:2]
    (tensor([[[5., 7.],
             [6., 8.]]]), tensor([[1, 2]], dtype=torch.int16))
    """
    if len(mask) % group or not _shared(mask, group):
        raise SparsityError(
            f"A grouped layer needs a multiple of {group} neurons, and the same inputs for all of a group, ablated or "
            f"not; this mask (shape {list(mask.shape)}) has not. Train with `ConstantFanIn(group={group})`."
        )
    rows = mask[::group]
    _, indices, active = condense(rows, rows)
    places = unsigned(indices)[:, None].expand(-1, group, -1)
    return weight.unflatten(0, (-1, group))[active].gather(2, places), indices, active


class GroupedFanInLinear(SparseModule):
    """A linear layer in which groups of V neurons share K inputs; it trains and infers in condensed form.

    y[t, g·V + v] = Σ_k values[g, v, k] · x[t, indices[g, k]] + bias. Values, their gradient and optimizer state are
    [A, V, K]. Takes x [..., I] in the dtype of `values` and returns [..., N]. On CUDA each call is computed in the way
    that `kernels.crossover` measured to be the fastest for its number of tokens, densely where none was; `measure`
    measures. `update_condensed` moves the connections during training. Make one with `from_dense`.

    Attributes:
        way: forces a way of computing: "dense", with the weight written out; "sparse"; or "collected", sparse with the
            gradient of the input, too. None takes the fastest.
        by_feature: lay results out by feature, which another layer of this kind (also after an element-wise function)
            reads without a copy. Layers that read the same x share one copy of it when they are given
            `kernels.grouped_fan_in.by_feature(x)`.

    >>> layer, mask = nn.Linear(64, 32), torch.eye(2, 64).bool().repeat_interleave(16, 0)
    >>> layer.weight.data.masked_fill_(~mask, 0).shape
    torch.Size([32, 64])
    >>> GroupedFanInLinear.from_dense(layer, mask)
    GroupedFanInLinear(in_features=64, out_features=32, group=16, fan_in=1, active=2, bias=True)
    """

    replaces = nn.Linear

    values: nn.Parameter  # [A, V, K]
    indices: Tensor  # [A, K], int16 or int32, ascending in each row
    active: Tensor  # [A], int64, ascending: the groups that have weights
    order: Tensor  # [A·K], int32: places in `indices` by their input
    starts: Tensor  # [I + 1], int32: where in `order` each input begins
    bias: nn.Parameter | None  # [N], of ablated neurons too

    def __init__(self, values: nn.Parameter, indices: Tensor, active: Tensor, bias: nn.Parameter | None,
                 in_features: int, out_features: int) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.by_feature = False
        self._check(values, indices, active)
        self.values = values
        self.bias = bias
        for name in ("indices", "active", "order", "starts"):
            self.register_buffer(name, torch.empty(0), persistent=name in ("indices", "active"))
        self._place(indices, active)

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor, group: int | None = None) -> Self:
        """From an `nn.Linear` and its mask [N, I]. `group`: V, by default the largest that the mask allows; give it
        where the mask will change."""
        weight, mask = masked_weight(layer, mask, nn.Linear)
        layer = cast(nn.Linear, layer)
        values, indices, active = condense_groups(weight, mask, group or group_of(mask))
        parameter = nn.Parameter(values, layer.weight.requires_grad)
        made = cls(parameter, indices, active, copied(layer.bias), layer.in_features, layer.out_features)
        return made.train(layer.training)

    def to_dense(self) -> tuple[nn.Linear, Tensor]:
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.scatter(self.values), self.values.requires_grad)
        layer.register_parameter("bias", copied(self.bias))
        return layer.train(self.training), self.mask

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def group(self) -> int:
        """V: neurons that share their inputs."""
        return self.values.shape[1]

    @property
    def fan_in(self) -> int:
        """K: weights of each active neuron."""
        return self.values.shape[2]

    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size([self.out_features, self.in_features])

    @property
    def neurons(self) -> Tensor:
        """The active neurons [A·V], ascending."""
        within = torch.arange(self.group, device=self.active.device)
        return (self.active[:, None] * self.group + within).flatten()

    def positions(self) -> Tensor:
        """Flat positions of the values [A, V, K] in the dense weight, ascending."""
        rows = self.neurons.view(-1, self.group, 1) * self.in_features
        return rows + unsigned(self.indices)[:, None]

    @property
    def mask(self) -> Tensor:
        """The mask (bool, [N, I]), made anew at each use."""
        return self.scatter(torch.ones_like(self.values, dtype=torch.bool))

    def scatter(self, numbers: Tensor) -> Tensor:
        """One number per value [A, V, K] -> a matrix [N, I], zero where the mask is False."""
        dense = numbers.new_zeros(self.weight_shape.numel())
        dense[self.positions()] = numbers.detach()
        return dense.view(self.weight_shape)

    # ---- other connections -------------------------------------------------------------------------------

    def layout(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions [A, V, K], indices and active groups of another mask [N, I] of the same V."""
        _, indices, active = condense_groups(mask, mask, self.group)
        within = torch.arange(self.group, device=mask.device)
        rows = (active[:, None] * self.group + within)[:, :, None] * self.in_features
        return rows + unsigned(indices)[:, None], indices, active

    def rewire(self, values: nn.Parameter, indices: Tensor, active: Tensor) -> None:
        """Give the layer other connections: a parameter [A, V, K], indices [A, K], active groups [A].

        In place where the sizes stay, so that CUDA graphs go on.
        """
        self._check(values, indices, active)
        self.values = values
        self._place(indices, active)

    def _place(self, indices: Tensor, active: Tensor) -> None:
        device = self.values.device
        indices = indices.to(device, index_dtype(self.in_features))
        buffers = (indices, active.to(device, torch.long), *kernel.by_input(indices, self.in_features))
        for name, new in zip(("indices", "active", "order", "starts"), buffers, strict=True):
            old = getattr(self, name)
            if old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
                old.copy_(new)
            else:
                setattr(self, name, new.clone())

    def _check(self, values: Tensor, indices: Tensor, active: Tensor) -> None:
        """The kernels read memory where the indices point, so what comes from outside is looked at first."""
        shape = values.shape
        if values.ndim != 3 or not values.numel() or indices.shape != (shape[0], shape[2]) or active.shape != shape[:1]:
            raise SparsityError(
                "A grouped layer needs values [A, V, K], indices [A, K] and active [A], none of A, V, K zero; got "
                f"shapes {list(shape)}, {list(indices.shape)} and {list(active.shape)}."
            )
        if not values.is_floating_point() or indices.is_floating_point() or active.is_floating_point():
            raise SparsityError(
                "A grouped layer needs floating-point values and integer indices and active groups; got "
                f"{values.dtype}, {indices.dtype} and {active.dtype}."
            )
        if self.out_features % shape[1]:
            raise SparsityError(f"{self.out_features} neurons cannot be split into groups of {shape[1]}.")
        groups = self.out_features // shape[1]
        for name, tensor, bound in (("indices", unsigned(indices), self.in_features), ("active", active, groups)):
            inside = int(tensor.min()) >= 0 and int(tensor.max()) < bound
            if not inside or not bool((tensor[..., 1:] > tensor[..., :-1]).all()):
                raise SparsityError(
                    f"`{name}` of a grouped layer must ascend (in each row, without repeats) within [0, {bound}); they "
                    f"lie in [{int(tensor.min())}, {int(tensor.max())}]. Build the layer with `from_dense`."
                )

    # ---- the product -------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise SparsityError(f"`GroupedFanInLinear` needs [..., {self.in_features}]; it got {list(x.shape)}.")
        y_TN = apply_product(self._product, x.reshape(-1, self.in_features), self.values, self.bias)
        return y_TN.view(*x.shape[:-1], self.out_features)

    def _product(self, x_TI: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        if self.values.shape[0] * self.group == self.out_features:
            return self._active_product(x_TI, values, bias)
        y_TA = self._active_product(x_TI, values, None)
        shape = (len(x_TI), self.out_features)
        y_TN = y_TA.new_zeros(shape) if bias is None else bias.expand(shape)
        return y_TN.index_add(1, self.neurons, y_TA)

    def _active_product(self, x_TI: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        way = self._way(x_TI, values)
        if way == "dense":
            return F.linear(x_TI, kernel.dense(values, self.indices, self.in_features), bias)
        transposed = (self.order, self.starts) if way == "collected" else None
        return kernel.linear(x_TI, values, self.indices, bias, by_feature=self.by_feature, transposed=transposed)

    def _way(self, x_TI: Tensor, values: Tensor) -> str:
        if not x_TI.is_cuda:
            return self.way or "sparse"
        if x_TI.dtype == torch.float64 or self.group not in kernel.GROUPS:
            return "dense"
        training = torch.is_grad_enabled() and (values.requires_grad or x_TI.requires_grad)
        return self.way or crossover.choose(*self._case(x_TI.dtype, training, x_TI.shape[0]))

    def _case(self, dtype: torch.dtype, training: bool, tokens: int) -> crossover.Case:
        neurons, name = self.values.shape[0] * self.group, crossover.dtype_name(dtype)
        return crossover.Case(
            neurons, self.in_features, self.group, self.fan_in, name, training, crossover.bucket(tokens)
        )

    def measure(self, tokens: int, *, training: bool = False, dtype: torch.dtype | None = None) -> None:
        """Measure on this GPU which way is fastest for so many tokens, where that is not known yet (some seconds).

        Args:
            training: forward and backward, else forward alone.
            dtype: of the product, by default that of `values`; under autocast give its.
        """
        if self.values.is_cuda and self.group in kernel.GROUPS:
            from sparselearn.kernels.crossover_measure import ensure

            ensure(self._case(dtype or self.values.dtype, training, tokens))

    # ---- copies and files --------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Checks what is loaded, and takes over its A and K, so that a run with moving masks can be resumed."""
        saved = [state_dict.get(prefix + name) for name in ("values", "indices", "active")]
        found = all(isinstance(tensor, Tensor) for tensor in saved)
        if found:
            values, indices, active = cast(list[Tensor], saved)
            try:
                self._check(values, indices, active)
            except SparsityError as error:
                raise SparsityError(f"The saved `{prefix.removesuffix('.')}` cannot be loaded. {error}") from error
            if values.shape != self.values.shape:  # in place: an optimizer may hold the parameter already
                self.values.data = self.values.new_empty(values.shape)
                self.values.grad = None
            self._place(indices, active)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}, "
            f"fan_in={self.fan_in}, active={len(self.active)}, bias={self.bias is not None}"
        )


def measure_layers(
    model: nn.Module, tokens: int, *, training: bool = True, dtype: torch.dtype | None = None
) -> None:  # fmt: skip
    """`GroupedFanInLinear.measure` for every such layer of a model; before compiling it."""
    for module in model.modules():
        if isinstance(module, GroupedFanInLinear):
            module.measure(tokens, training=training, dtype=dtype)
