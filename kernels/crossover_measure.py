"""The clock behind `crossover`: times every way of computing a case on the GPU, after tuning the kernels' blocks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearn.kernels.condensed import triton as condensed
from sparselearn.kernels.crossover import Case, Table, table
from sparselearn.kernels.grouped_fan_in import by_input, layout, linear
from sparselearn.kernels.timing import Calls, Timer, copies, graph_seconds

if TYPE_CHECKING:  # needs triton
    from sparselearn.kernels.grouped_fan_in.launch import Blocks

Sets = list[tuple[Tensor, ...]]


def ensure(case: Case) -> None:
    """Measure a case where it was not, and keep the result."""
    if case not in table().seconds:
        table().seconds[case] = measured_seconds(case)
        table().save()


def measured_seconds(case: Case, timer: Timer = graph_seconds, device: str = "cuda") -> dict[str, float]:
    """Way -> seconds. "dense" is the product with a dense weight that is there already."""
    if case.pattern:
        from sparselearn.kernels.semi_structured import measure

        return measure.measured_seconds(case, timer, device)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.tokens, case.inputs, device=device, dtype=dtype)
    grad = torch.randn(case.tokens, case.neurons, device=device, dtype=dtype)
    weight = torch.empty(case.neurons, case.inputs, device=device, dtype=dtype)
    weights = [torch.randn_like(weight) for _ in range(copies(weight))]
    sets = sparse_sets(case, dtype, device)
    if case.group == 1:
        ways: dict[str, Calls] = {"dense": [partial(F.linear, x, w) for w in weights]}
        if case.tokens <= condensed.MAX_TOKENS:
            if device == "cuda":
                tune_condensed(sets, x, timer, table())
            ways["sparse"] = [partial(condensed.linear, x, v[:, 0], i) for v, i, *_ in sets]
        return {name: timer(calls) for name, calls in ways.items()}
    if device == "cuda":
        tune(case, sets, x, grad, timer, table())
    if not case.training:
        calls: dict[str, Calls] = {
            "dense": [partial(F.linear, x, w) for w in weights],
            "sparse": [partial(linear, x, v, i) for v, i, *_ in sets],
        }
    else:
        both = partial(forward_backward, x.requires_grad_(), grad)
        calls = {
            "dense": [partial(both, w.requires_grad_(), F.linear) for w in weights],
            "sparse": [partial(both, v.requires_grad_(), partial(_sparse, i)) for v, i, *_ in sets],
            "collected": [partial(both, v, partial(_sparse, i, (o, s))) for v, i, o, s in sets],
        }
    with torch.set_grad_enabled(case.training):
        return {name: timer(work) for name, work in calls.items()}


def _sparse(indices: Tensor, *rest: object) -> Tensor:
    *transposed, x, values = rest
    return linear(x, values, indices, transposed=transposed[0] if transposed else None)  # type: ignore[arg-type]


def forward_backward(x: Tensor, grad: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> object:
    return torch.autograd.grad(product(x, weight), (x, weight), grad)


def sparse_sets(case: Case, dtype: torch.dtype, device: str) -> Sets:
    """Layers of a case, so many that none stays in the cache: (values, indices, order, starts)."""
    groups = case.neurons // case.group
    sets: Sets = []
    values = torch.randn(groups, case.group, case.fan_in, device=device, dtype=dtype) * case.fan_in**-0.5
    for _ in range(copies(values, most=16 if case.tokens > 256 else 48)):
        indices = torch.rand(groups, case.inputs, device=device).topk(case.fan_in, 1).indices.sort(1).values
        narrow = indices.to(torch.int16 if case.inputs <= 2**15 else torch.int32)
        sets.append((values.clone(), narrow, *by_input(indices, case.inputs)))
    return sets


def tune(case: Case, sets: Sets, x: Tensor, grad: Tensor, timer: Timer, into: Table) -> dict[str, float]:
    """Find the best blocks of the kernels for a case, put them to use and into the table; returns their seconds."""
    from sparselearn.kernels.grouped_fan_in import launch

    values = sets[0][0]
    key = launch.tuning_key("forward", values, case.tokens)
    by_feature = layout.is_by_feature(x) or case.tokens < 17
    x = x if by_feature else launch.feature_major(x)
    out = layout.activations(x, case.neurons, False)
    with torch.no_grad():
        found = {"forward": _best(
            key, launch.FORWARD, timer, into,
            lambda blocks: [partial(launch.forward, x, v, i, None, out, "none", blocks) for v, i, *_ in sets],
            lambda blocks: blocks.tokens <= max(16, case.tokens * 2) and (case.tokens <= 64 or blocks.tokens > 16),
        )}  # fmt: skip
        if case.training:
            found["grad_values"] = _best(
                launch.tuning_key("grad_values", values, case.tokens), launch.GRAD_VALUES, timer, into,
                lambda blocks: [partial(launch.grad_values, grad, x, v, i, blocks) for v, i, *_ in sets],
                lambda blocks: blocks.tokens <= max(32, case.tokens),
            )  # fmt: skip
    return found


def tune_condensed(sets: Sets, x: Tensor, timer: Timer, into: Table) -> float:
    """Find the best blocks for single neurons and few tokens; returns their seconds."""
    from sparselearn.kernels.condensed import triton_launch
    from sparselearn.kernels.grouped_fan_in import launch

    return _best(
        launch.tuning_key("condensed", sets[0][0], len(x)),
        triton_launch.ONE_TOKEN if len(x) == 1 else triton_launch.FEW_TOKENS, timer, into,
        lambda blocks: [partial(triton_launch.linear, x, v[:, 0], i, None, blocks) for v, i, *_ in sets],
        lambda blocks: True,
    )  # fmt: skip


def _best(
    key: tuple[object, ...], candidates: Sequence["Blocks"], timer: Timer, into: Table,
    calls: Callable[["Blocks"], Calls], fits: Callable[["Blocks"], bool],
) -> float:  # fmt: skip
    seconds = {}
    for blocks in filter(fits, candidates):
        if key[4] == "float32" and blocks.inputs > 32 and blocks.tokens > 64:
            continue  # too large for shared memory
        try:
            seconds[blocks] = timer(calls(blocks))
        except Exception as error:  # triton has several classes for "out of resources"
            if "resource" not in repr(error).lower():
                raise
    best = min(seconds, key=seconds.__getitem__)
    into.blocks[key] = tuple(best)
    return seconds[best]
