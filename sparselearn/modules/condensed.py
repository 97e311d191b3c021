"""Constant fan-in layers in condensed form (SRigL, arXiv 2305.02299, sec. 4.4).

Legend of shape suffixes: B rows of the input, I inputs, N neurons, A active neurons, K weights per active neuron.
"""

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselearn.kernels.condensed as kernel
from sparselearn.errors import SparsityError
from sparselearn.kernels import crossover
from sparselearn.kernels.condensed import triton as gpu
from sparselearn.modules.base import SparseModule, apply_product, copied, masked_weight


def condense(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A masked matrix [N, I] -> values [A, K], indices [A, K] (ascending in each row) and active neurons [A].

    Raises:
        SparsityError: the active rows of the mask differ in their number of weights, or no row is active.

    >>> condense(torch.tensor([[0., 5., 7.], [0., 0., 0.]]), torch.tensor([[0, 1, 1], [0, 0, 0]]).bool())[:2]
    (tensor([[5., 7.]]), tensor([[1, 2]], dtype=torch.int16))
    """
    counts = mask.sum(1)
    active = counts.nonzero().view(-1)
    if not len(active):
        raise SparsityError("A condensed layer needs at least one active weight; the mask has none. Leave it dense.")
    fan_in = int(counts[active[0]])
    if bool((counts[active] != fan_in).any()):
        low, high = int(counts[active].min()), int(counts.max())
        raise SparsityError(
            "A condensed layer needs rows that all have K active weights, or none; the rows of this mask (shape "
            f"{list(mask.shape)}) have from {low} to {high}. Train with `ConstantFanIn`, or use `CsrLinear`, which "
            "holds rows of any length."
        )
    indices = mask[active].nonzero()[:, 1].view(-1, fan_in)
    values = weight[active].gather(1, indices)
    return values, indices.to(index_dtype(mask.shape[1])), active


def index_dtype(columns: int) -> torch.dtype:
    """The smallest type that can name this many inputs."""
    return torch.int16 if columns <= 2**15 else torch.int32


def _ascending(indices: Tensor, bound: int) -> bool:
    inside = int(indices.min()) >= 0 and int(indices.max()) < bound
    return inside and bool((indices[..., 1:] > indices[..., :-1]).all())


def _check(values: Tensor, indices: Tensor, active: Tensor, rows: int, columns: int) -> None:
    """The kernels read memory where the indices point, so what comes from outside is looked at first."""
    if values.ndim != 2 or values.numel() == 0 or indices.shape != values.shape or active.shape != values.shape[:1]:
        raise SparsityError(
            "A condensed layer needs values [A, K], indices [A, K] and active [A] with A, K >= 1; got shapes "
            f"{list(values.shape)}, {list(indices.shape)} and {list(active.shape)}."
        )
    if not values.is_floating_point() or indices.is_floating_point() or active.is_floating_point():
        raise SparsityError(
            "A condensed layer needs floating-point values and integer indices and active neurons; got "
            f"{values.dtype}, {indices.dtype} and {active.dtype}."
        )
    for name, tensor, bound in (("indices", indices, columns), ("active", active, rows)):
        if not _ascending(tensor, bound):
            raise SparsityError(
                f"`{name}` of a condensed layer must ascend (in each row, without repeats) within [0, {bound}); "
                f"they lie in [{int(tensor.min())}, {int(tensor.max())}]. Build the layer with `from_dense`."
            )


class _Condensed(SparseModule):
    """Active neurons' values and indices, and the product with a matrix of inputs [B, I]."""

    values: nn.Parameter  # [A, K]
    indices: Tensor  # [A, K], int16 or int32: which inputs, ascending in each row
    active: Tensor  # [A], int64, ascending: the neurons that have weights
    bias: nn.Parameter | None  # [N], of ablated neurons too

    def __init__(self, values: nn.Parameter, indices: Tensor, active: Tensor, bias: nn.Parameter | None,
                 shape: torch.Size) -> None:  # fmt: skip
        super().__init__()
        self.weight_shape = shape  # of the dense weight
        self._plan: kernel.Plan | None = None
        _check(values, indices, active, *self._matrix)
        if bias is not None and bias.shape != shape[:1]:
            raise SparsityError(f"The bias must have shape {list(shape[:1])}; it has {list(bias.shape)}.")
        self.values = values
        self.bias = bias
        self.register_buffer("indices", indices.to(index_dtype(self._matrix[1])))
        self.register_buffer("active", active.long())

    @property
    def _matrix(self) -> tuple[int, int]:
        """The dense weight as a matrix: neurons, inputs of each."""
        return self.weight_shape[0], self.weight_shape[1:].numel()

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def fan_in(self) -> int:
        """K: weights of each active neuron."""
        return self.values.shape[1]

    @property
    def mask(self) -> Tensor:
        """The mask (bool, like the dense weight), made anew at each use."""
        mask = torch.zeros(self._matrix, dtype=torch.bool, device=self.values.device)
        mask[self.active[:, None], self.indices.long()] = True
        return mask.view(self.weight_shape)

    def scatter(self, numbers: Tensor) -> Tensor:
        """One number per value [A, K] -> a tensor like the dense weight, zero where the mask is False."""
        dense = numbers.new_zeros(self._matrix)
        dense[self.active[:, None], self.indices.long()] = numbers.detach()
        return dense.view(self.weight_shape)

    def positions(self) -> Tensor:
        """Flat positions of the values [A, K] in the dense weight, ascending."""
        return self.active[:, None] * self._matrix[1] + self.indices.long()

    def layout(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions [A, K], indices and active neurons of another mask."""
        _, indices, active = condense(mask.flatten(1), mask.flatten(1))
        return active[:, None] * self._matrix[1] + indices.long(), indices, active

    def rewire(self, values: nn.Parameter, indices: Tensor, active: Tensor) -> None:
        """Give the layer other connections: a parameter [A, K], indices [A, K], active neurons [A]."""
        _check(values, indices, active, *self._matrix)
        self.values = values
        self.indices = indices.to(self.values.device, index_dtype(self._matrix[1]))
        self.active = active.to(self.values.device, torch.long)
        self._plan = None

    # ---- the product -------------------------------------------------------------------------------------

    def _input_indices(self) -> tuple[Tensor, int]:
        """Indices into the columns of the input matrix, and the number of its columns."""
        return self.indices, self._matrix[1]

    def _product(self, x_BI: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        if not x_BI.is_cpu:
            return self._gpu_product(x_BI, values, bias)
        if x_BI.dtype == torch.float64:
            return kernel.reference.linear(x_BI, values, self._input_indices()[0], bias)
        plan = self._plan
        if plan is None:  # two threads may both build it; either will do
            plan = self._plan = kernel.prepare(values, *self._input_indices())
        return kernel.linear(x_BI, values, plan, bias)

    def _gpu_product(self, x_BI: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """By the kernel for few tokens where that is the faster way (or forced), else with the weight written out."""
        indices, inputs = self._input_indices()
        served = x_BI.is_cuda and 0 < x_BI.shape[0] <= gpu.MAX_TOKENS and x_BI.dtype in gpu.FLOATS
        if served and (self.way or crossover.choose(*self._case(x_BI.dtype, x_BI.shape[0]))) == "sparse":
            return gpu.linear(x_BI, values, indices, bias)
        return F.linear(x_BI, gpu.dense(values, indices, inputs), bias)

    def _case(self, dtype: torch.dtype, tokens: int) -> crossover.Case:
        (neurons, fan_in), inputs = self.values.shape, self._input_indices()[1]
        name = crossover.dtype_name(dtype)
        return crossover.Case(neurons, inputs, 1, fan_in, name, False, crossover.bucket(tokens))

    def measure(self, tokens: int) -> None:
        if self.values.is_cuda and tokens <= gpu.MAX_TOKENS:
            from sparselearn.kernels.crossover_measure import ensure

            ensure(self._case(self.values.dtype, tokens))

    def _neurons(self, x_BI: Tensor) -> Tensor:
        """[B, I] -> [B, N]. Ablated neurons emit their bias."""
        return apply_product(self._emit, x_BI, self.values, self.bias)

    def _emit(self, x_BI: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        if len(self.active) == self._matrix[0]:
            return self._product(x_BI, values, bias)
        y_BA = self._product(x_BI, values, None)
        shape = (len(x_BI), self._matrix[0])
        y_BN = y_BA.new_zeros(shape) if bias is None else bias.expand(shape)
        return y_BN.index_add(1, self.active, y_BA)

    # ---- copies and files --------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._plan = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None}  # rebuilt where it is needed; it may hold pointers

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Checks what is loaded, and takes over its A and K, so that a run with moving masks can be resumed."""
        saved = [state_dict.get(prefix + name) for name in ("values", "indices", "active")]
        if all(isinstance(tensor, Tensor) for tensor in saved):
            values, indices, active = cast(list[Tensor], saved)
            try:
                _check(values, indices, active, *self._matrix)
            except SparsityError as error:
                raise SparsityError(f"The saved `{prefix.removesuffix('.')}` cannot be loaded. {error}") from error
            if values.shape != self.values.shape:  # in place: an optimizer may hold the parameter already
                self.values.data = self.values.new_empty(values.shape)
                self.values.grad = None
                self.indices = self.indices.new_empty(indices.shape)
                self.active = self.active.new_empty(active.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._plan = None


class CondensedLinear(_Condensed):
    """A linear layer of constant fan-in: y[b, n] = Σ_k values[n, k] · x[b, indices[n, k]] + bias[n].

    Only active neurons have rows in `values` [A, K] and `indices` [A, K]; the others emit their bias. Takes x
    [..., I] in the dtype of `values` (on the CPU bfloat16 and float16 by conversion, float64 by the plain formula) and
    returns [..., N]; values, bias and x get gradients. On CUDA up to 16 tokens are computed by a sparse kernel where
    `kernels.crossover` measured it to be faster (`way="sparse"` forces it), all else with the weight written out. Make
    one with `from_dense`.

    >>> layer, mask = nn.Linear(4, 2), torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).bool()
    >>> layer.weight.data.masked_fill_(~mask, 0).shape
    torch.Size([2, 4])
    >>> CondensedLinear.from_dense(layer, mask)
    CondensedLinear(in_features=4, out_features=2, fan_in=2, active=2, bias=True)
    """

    replaces = nn.Linear

    def __init__(self, values: nn.Parameter, indices: Tensor, active: Tensor, bias: nn.Parameter | None,
                 in_features: int, out_features: int) -> None:  # fmt: skip
        super().__init__(values, indices, active, bias, torch.Size([out_features, in_features]))
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor) -> Self:
        """From an `nn.Linear` and its mask [N, I], whose rows have K active weights each, or none."""
        weight, mask = masked_weight(layer, mask, nn.Linear)
        layer = cast(nn.Linear, layer)
        values, indices, active = condense(weight, mask)
        parameter = nn.Parameter(values, layer.weight.requires_grad)
        made = cls(parameter, indices, active, copied(layer.bias), layer.in_features, layer.out_features)
        return made.train(layer.training)

    def to_dense(self) -> tuple[nn.Linear, Tensor]:
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.scatter(self.values), self.values.requires_grad)
        layer.bias = copied(self.bias)  # type: ignore[assignment]
        return layer.train(self.training), self.mask

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise SparsityError(
                f"`CondensedLinear` has {self.in_features} inputs; it got a tensor of shape {list(x.shape)}."
            )
        return self._neurons(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, fan_in={self.fan_in}, "
            f"active={len(self.active)}, bias={self.bias is not None}"
        )


class CondensedConv2d(_Condensed):
    """A 2-d convolution whose filters have constant fan-in over in·kh·kw; ablated filters emit their bias.

    The patches of the input are unfolded to rows [B·L, in·kh·kw], which is kh·kw times the input's memory. Stride,
    padding of every mode, dilation and groups are those of the `nn.Conv2d`. Make one with `from_dense`.
    """

    replaces = nn.Conv2d

    def __init__(self, values: nn.Parameter, indices: Tensor, active: Tensor, bias: nn.Parameter | None,
                 conv: nn.Conv2d) -> None:  # fmt: skip
        """`conv` gives the geometry; its weight and bias are not read."""
        super().__init__(values, indices, active, bias, conv.weight.shape)
        self.geometry = {name: getattr(conv, name) for name in _GEOMETRY}
        self._padding = list(conv._reversed_padding_repeated_twice)  # as F.pad wants it; "same" is resolved

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor) -> Self:
        """From an `nn.Conv2d` and its mask [N, in/groups, kh, kw]; filters have K active weights each, or none."""
        weight, mask = masked_weight(layer, mask, nn.Conv2d)
        layer = cast(nn.Conv2d, layer)
        values, indices, active = condense(weight, mask)
        parameter = nn.Parameter(values, layer.weight.requires_grad)
        return cls(parameter, indices, active, copied(layer.bias), layer).train(layer.training)

    def to_dense(self) -> tuple[nn.Conv2d, Tensor]:
        layer = nn.Conv2d(**self.geometry, bias=False, device="meta")
        layer.weight = nn.Parameter(self.scatter(self.values), self.values.requires_grad)
        layer.bias = copied(self.bias)
        return layer.train(self.training), self.mask

    def _input_indices(self) -> tuple[Tensor, int]:
        groups = self.geometry["groups"]
        neurons, columns = self._matrix
        if groups == 1:
            return self.indices, columns
        group = self.active // (neurons // groups)
        return self.indices.int() + (group * columns).int()[:, None], groups * columns

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or x.shape[-3] != self.geometry["in_channels"]:
            raise SparsityError(
                f"`CondensedConv2d` needs [B, {self.geometry['in_channels']}, H, W] (B may be left out); it got "
                f"{list(x.shape)}."
            )
        if any(self._padding):
            mode = self.geometry["padding_mode"]
            x = F.pad(x, self._padding, "constant" if mode == "zeros" else mode)
        kernel_size, stride, dilation = (self.geometry[name] for name in ("kernel_size", "stride", "dilation"))
        size = [
            (length - d * (k - 1) - 1) // s + 1
            for length, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation, strict=True)
        ]
        # Unfolding gives feature-major memory, [I, B·L]; the kernels take it as it is, and answer in kind.
        columns = F.unfold(x, kernel_size, dilation, stride=stride).movedim(-2, 0)  # [I, (B,) L]
        y_NB = self._neurons(columns.reshape(len(columns), -1).T).T
        return y_NB.reshape(len(y_NB), *columns.shape[1:]).movedim(0, -2).reshape(*x.shape[:-3], len(y_NB), *size)

    def extra_repr(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.geometry.items())
        return f"{shown}, fan_in={self.fan_in}, active={len(self.active)}, bias={self.bias is not None}"


_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
