"""A whole training step of a GPT-like stack, dense against grouped sparse, both compiled: time and peak memory.

What is compiled is the block, once for all of its layers, and the head with the loss. Each layer takes the way that was
measured to be its fastest: dense, sparse, or with the gradient of the input collected.
"""

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearn.kernels.crossover import Case, bucket, choose
from sparselearn.kernels.crossover_measure import ensure
from sparselearn.kernels.grouped_fan_in import by_input, linear
from sparselearn.kernels.grouped_fan_in.bench import Row, Work, make_case

DEVICE = "cuda"


class Size(NamedTuple):
    width: int
    layers: int
    heads: int = 16
    length: int = 1024
    batch: int = 8
    vocabulary: int = 8192


SIZES = (Size(2048, 4), Size(4096, 2, 32))


class Grouped(nn.Module):
    """A grouped layer without what a library needs: float32 values, products in bfloat16."""

    indices: Tensor
    order: Tensor
    starts: Tensor

    def __init__(self, case: Case, collected: bool, by_feature: bool) -> None:
        super().__init__()
        groups = case.neurons // case.group
        indices = torch.rand(groups, case.inputs, device=DEVICE).topk(case.fan_in, 1).indices.sort(1).values
        self.values = nn.Parameter(torch.randn(groups, case.group, case.fan_in, device=DEVICE) * case.fan_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(case.neurons, device=DEVICE))
        for name, places in zip(
            ("indices", "order", "starts"), (indices, *by_input(indices, case.inputs)), strict=True
        ):
            self.register_buffer(name, places.to(torch.int16) if name == "indices" else places)
        self.collected, self.by_feature = collected, by_feature

    def forward(self, x: Tensor) -> Tensor:
        transposed = (self.order, self.starts) if self.collected else None
        flat, values, bias = x.flatten(0, -2).bfloat16(), self.values.bfloat16(), self.bias.bfloat16()
        y = linear(flat, values, self.indices, bias, by_feature=self.by_feature, transposed=transposed)
        return y.view(*x.shape[:-1], -1)


Make = Callable[[str, int, int], nn.Module]
"""(name, neurons, inputs) -> a layer."""


class Block(nn.Module):
    def __init__(self, size: Size, make: Make) -> None:
        super().__init__()
        self.heads, d = size.heads, size.width
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = make("qkv", 3 * d, d), make("out", d, d)  # q, k and v share one copy of their input
        self.up, self.down = make("up", 4 * d, d), make("down", d, 4 * d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden: Tensor = self.up(self.norm2(x))
        y: Tensor = x + self.down(F.gelu(hidden))
        return y


class Head(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Gpt(nn.Module):
    def __init__(self, size: Size, make: Make, compiled: Callable[[nn.Module], Any] = torch.compile) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(compiled(Block(size, make)) for _ in range(size.layers))
        self.head = compiled(Head(size))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(x, targets)
        return loss


KINDS = {
    "attention": "sdpa|flash_fwd|flash_bwd|fmha",
    "products": "nvjet|gemm|cutlass|splitK|forward_kernel|weight_gradient_kernel|partial_kernel|collect_kernel",
    "sparse layouts": "densify_kernel|places_kernel|feature_major_kernel",
    "optimizer": "multi_tensor_apply",
}
"""Kinds of kernels by their names; the first that fits. All that is left is "other"."""


class Step(NamedTuple):
    """Seconds of a training step: called from the host, as a CUDA graph, of the host alone, of each kind of kernel."""

    called: float
    replayed: float
    host: float
    peak: int
    """Bytes, with parameters and optimizer; called from the host."""
    kinds: dict[str, float]


def measure_step(model: nn.Module, size: Size, steps: int = 10) -> Step:
    """Where the host takes as long as the step, the GPU waits for it; replayed it never does."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True, capturable=True)
    ids = torch.randint(size.vocabulary, (size.batch, size.length), device=DEVICE)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    called = _seconds(step, steps)
    peak = torch.cuda.max_memory_allocated()
    host = []
    for _ in range(5):  # one at a time: a full queue would hold the host up
        begin = time.perf_counter()
        step()
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    kinds = _kinds(step)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return Step(called, _seconds(graph.replay, steps), statistics.median(host), peak, kinds)


def _seconds(call: Callable[[], None], times: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / times


def _kinds(step: Callable[[], None]) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    seconds = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "other")
        seconds[kind] += event.self_device_time_total / 1e6
    return seconds


def works_step(sparsity: float = 0.9, sizes: tuple[Size, ...] = SIZES) -> Iterator[Work]:
    for size in sizes:
        dense: list[Row] = []
        yield partial(_dense_rows, size, dense)
        for group in (64, 32):
            yield partial(_sparse_rows, size, group, sparsity, dense)


def _dense_rows(size: Size, into: list[Row]) -> list[Row]:
    case = Case(size.width, size.width, 1, size.width, "bfloat16", True, size.batch * size.length)
    into += _rows(case, "dense", size, lambda _, neurons, inputs: nn.Linear(inputs, neurons))
    return into


def _sparse_rows(size: Size, group: int, sparsity: float, dense: list[Row]) -> list[Row]:
    """Each in the ways that are fastest so."""
    tokens, rows = size.batch * size.length, []
    taken: dict[str, str] = {}

    def make(graph: bool, name: str, neurons: int, inputs: int) -> nn.Module:
        case = make_case((neurons, inputs), bucket(tokens), group, sparsity, True)._replace(graph=graph)
        ensure(case)
        way = taken[name] = choose(*case)
        return nn.Linear(inputs, neurons) if way == "dense" else Grouped(case, way == "collected", name == "up")

    for graph, dense_row in zip((False, True), dense, strict=True):
        case = make_case((size.width, size.width), tokens, group, sparsity, True)
        row = _rows(case, "sparse", size, partial(make, graph))[graph]
        ways = " ".join(f"{name}={way}" for name, way in taken.items())
        rows += [dense_row, row._replace(detail=f"{row.detail}; {ways}")]
    return rows


def _rows(case: Case, name: str, size: Size, make: Make) -> tuple[Row, Row]:
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Gpt(size, make)
    step, whole = measure_step(model, size), f"whole step of GPT d={size.width} x{size.layers}"
    kinds = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in step.kinds.items())
    return (
        Row(
            case,
            f"{name}, compiled",
            step.called,
            f"{whole}; host {step.host * 1e3:.1f} ms; peak {step.peak / 2**30:.2f} GiB",
        ),
        Row(case, f"{name}, CUDA graph", step.replayed, f"{whole}; kernels: {kinds} ms"),
    )
