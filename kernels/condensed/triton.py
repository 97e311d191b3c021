"""Condensed products on a GPU for up to 16 tokens, where reading the weights is the work; as a torch operator.

    sparselearn::condensed_linear        forward; differentiable in x, values and bias
    sparselearn::condensed_grad_values   gradient of the values

More tokens are computed faster by a dense product, even at 98 % sparsity (measured on an H100), so this module does not
serve them; nor does it use triton before a kernel is needed, nor on a CPU.

Legend of shape suffixes: T tokens, I inputs, N neurons, K weights per neuron; BN, BK, BT blocks of them.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.kernels.condensed import reference
from sparselearn.kernels.condensed.reference import unsigned

MAX_TOKENS = 16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.linear` for at most 16 tokens, with gradients for x, values and bias. Deterministic.

    Args:
        x: [T, I] float32, bfloat16 or float16, 0 < T <= 16.
        values: [N, K] like x.
        indices: [N, K] int16 (unsigned), int32 or int64 in [0, I). Not looked at here.
        bias: [N] like x, or None.

    >>> indices = torch.tensor([[0, 2], [1, 2]])
    >>> linear(torch.tensor([[1., 2., 3.]]), torch.tensor([[1., 10.], [1., 1.]]), indices)
    tensor([[31.,  5.]])
    """
    if x.ndim != 2 or not 0 < len(x) <= MAX_TOKENS or values.ndim != 2 or indices.shape != values.shape:
        raise SparsityError(
            f"A condensed product on a GPU needs x [T, I] with 0 < T <= {MAX_TOKENS} and values and indices of one "
            f"shape [N, K]; got {list(x.shape)}, {list(values.shape)} and {list(indices.shape)}. Use the dense product "
            "for more tokens."
        )
    return torch.ops.sparselearn.condensed_linear(x, values, indices, bias)  # type: ignore[no-any-return]


def dense(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """The dense weight [N, I]; differentiable in values. Each row's indices must be distinct."""
    return values.new_zeros(len(values), in_features).scatter(1, unsigned(indices), values)


@functools.cache
def _launch() -> Any:
    from sparselearn.kernels.condensed import triton_launch

    return triton_launch


@torch.library.custom_op("sparselearn::condensed_linear", mutates_args=())
def _linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda:
        return _launch().linear(x, values.contiguous(), indices.contiguous(), bias)  # type: ignore[no-any-return]
    return reference.linear(x, values, indices, bias).contiguous()


@_linear.register_fake
def _(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, _ = inputs
    ctx.save_for_backward(x, values, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices = ctx.saved_tensors
    wants_x, wants_values, _, wants_bias = ctx.needs_input_grad
    return (
        grad @ dense(values, indices, x.shape[1]) if wants_x else None,
        torch.ops.sparselearn.condensed_grad_values(grad, x, values, indices) if wants_values else None,
        None,
        grad.sum(0) if wants_bias else None,
    )


_linear.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("sparselearn::condensed_grad_values", mutates_args=())
def _grad_values(grad: Tensor, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    if grad.is_cuda:
        return _launch().grad_values(grad, x, values, indices.contiguous())  # type: ignore[no-any-return]
    return reference.grad_values(grad, x, indices).contiguous()


@_grad_values.register_fake
def _(grad: Tensor, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    return values.new_empty(values.shape)
