"""The clock behind `crossover`: times every way of computing a case on the GPU, after tuning the kernels' blocks."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearn.kernels.condensed import triton as condensed
from sparselearn.kernels.crossover import Case, Table, products_of, table, torch_dtype
from sparselearn.kernels.grouped_fan_in import by_input, layout, linear
from sparselearn.kernels.timing import Calls, Timer, copies, event_seconds, graph_seconds

if TYPE_CHECKING:  # needs triton
    from sparselearn.kernels.grouped_fan_in.launch import Blocks

Sets = list[tuple[Tensor, ...]]
Times = dict["Blocks", float]
"""Blocks of a kernel -> seconds."""
FINALISTS = 6
_finalists: dict[tuple[object, ...], tuple["Blocks", ...]] = {}  # by `_kind`, best first


def ensure(case: Case) -> None:
    """Measure a case where it was not, in a CUDA graph and called from the host, and keep the results."""
    both = [case._replace(graph=graph) for graph in (True, False)]  # the first tunes the blocks, too
    if missing := [case for case in both if case not in table().seconds]:
        for case in missing:
            table().seconds[case] = measured_seconds(case)
        table().save()


def measured_seconds(case: Case, timer: Timer | None = None, device: str = "cuda") -> dict[str, float]:
    """Way -> seconds. "dense" is the product with a dense weight that is there already. `timer`: for tests."""
    timer = timer or (graph_seconds if case.graph else event_seconds)
    with products_of(case.dtype):
        if case.pattern:
            from sparselearn.kernels.semi_structured import measure

            return measure.measured_seconds(case, timer, device)
        return _measured_seconds(case, timer, device)


def _measured_seconds(case: Case, timer: Timer, device: str) -> dict[str, float]:
    dtype = torch_dtype(case.dtype)
    x = torch.randn(case.tokens, case.inputs, device=device, dtype=dtype)
    grad = torch.randn(case.tokens, case.neurons, device=device, dtype=dtype)
    weight = torch.empty(case.neurons, case.inputs, device=device, dtype=dtype)
    weights = [torch.randn_like(weight) for _ in range(copies(weight))]
    sets = sparse_sets(case, dtype, device)
    if case.group == 1:
        ways: dict[str, Calls] = {"dense": [partial(F.linear, x, w) for w in weights]}
        if case.tokens <= condensed.MAX_TOKENS:
            if device == "cuda" and case.graph:
                tune_condensed(sets, x, timer, table())
            ways["sparse"] = [partial(condensed.linear, x, v[:, 0], i) for v, i, *_ in sets]
        return {name: timer(calls) for name, calls in ways.items()}
    if device == "cuda" and case.graph:
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


def tune(
    case: Case, sets: Sets, x: Tensor, grad: Tensor, timer: Timer, into: Table, everything: bool = False
) -> dict[str, Times]:
    """Find the best blocks of the kernels for a case, put them to use and into the table; returns what was timed.

    The first case of a kind (kernel, V, dtype, about as many tokens) tries all candidates, later ones its best
    `FINALISTS`, unless `everything` is asked for.
    """
    from sparselearn.kernels.grouped_fan_in import launch

    values = sets[0][0]
    by_feature = layout.is_by_feature(x) or case.tokens < 17
    x = x if by_feature else launch.feature_major(x)
    out = layout.activations(x, case.neurons, False)
    with torch.no_grad():
        found = {"forward": _best(
            launch.tuning_key("forward", values, case.tokens), candidates(case, "forward"), timer, into,
            lambda blocks: [partial(launch.forward, x, v, i, None, out, "none", blocks) for v, i, *_ in sets],
            everything,
        )}  # fmt: skip
        if case.training:
            found["grad_values"] = _best(
                launch.tuning_key("grad_values", values, case.tokens), candidates(case, "grad_values"), timer, into,
                lambda blocks: [partial(launch.grad_values, grad, x, v, i, blocks) for v, i, *_ in sets],
                everything,
            )  # fmt: skip
    return found


def candidates(case: Case, kernel: str) -> "list[Blocks]":
    """Blocks worth a try for a case."""
    from sparselearn.kernels.grouped_fan_in import launch

    if kernel == "forward":
        most = max(16, case.tokens * 2)
        found = [b for b in launch.FORWARD if b.tokens <= most and (case.tokens <= 64 or b.tokens > 16)]
    else:
        found = [blocks for blocks in launch.GRAD_VALUES if blocks.tokens <= max(32, case.tokens)]
    if case.dtype in ("float32", "tf32"):
        found = [b for b in found if b.stages <= launch.MOST_STAGES_FLOAT32]
    if case.dtype == "float32":  # the others are too large for shared memory
        found = [b for b in found if b.inputs <= 32 or b.tokens <= 64]
    return found


def compile_ahead(cases: Sequence[Case], processes: int | None = None) -> None:
    """Compile the candidates of cases in several processes, into the cache that triton keeps on disk."""
    jobs = [(case, kernel, tuple(blocks)) for case in cases
            for kernel in (("forward", "grad_values") if case.training else ("forward",))
            for blocks in candidates(case, kernel)]  # fmt: skip
    count = processes or min(16, os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, [jobs[i::count] for i in range(count)]))


def _compile(jobs: list[tuple[Case, str, tuple[Any, ...]]]) -> None:
    """One launch of each; in a process of its own."""
    from sparselearn.kernels.grouped_fan_in import launch

    for case, kernel, numbers in jobs:
        made: Any = {"device": "cuda", "dtype": torch_dtype(case.dtype)}
        x = layout.activations(torch.empty(case.tokens, 1, **made), case.inputs, case.tokens > 16).zero_()
        y = torch.zeros(case.tokens, case.neurons, **made)
        values = torch.zeros(case.neurons // case.group, case.group, case.fan_in, **made)
        narrow = torch.int16 if case.inputs <= 2**15 else torch.int32
        indices = torch.zeros(len(values), case.fan_in, device="cuda", dtype=narrow)
        try:
            with products_of(case.dtype):
                if kernel == "forward":
                    launch.forward(x, values, indices, None, y, "none", launch.Blocks(*numbers))
                else:
                    launch.grad_values(y, x, values, indices, launch.Blocks(*numbers))
        except Exception as error:
            if not _too_large(error):
                raise
    torch.cuda.synchronize()


def tune_copy(x: Tensor, timer: Timer, into: Table) -> Times:
    """Find the best blocks of the transposing copy for x [T, I]."""
    from sparselearn.kernels.grouped_fan_in import launch

    key = ("copy", str(x.dtype).removeprefix("torch."))
    return _best(key, launch.COPY, timer, into, lambda blocks: [partial(launch.feature_major, x, blocks)], True)


def tune_condensed(sets: Sets, x: Tensor, timer: Timer, into: Table) -> Times:
    """Find the best blocks for single neurons and few tokens."""
    from sparselearn.kernels.condensed import triton_launch
    from sparselearn.kernels.grouped_fan_in import launch

    return _best(
        launch.tuning_key("condensed", sets[0][0], len(x)),
        triton_launch.ONE_TOKEN if len(x) == 1 else triton_launch.FEW_TOKENS, timer, into,
        lambda blocks: [partial(triton_launch.linear, x, v[:, 0], i, None, blocks) for v, i, *_ in sets],
        True,
    )  # fmt: skip


def _too_large(error: Exception) -> bool:
    return "resource" in repr(error).lower()  # triton has several classes for "out of resources"


def _kind(key: tuple[object, ...]) -> tuple[object, ...]:
    """What cases have in common that like the same blocks: kernel, V, dtype, and one of four ranges of tokens."""
    tokens = key[5] if len(key) > 5 else 0  # log2
    return (*key[:1], *key[2:3], *key[4:5], sum(tokens > limit for limit in (4, 6, 8)))  # type: ignore[operator]


def _best(
    key: tuple[object, ...], blocks: Sequence["Blocks"], timer: Timer, into: Table,
    calls: Callable[["Blocks"], Calls], everything: bool,
) -> Times:  # fmt: skip
    """Seconds of every candidate, the fastest first, which goes into the table."""
    known = () if everything else _finalists.get(_kind(key), ())
    seconds: Times = {}
    for tried in [b for b in blocks if b in known] or blocks:
        try:
            seconds[tried] = timer(calls(tried))
        except Exception as error:
            if not _too_large(error):
                raise
    ranked = sorted(seconds, key=seconds.__getitem__)
    if not known:
        _finalists[_kind(key)] = tuple(ranked[:FINALISTS])
    into.blocks[key] = tuple(ranked[0])
    return {tried: seconds[tried] for tried in ranked}
