"""The clock behind `kernels.crossover` for n:m layers: every way of computing a case, after tuning the blocks."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearn.kernels import crossover
from sparselearn.kernels.crossover import Case, torch_dtype
from sparselearn.kernels.semi_structured import cslt, fragments, ops, reference
from sparselearn.kernels.semi_structured.search import Product, search
from sparselearn.kernels.timing import Calls, Timer, copies

Packed = tuple[Tensor, Tensor]


WAYS = ("gemv", "decode", "gemm")


def measured_seconds(
    case: Case, timer: Timer, device: str = "cuda", ways: Collection[str] = WAYS
) -> dict[str, float]:  # fmt: skip
    """Way -> seconds, of a layer whose weight lies there in the form of each way; training with transposable masks.

    "dense", the product with a dense weight that is there already, is always measured, others if among `ways`.
    """
    n, m = map(int, case.pattern.split(":"))
    dtype = torch_dtype(case.dtype)
    x = torch.randn(case.tokens, case.inputs, device=device, dtype=dtype)
    weight = torch.randn(case.neurons, case.inputs, device=device, dtype=dtype) * case.inputs**-0.5
    if case.training:
        return _training_seconds(case, x, weight, timer)
    mask = reference.magnitude_mask(weight, n, m)
    sets = copied(reference.pack(weight, mask, n, m))
    calls: dict[str, Calls] = {"dense": [partial(F.linear, x, w) for (w,) in copied((weight,))]}
    if "gemv" in ways and case.tokens <= ops.MAX_GEMV_TOKENS:
        if device == "cuda" and case.graph:
            tune_gemv(x, sets, n, m, timer)
        calls["gemv"] = [partial(ops.gemv, x, v, p, None, n, m) for v, p in sets]
    if device == "cuda" and case.pattern == "2:4":
        few = case.tokens <= ops.MAX_DECODE_TOKENS
        if "decode" in ways and few and fragments.fits(case.neurons, case.inputs, dtype):
            pieces = [fragments.fragments(v, p) for v, p in sets]
            if case.graph:
                tune_decode(x, pieces, timer)
            calls["decode"] = [partial(torch.ops.sparselearn.sp24_decode, x, k, p, None) for k, p in pieces]
        if "gemm" in ways and cslt.fits(case.neurons, case.inputs, dtype) and cslt.trusted(x.device, dtype):
            blobs = [cslt.blob(v, cslt.metadata(v, p)) for v, p in sets]
            search(products(case))
            calls["gemm"] = [partial(torch.ops.sparselearn.sp24_gemm, x, blob, None) for blob in blobs]
    with torch.no_grad():
        return {way: timer(work) for way, work in calls.items()}


def products(case: Case) -> list[Product]:
    """cuSPARSELt's products in a case; a training step multiplies by the transpose, too."""
    forward = Product(case.neurons, case.inputs, case.dtype, case.tokens)
    return [forward, forward._replace(neurons=case.inputs, inputs=case.neurons)] if case.training else [forward]


def copied(tensors: tuple[Tensor, ...], most: int = 48) -> list[tuple[Tensor, ...]]:
    """So many copies that none is still in the cache when its turn comes."""
    return [tuple(t.clone() for t in tensors) for _ in range(copies(*tensors, most=most))]


def _training_seconds(case: Case, x: Tensor, weight: Tensor, timer: Timer) -> dict[str, float]:
    grad = torch.randn(case.tokens, case.neurons, device=x.device, dtype=x.dtype)
    x.requires_grad_()
    calls: dict[str, Calls] = {"dense": [partial(both, F.linear, x, grad, weight.clone().requires_grad_())]}
    if case.pattern == "2:4" and cslt.fits(case.neurons, case.inputs, x.dtype) and cslt.trusted(x.device, x.dtype):
        search(products(case))
        values, places, values_t, places_t = ops.pack_transposable(weight)
        product = partial(trained, places, cslt.metadata(values, places), places_t, cslt.metadata(values_t, places_t))
        calls["gemm"] = [partial(both, product, x, grad, values.requires_grad_())]
    return {way: timer(work) for way, work in calls.items()}


def both(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, grad: Tensor, weight: Tensor) -> object:
    """Forward and backward."""
    return torch.autograd.grad(product(x, weight), (x, weight), grad)


def trained(
    places: Tensor, metadata: Tensor, places_t: Tensor, metadata_t: Tensor, x: Tensor, values: Tensor
) -> Tensor:  # fmt: skip
    op = torch.ops.sparselearn.sp24_linear
    return op(x, values, places, metadata, places_t, metadata_t, None)  # type: ignore[no-any-return]


def tune_gemv(x: Tensor, sets: Sequence[tuple[Tensor, ...]], n: int, m: int, timer: Timer) -> float:
    """Find the best blocks and put them to use; returns their seconds."""
    from sparselearn.kernels.semi_structured import launch

    return _best(
        launch.tuning_key(sets[0][0], n, m, len(x)),
        {
            blocks: [partial(launch.gemv, x, v, p, None, n, m, blocks) for v, p in sets]
            for blocks in launch.gemv_candidates(x, sets[0][0], sets[0][1], n, m)
        },
        timer,
    )


def tune_decode(x: Tensor, pieces: Sequence[tuple[Tensor, ...]], timer: Timer) -> float:
    """Find the best blocks and put them to use; returns their seconds."""
    from sparselearn.kernels.semi_structured import launch

    kept = pieces[0][0]
    return _best(
        launch.decode_key(kept, x.dtype, len(x)),
        {
            blocks: [partial(launch.decode, x, k, p, None, blocks) for k, p in pieces]
            for blocks in launch.decode_candidates(kept, len(x))
        },
        timer,
    )


def _best(key: tuple[object, ...], calls: dict[tuple[int, ...], Calls], timer: Timer) -> float:
    seconds = {}
    for blocks, work in calls.items():
        try:
            seconds[blocks] = timer(work)
        except Exception as error:  # triton has several classes for "out of resources"
            if "resource" not in repr(error).lower():
                raise
    best = min(seconds, key=seconds.__getitem__)
    crossover.table().blocks[key] = tuple(best)
    return seconds[best]
