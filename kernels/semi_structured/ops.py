"""n:m weights as torch operators: autograd, `torch.compile(fullgraph=True)` and CUDA graphs work through them.

On CUDA they run Triton kernels and cuSPARSELt, elsewhere the formulas of `reference.py`.

    sparselearn::nm_unpack     packed -> dense weight; differentiable in values
    sparselearn::nm_gather     numbers of a dense matrix at the places; differentiable
    sparselearn::nm_gemv       product for up to 8 tokens; differentiable in x, values and bias
    sparselearn::sp24_pack     dense -> packed 2:4, by magnitude or a mask
    sparselearn::sp24_pack_transposable   dense -> packed 2:4 and its packed transpose, by the best of 90 tile masks
    sparselearn::sp24_transpose_values    values of the transpose, whose places are known
    sparselearn::sp24_linear   product for many tokens, in training; differentiable in x, values and bias
    sparselearn::sp24_gemm     product for many tokens with a weight in cuSPARSELt's form
    sparselearn::sp24_decode   product for few tokens with a weight in the form of sparse tensor cores
"""

from typing import Any

import torch
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.kernels.semi_structured import fragments, reference

MAX_GEMV_TOKENS = 8
MAX_DECODE_TOKENS = 64
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def kernels_serve(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor's device and dtype."""
    return tensor.is_cuda and tensor.dtype in _FLOATS


def unpack(values: Tensor, places: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The dense weight [N, I] of values [N, I·n/m] and their places; differentiable in values.

    >>> unpack(torch.tensor([[5., 7.]]), torch.tensor([[0b1000]], dtype=torch.uint8))
    tensor([[5., 0., 7., 0.]])
    """
    return torch.ops.sparselearn.nm_unpack(values, places, n, m)  # type: ignore[no-any-return]


def gemv(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None = None, n: int = 2, m: int = 4) -> Tensor:
    """x [T, I] · Wᵀ + bias -> [T, N] for few tokens; on CUDA a sparse product of at most 8, elsewhere of any number.

    Raises:
        SparsityError: on CUDA, more tokens, or a dtype other than float32, bfloat16 and float16.
    """
    if x.is_cuda and (len(x) > MAX_GEMV_TOKENS or x.dtype not in _FLOATS):
        raise SparsityError(
            f"On CUDA `gemv` takes up to {MAX_GEMV_TOKENS} tokens of float32, bfloat16 or float16; got {list(x.shape)} "
            f"of {x.dtype}. Multiply with `unpack(...)`."
        )
    return torch.ops.sparselearn.nm_gemv(x, values, places, bias, n, m)  # type: ignore[no-any-return]


def pack(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """2:4 values [N, I/2] and places [N, I/8] of a weight, by magnitude in one pass or by a mask [N, I].

    Raises:
        SparsityError: I is no multiple of 4, or the mask is not 2:4 (which is looked at first, and waits for the GPU).

    >>> pack(torch.tensor([[1., -3., 2., 2.]]))[0]
    tensor([[-3.,  2.]])
    """
    if mask is not None:
        reference.check_mask(mask, 2, 4)
        if mask.shape != weight.shape:
            raise SparsityError(f"The mask must have shape {list(weight.shape)}; it has {list(mask.shape)}.")
    return torch.ops.sparselearn.sp24_pack(weight, mask)  # type: ignore[no-any-return]


def pack_transposable(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and places of the transposable 2:4 weight of the largest magnitudes, and values and places of its
    transpose; in one pass. `reference.transposable_mask` says which weights are kept.

    Raises:
        SparsityError: N or I is no multiple of 4.
    """
    return torch.ops.sparselearn.sp24_pack_transposable(weight)  # type: ignore[no-any-return]


# ---- the operators -------------------------------------------------------------------------------------------


@torch.library.custom_op("sparselearn::nm_unpack", mutates_args=())
def _unpack(values: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    if kernels_serve(values):
        from sparselearn.kernels.semi_structured import launch

        return launch.unpack(values.contiguous(), places, n, m)
    return reference.unpack(values, places, n, m)


@_unpack.register_fake
def _(values: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    return values.new_empty((values.shape[0], values.shape[1] // n * m))


@torch.library.custom_op("sparselearn::nm_gather", mutates_args=())
def _gather(dense: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    if kernels_serve(dense):
        from sparselearn.kernels.semi_structured import launch

        return launch.gather(dense.contiguous(), places, n, m)
    return reference.gather(dense, places, n, m)


@_gather.register_fake
def _(dense: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    return dense.new_empty((dense.shape[0], dense.shape[1] // m * n))


def _save_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.pattern = inputs[2:]


_unpack.register_autograd(
    lambda ctx, grad: (_gather(grad, *ctx.saved_tensors, *ctx.pattern), None, None, None), setup_context=_save_places
)
_gather.register_autograd(
    lambda ctx, grad: (_unpack(grad, *ctx.saved_tensors, *ctx.pattern), None, None, None), setup_context=_save_places
)


def _summed(grad: Tensor) -> Tensor:
    return grad.sum(0, dtype=torch.float32 if grad.itemsize < 4 else None).to(grad.dtype)


@torch.library.custom_op("sparselearn::nm_gemv", mutates_args=())
def _gemv(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    if kernels_serve(x) and len(x):
        from sparselearn.kernels.semi_structured import launch

        return launch.gemv(x, values.contiguous(), places, bias, n, m)
    return reference.linear(x, values, places, bias, n, m)


@_gemv.register_fake
def _(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


def _gemv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.pattern = inputs[4:]


def _gemv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, places = ctx.saved_tensors
    wants_x, wants_values, _, wants_bias, *_ = ctx.needs_input_grad
    return (
        grad @ _unpack(values, places, *ctx.pattern) if wants_x else None,
        _gather(grad.T @ x, places, *ctx.pattern) if wants_values else None,
        None,
        _summed(grad) if wants_bias else None,
        None,
        None,
    )


_gemv.register_autograd(_gemv_backward, setup_context=_gemv_setup)


@torch.library.custom_op("sparselearn::sp24_pack", mutates_args=())
def _pack(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if kernels_serve(weight) and weight.numel() and weight.shape[1] % 8 == 0:
        from sparselearn.kernels.semi_structured import launch

        return launch.pack(weight.contiguous(), None if mask is None else mask.contiguous())
    return reference.pack(weight, reference.magnitude_mask(weight) if mask is None else mask)


@_pack.register_fake
def _(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty_packed(weight, *weight.shape)


def _empty_packed(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    places = like.new_empty((rows, reference.places_bytes(columns // 2, 4)), dtype=torch.uint8)
    return like.new_empty((rows, columns // 2)), places


@torch.library.custom_op("sparselearn::sp24_pack_transposable", mutates_args=())
def _pack_transposable(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if kernels_serve(weight) and weight.numel() and weight.shape[0] % 8 == weight.shape[1] % 8 == 0:
        from sparselearn.kernels.semi_structured import launch

        return launch.pack_transposable(weight.contiguous())
    mask = reference.transposable_mask(weight)
    return (*reference.pack(weight, mask), *reference.pack(weight.T, mask.T))


@_pack_transposable.register_fake
def _(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    neurons, inputs = weight.shape
    return (*_empty_packed(weight, neurons, inputs), *_empty_packed(weight, inputs, neurons))


@torch.library.custom_op("sparselearn::sp24_gemm", mutates_args=())
def _gemm(x: Tensor, blob: Tensor, bias: Tensor | None) -> Tensor:
    from sparselearn.kernels.semi_structured import cslt

    return cslt.product(x, blob, bias)


@_gemm.register_fake
def _(x: Tensor, blob: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], blob.shape[0]))


@torch.library.custom_op("sparselearn::sp24_decode", mutates_args=())
def _decode(x: Tensor, kept: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    from sparselearn.kernels.semi_structured import launch

    return launch.decode(x, kept, places, bias)


@_decode.register_fake
def _(x: Tensor, kept: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], kept.shape[0] * fragments.ROWS))


@torch.library.custom_op("sparselearn::sp24_linear", mutates_args=())
def _linear(
    x: Tensor, values: Tensor, places: Tensor, metadata: Tensor, places_t: Tensor | None, metadata_t: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    if x.is_cuda:
        from sparselearn.kernels.semi_structured import cslt

        return cslt.product(x, cslt.blob(values, metadata), bias)
    return reference.linear(x, values, places, bias)


@_linear.register_fake
def _(
    x: Tensor, values: Tensor, places: Tensor, metadata: Tensor, places_t: Tensor | None, metadata_t: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], values.shape[0]))


@torch.library.custom_op("sparselearn::sp24_transpose_values", mutates_args=())
def _transpose_values(values: Tensor, places: Tensor, places_t: Tensor) -> Tensor:
    if kernels_serve(values):
        from sparselearn.kernels.semi_structured import launch

        return launch.transpose_values(values.contiguous(), places, places_t)
    return reference.transpose_values(values, places, places_t)


@_transpose_values.register_fake
def _(values: Tensor, places: Tensor, places_t: Tensor) -> Tensor:
    return values.new_empty((values.shape[1] * 2, values.shape[0] // 2))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3], *inputs[4:6])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, places, places_t, metadata_t = ctx.saved_tensors
    wants_x, wants_values, *_, wants_bias = ctx.needs_input_grad
    grad_x = None
    if wants_x and places_t is not None and metadata_t is not None:
        values_t = _transpose_values(values, places, places_t)
        grad_x = torch.ops.sparselearn.sp24_linear(grad, values_t, places_t, metadata_t, places, None, None)
    elif wants_x:
        grad_x = grad @ _unpack(values, places, 2, 4)
    grad_values = _gather(grad.T @ x, places, 2, 4) if wants_values else None
    return grad_x, grad_values, None, None, None, None, _summed(grad) if wants_bias else None


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)
