"""A condensed layer prepared for fast products: checked once, with the layouts that its kernels want."""

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparselearn.errors import SparsityError
from sparselearn.kernels.condensed.reference import unsigned
from sparselearn.kernels.condensed.torch_ops import TorchOps

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Ops(Protocol):
    """What a back end offers: float32 tensors on the CPU, shapes already checked, values contiguous."""

    def linear(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor: ...
    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor: ...
    def grad_input(self, grad: Tensor, values: Tensor) -> Tensor: ...


class Plan:
    """Indices of a condensed layer in the forms that its kernels read, and the values last given.

    Made by `prepare`. The products take and give float32; bfloat16 and float16 are converted. No gradients here: for
    those, call `linear(x, values, plan, bias)`. Several threads may use one plan at the same time.
    """

    def __init__(self, values: Tensor, indices: Tensor, in_features: int) -> None:
        _check_indices(values, indices, in_features)
        self.in_features = in_features
        self.shape = values.shape
        self._ops = _make_ops(unsigned(indices.detach()), in_features)
        self.set_values(values)

    def set_values(self, values: Tensor) -> None:
        """Other numbers [N, K] for the same indices. Cheap: no layout depends on them. Not copied where float32."""
        self.values = _numbers("values", values, *self.shape).contiguous()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y[b, n] = Σ_k values[n, k] · x[b, indices[n, k]] + bias[n]; x [B, I], bias [N] -> y [B, N] in x's dtype."""
        return self._linear(x, self.values, bias)

    def linear_feature_major(self, xT: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same for activations stored by feature, as between condensed layers: xT [I, B], bias [N] -> [N, B]."""
        return self._linear(xT.mT, self.values, bias).mT.contiguous()

    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor:
        """Σ_b grad[b, n] · x[b, indices[n, k]]; grad [B, N], x [B, I] -> [N, K], float32."""
        x_BI = _numbers("x", x, None, self.in_features)
        return self._ops.grad_values(_numbers("grad", grad, len(x), self.shape[0]), x_BI)

    def grad_input(self, grad: Tensor) -> Tensor:
        """Σ over (n, k) with indices[n, k] = i of grad[b, n] · values[n, k]; grad [B, N] -> [B, I] in grad's dtype."""
        return self._grad_input(grad, self.values)

    def _linear(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            bias = _numbers("bias", bias, None, self.shape[0])
        y_BN = self._ops.linear(_numbers("x", x, None, self.in_features), values, bias)
        return y_BN if x.dtype == y_BN.dtype else y_BN.to(x.dtype)

    def _grad_input(self, grad: Tensor, values: Tensor) -> Tensor:
        return self._ops.grad_input(_numbers("grad", grad, None, self.shape[0]), values).to(grad.dtype)


def _numbers(name: str, tensor: Tensor, rows: int | None, columns: int) -> Tensor:
    """float32 numbers [rows, columns] (None: any number of rows) on the CPU, free of autograd. A bias is [columns]."""
    wanted = [columns] if name == "bias" else ["any" if rows is None else rows, columns]
    shape = tensor.shape
    if (
        len(shape) != len(wanted)
        or shape[-1] != columns
        or (rows is not None and shape[0] != rows)
        or tensor.dtype not in _FLOATS
        or not tensor.is_cpu
    ):
        raise SparsityError(
            f"`{name}` of this condensed product must have shape {list(wanted)} and be float32, "
            f"bfloat16 or float16 on the CPU; it has shape {list(shape)}, {tensor.dtype}, on {tensor.device}. For "
            "other dtypes and devices use `sparselearn.kernels.condensed.reference`."
        )
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def prepare(values: Tensor, indices: Tensor, in_features: int) -> Plan:
    """Check a condensed layer and lay it out for the kernels.

    Args:
        values: [N, K] float32, bfloat16 or float16, on the CPU.
        indices: [N, K] int16, int32 or int64: the inputs of each neuron, in [0, in_features). int16 is read as
            unsigned. Repeats add up.
        in_features: I, the length of the layer's input.

    Raises:
        SparsityError: shapes differ or are empty, a dtype or device is not served, an index is out of bounds.

    >>> plan = prepare(torch.tensor([[1., 10.], [1., 1.]]), torch.tensor([[0, 2], [1, 2]]), in_features=3)
    >>> plan.linear(torch.tensor([[1., 2., 3.]]))
    tensor([[31.,  5.]])
    """
    return Plan(values, indices, in_features)


def linear(x: Tensor, values: Tensor, plan: Plan, bias: Tensor | None = None) -> Tensor:
    """The differentiable product: gradients for x, values and bias. Deterministic, whatever the number of threads.

    Args:
        x: [B, I] float32, bfloat16 or float16.
        values: [N, K]: the numbers that are used; those that the plan holds are not.
        plan: of this layer's indices.
        bias: [N] or None.

    Returns:
        [B, N] in x's dtype: y[b, n] = Σ_k values[n, k] · x[b, indices[n, k]] + bias[n].

    >>> plan = prepare(values := torch.tensor([[1., 10.]], requires_grad=True), torch.tensor([[0, 2]]), in_features=3)
    >>> linear(torch.tensor([[1., 2., 3.]]), values, plan).sum().backward()
    >>> values.grad
    tensor([[1., 3.]])
    """
    if not torch.is_grad_enabled():  # half the overhead of a small call
        return plan._linear(x, _numbers("values", values, *plan.shape).contiguous(), bias)
    return _Linear.apply(x, values, plan, bias)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, plan: Plan, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.plan, ctx.bias_dtype = plan, None if bias is None else bias.dtype
        return plan._linear(x, _numbers("values", values, *plan.shape).contiguous(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        plan: Plan = ctx.plan
        wants_x, wants_values, _, wants_bias = ctx.needs_input_grad
        return (
            plan._grad_input(grad, _numbers("values", values, *plan.shape).contiguous()) if wants_x else None,
            plan.grad_values(grad, x).to(values.dtype) if wants_values else None,
            None,
            grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wants_bias else None,
        )


def _check_indices(values: Tensor, indices: Tensor, in_features: int) -> None:
    """The kernels read memory where the indices point, so these are looked at once, here."""
    if values.ndim != 2 or values.numel() == 0 or indices.shape != values.shape:
        raise SparsityError(
            "A condensed layer needs values and indices of one shape [N, K] with N, K >= 1; got "
            f"{list(values.shape)} and {list(indices.shape)}. Leave neurons without weights out."
        )
    if indices.dtype not in (torch.int16, torch.int32, torch.int64) or indices.device.type != "cpu":
        raise SparsityError(
            f"`indices` of a condensed layer must be int16, int32 or int64 on the CPU; they are {indices.dtype} on "
            f"{indices.device}."
        )
    low, high = (int(bound) for bound in unsigned(indices).aminmax())
    if low < 0 or high >= in_features:
        raise SparsityError(
            f"`indices` of a condensed layer must lie in [0, {in_features}) (its `in_features`); they lie in "
            f"[{low}, {high}]."
        )


def _make_ops(indices: Tensor, in_features: int) -> Ops:
    """The compiled loops where numba is installed and two bytes can name an input and a neuron, else torch."""
    with contextlib.suppress(ImportError):
        from sparselearn.kernels.condensed.cpu import LIMIT, NumbaOps

        if max(len(indices), in_features) <= LIMIT:
            return NumbaOps(indices, in_features)
    return TorchOps(indices, in_features)
