"""The products as torch operators: autograd, `torch.compile(fullgraph=True)` and CUDA graphs work through them.

On CUDA they run the Triton kernels, elsewhere the formulas of `reference.py`.

    sparselearn::grouped_linear        forward; differentiable in x, values and bias
    sparselearn::grouped_grad_values   gradient of the values
    sparselearn::grouped_grad_input    gradient of the input
    sparselearn::grouped_scores        |dL/dW| summed over groups, for growth
    sparselearn::by_feature            a copy of activations that is laid out by feature; differentiable
    sparselearn::grouped_dense         the weight written out; differentiable
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.kernels.condensed.reference import unsigned
from sparselearn.kernels.grouped_fan_in import reference
from sparselearn.kernels.grouped_fan_in.layout import activations, is_by_feature

GROUPS = (8, 16, 32, 64, 128)  # V that the kernels serve
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
MIN_BY_FEATURE = 17  # tokens from which gathering from a transposed copy beats gathering single numbers
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None, *,
    activation: str = "none", by_feature: bool = False, transposed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """activation(Σ_k values[g, v, k] · x[t, indices[g, k]] + bias[g·V + v]), with gradients for x, values and bias.

    Deterministic. The gradient of x is a dense product with the weight written out again, or, with `transposed`, two
    sparse steps (about V >= 64 or 95 % sparsity; see `kernels.crossover`, which measures).

    Args:
        x: [T, I] float32, bfloat16 or float16, of any strides. Inputs that lie by feature (`is_by_feature`, as the
            results of `by_feature=True` do) are read in place; others are transposed first.
        values: [G, V, K] like x; on CUDA V is 8, 16, 32, 64 or 128.
        indices: [G, K] int16 (unsigned), int32 or int64 in [0, I), distinct in each row. Not looked at here.
        bias: [G·V] like x, or None.
        activation: "none", "relu", "gelu" or "silu"; inside the kernel where no gradients are needed.
        by_feature: lay the result out by feature, as the next of these layers reads it without a copy.
        transposed: `layout.by_input(indices, I)`.

    Returns:
        [T, G·V].

    Raises:
        SparsityError: shapes or dtypes do not fit together.

    >>> x, indices = torch.tensor([[1., 2., 3.]]), torch.tensor([[0, 2]])
    >>> linear(x, torch.tensor([[[1., 10.], [1., -1.]]]), indices, activation="relu")
    tensor([[31.,  0.]])
    """
    _check(x, values, indices, bias, activation)
    native = is_by_feature(x)
    if x.is_cuda and not native and x.shape[0] >= MIN_BY_FEATURE:
        x = torch.ops.sparselearn.by_feature(x)
    order, starts = transposed or (None, None)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, values, bias))
    fused = "none" if needs_grad else activation
    y = torch.ops.sparselearn.grouped_linear(x, values, indices, bias, order, starts, fused, by_feature, native)
    return y if fused == activation else ACTIVATIONS[activation](y)  # type: ignore[no-any-return]


def by_feature(x: Tensor) -> Tensor:
    """A copy of activations [..., I] that lies by feature, for several layers that read the same x.

    A layer copies what is not by feature itself; q, k and v, or gate and up, share one copy when they are given this
    one. Cast x to the dtype of the products first. The gradient comes back token by token, summed before its own copy.

    >>> x = by_feature(torch.ones(2, 3, 8))
    >>> x.shape, x.stride()
    (torch.Size([2, 3, 8]), (3, 1, 16))
    """
    if x.ndim == 0:
        raise SparsityError("Activations to lay out by feature need the shape [..., I]; got a single number.")
    flat = torch.ops.sparselearn.by_feature(x.reshape(-1, x.shape[-1]))
    return flat.view(x.shape)  # type: ignore[no-any-return]


def dense(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """`reference.dense`, differentiable in values: on CUDA every number of the weight is written once."""
    if values.is_cuda and (values.dtype not in _FLOATS or values.shape[1] not in GROUPS):
        return reference.dense(values, indices, in_features)
    return torch.ops.sparselearn.grouped_dense(values, indices, in_features)  # type: ignore[no-any-return]


def scores(grad: Tensor, x: Tensor, group: int) -> Tensor:
    """Σ_v |Σ_t grad[t, g·V + v] · x[t, i]|, float32; grad [T, N], x [T, I] of any strides -> [G, I].

    The gradient of the dense weight [N, I] is never stored.
    """
    if grad.ndim != 2 or x.ndim != 2 or len(grad) != len(x) or grad.shape[1] % group:
        raise SparsityError(
            f"Scores of groups of {group} need grad [T, N] and x [T, I], N a multiple of {group}; got "
            f"{list(grad.shape)} and {list(x.shape)}."
        )
    return torch.ops.sparselearn.grouped_scores(grad, x, group)  # type: ignore[no-any-return]


def _check(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, activation: str) -> None:
    shape = values.shape
    if x.ndim != 2 or len(shape) != 3 or indices.shape != (shape[0], shape[2]) or values.numel() == 0:
        raise SparsityError(
            "A grouped product needs x [T, I], values [G, V, K] and indices [G, K], none of G, V, K zero; got "
            f"{list(x.shape)}, {list(shape)} and {list(indices.shape)}."
        )
    if bias is not None and bias.shape != (shape[0] * shape[1],):
        raise SparsityError(f"The bias must have shape [{shape[0] * shape[1]}]; it has {list(bias.shape)}.")
    if activation not in ACTIVATIONS:
        raise SparsityError(f"`activation` must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
    dtypes = {t.dtype for t in (x, values, bias) if t is not None}
    if len(dtypes) > 1:
        raise SparsityError(
            f"x, values and bias of a grouped product must have one dtype; they have {_names(dtypes)}. Convert with "
            "`.to()`."
        )
    if x.is_cuda and (x.dtype not in _FLOATS or shape[1] not in GROUPS):
        raise SparsityError(
            f"On CUDA grouped products serve groups of {', '.join(map(str, GROUPS))} neurons in float32, bfloat16 and "
            f"float16; got groups of {shape[1]} in {x.dtype}. Use the dense layer."
        )


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _filled(out: Tensor, numbers: Tensor) -> Tensor:
    return out.copy_(numbers)


# ---- the operators -----------------------------------------------------------------------------------------


@torch.library.custom_op("sparselearn::by_feature", mutates_args=())
def _by_feature(x: Tensor) -> Tensor:
    if x.is_cuda:
        from sparselearn.kernels.grouped_fan_in import launch

        return launch.feature_major(x)
    return _filled(activations(x, x.shape[1], True), x)


@_by_feature.register_fake
def _(x: Tensor) -> Tensor:
    return activations(x, x.shape[1], True)


def _by_feature_backward(ctx: Any, grad: Tensor) -> Tensor:
    # Layers that share the copy send their gradients by feature; what made x reads it token by token.
    across = grad.stride(0) == 1 and not grad.is_contiguous()
    return torch.ops.sparselearn.by_token(grad) if across else grad


@torch.library.custom_op("sparselearn::by_token", mutates_args=())
def _by_token(x: Tensor) -> Tensor:
    if x.is_cuda:
        from sparselearn.kernels.grouped_fan_in import launch

        return launch.token_major(x)
    return _filled(activations(x, x.shape[1], False), x)


@_by_token.register_fake
def _(x: Tensor) -> Tensor:
    return activations(x, x.shape[1], False)


_by_feature.register_autograd(_by_feature_backward)


@torch.library.custom_op("sparselearn::grouped_linear", mutates_args=())
def _linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, order: Tensor | None, starts: Tensor | None,
    activation: str, by_feature: bool, grad_by_feature: bool,
) -> Tensor:  # fmt: skip
    out = activations(x, values.shape[0] * values.shape[1], by_feature)
    if x.is_cuda:
        from sparselearn.kernels.grouped_fan_in import launch

        return launch.forward(x, values.contiguous(), indices.contiguous(), bias, out, activation)
    return _filled(out, ACTIVATIONS[activation](reference.linear(x, values, indices, bias)))


@_linear.register_fake
def _(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, order: Tensor | None, starts: Tensor | None,
    activation: str, by_feature: bool, grad_by_feature: bool,
) -> Tensor:  # fmt: skip
    return activations(x, values.shape[0] * values.shape[1], by_feature)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, _, order, starts, activation, _, grad_by_feature = inputs
    if activation != "none":
        raise SparsityError("An activation inside the kernel has no gradient. Call `linear`, which sees to it.")
    ctx.save_for_backward(x, values, indices, order, starts)
    ctx.grad_by_feature = grad_by_feature


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices, order, starts = ctx.saved_tensors
    wants_x, wants_values, _, wants_bias, *_ = ctx.needs_input_grad
    ops = torch.ops.sparselearn
    return (
        ops.grouped_grad_input(grad, values, indices, order, starts, x.shape[1], ctx.grad_by_feature)
        if wants_x
        else None,
        ops.grouped_grad_values(grad, x, values, indices) if wants_values else None,
        None,
        grad.sum(0, dtype=torch.float32 if grad.dtype.itemsize < 4 else None).to(grad.dtype) if wants_bias else None,
        *[None] * 5,
    )


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("sparselearn::grouped_grad_values", mutates_args=())
def _grad_values(grad: Tensor, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    if grad.is_cuda:
        from sparselearn.kernels.grouped_fan_in import launch

        if not is_by_feature(x) and x.shape[0] >= MIN_BY_FEATURE:
            x = launch.feature_major(x)
        return launch.grad_values(grad, x, values.contiguous(), indices.contiguous())
    return reference.grad_values(grad, x, indices).contiguous()


@_grad_values.register_fake
def _(grad: Tensor, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return values.new_empty(values.shape)


@torch.library.custom_op("sparselearn::grouped_grad_input", mutates_args=())
def _grad_input(
    grad: Tensor, values: Tensor, indices: Tensor, order: Tensor | None, starts: Tensor | None, in_features: int,
    by_feature: bool,
) -> Tensor:  # fmt: skip
    out = activations(grad, in_features, by_feature)
    if grad.is_cuda:
        from sparselearn.kernels.grouped_fan_in import launch

        if order is not None and starts is not None:
            return launch.grad_input_collected(grad, values.contiguous(), order, starts, out)
        return launch.grad_input_dense(grad, values.contiguous(), indices.contiguous(), out)
    return _filled(out, reference.grad_input(grad, values, indices, in_features))


@_grad_input.register_fake
def _(
    grad: Tensor, values: Tensor, indices: Tensor, order: Tensor | None, starts: Tensor | None, in_features: int,
    by_feature: bool,
) -> Tensor:  # fmt: skip
    return activations(grad, in_features, by_feature)


@torch.library.custom_op("sparselearn::grouped_scores", mutates_args=())
def _scores(grad: Tensor, x: Tensor, group: int) -> Tensor:
    if grad.is_cuda:
        from sparselearn.kernels.grouped_fan_in import launch

        return launch.scores(grad, x if is_by_feature(x) else launch.feature_major(x), group)
    return reference.scores(grad, x, group).float().contiguous()


@_scores.register_fake
def _(grad: Tensor, x: Tensor, group: int) -> Tensor:
    return grad.new_empty((grad.shape[1] // group, x.shape[1]), dtype=torch.float32)


@torch.library.custom_op("sparselearn::grouped_dense", mutates_args=())
def _dense(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    if values.is_cuda:
        from sparselearn.kernels.grouped_fan_in import launch

        return launch.densify(values.contiguous(), indices.contiguous(), in_features)
    return reference.dense(values, indices, in_features)


@_dense.register_fake
def _(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    return values.new_empty((values.shape[0] * values.shape[1], in_features))


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, _ = inputs
    ctx.group = values.shape[1]
    ctx.save_for_backward(indices)


def _dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    places = unsigned(indices)[:, None].expand(-1, ctx.group, -1)
    return grad.unflatten(0, (len(indices), ctx.group)).gather(2, places), None, None


_dense.register_autograd(_dense_backward, setup_context=_dense_setup)
