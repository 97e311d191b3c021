"""A whole training step of a GPT-like stack, dense against grouped sparse, both compiled: time and peak memory."""

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearn.kernels.crossover import Case, table
from sparselearn.kernels.crossover_measure import tune
from sparselearn.kernels.grouped_fan_in import by_input, linear
from sparselearn.kernels.grouped_fan_in.bench import Layer, Row, Work, make_case, quick
from sparselearn.kernels.grouped_fan_in.launch import tuned

DEVICE = "cuda"
WIDTH, LAYERS, HEADS, LENGTH, BATCH, VOCABULARY = 2048, 4, 16, 1024, 8, 8192


class Grouped(nn.Module):
    """A grouped layer without what a library needs: float32 values, products in bfloat16."""

    def __init__(self, layer: nn.Linear, group: int, sparsity: float, collected: bool, by_feature: bool) -> None:
        super().__init__()
        neurons, inputs = layer.weight.shape
        fan_in = make_case((neurons, inputs), 1, group, sparsity).fan_in
        indices = torch.rand(neurons // group, inputs, device=DEVICE).topk(fan_in, 1).indices.sort(1).values
        self.values = nn.Parameter(torch.randn(neurons // group, group, fan_in, device=DEVICE) * fan_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(neurons, device=DEVICE))
        self.indices = indices.to(torch.int16)
        self.order, self.starts = by_input(indices, inputs)
        self.collected, self.by_feature = collected, by_feature

    def forward(self, x: Tensor) -> Tensor:
        transposed = (self.order, self.starts) if self.collected else None
        flat, values, bias = x.flatten(0, -2).bfloat16(), self.values.bfloat16(), self.bias.bfloat16()
        y = linear(flat, values, self.indices, bias, by_feature=self.by_feature, transposed=transposed)
        return y.view(*x.shape[:-1], -1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden: Tensor = self.up(self.norm2(x))
        y: Tensor = x + self.down(F.gelu(hidden))
        return y


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def step_seconds(model: nn.Module, steps: int = 10) -> tuple[float, int]:
    """Seconds of a compiled training step, and its peak memory in bytes, parameters and optimizer included."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    compiled: Callable[..., Any] = torch.compile(model)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), device=DEVICE)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        step()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / steps, torch.cuda.max_memory_allocated()


def works_step(sparsity: float = 0.9) -> Iterator[Work]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        dense = Gpt()
    case = Case(WIDTH, WIDTH, 1, WIDTH, "bfloat16", True, BATCH * LENGTH)
    row = _row(case, "dense, compiled", copy.deepcopy(dense))
    yield lambda: [row]
    for group in (64, 32):
        for collected in (False, True):
            yield partial(_pair, row, partial(_sparse_row, dense, group, sparsity, collected))


def _pair(dense: Row, sparse: Callable[[], Row]) -> list[Row]:
    return [dense, sparse()]


def _sparse_row(dense: Gpt, group: int, sparsity: float, collected: bool) -> Row:
    for shape in ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)):
        part = make_case(shape, BATCH * LENGTH, group, sparsity, True)
        layer = Layer(part)
        if tuned("forward", layer.sets[0][0], part.tokens) is None:
            tune(part, layer.sets, layer.x, layer.grad, quick, table())
        del layer
    model = copy.deepcopy(dense)
    make = partial(Grouped, group=group, sparsity=sparsity, collected=collected)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, make(getattr(block, name), by_feature=name == "up"))
    sparse = make_case((WIDTH, WIDTH), BATCH * LENGTH, group, sparsity, True)
    return _row(sparse, f"{'collected' if collected else 'sparse'}, compiled", model)


def _row(case: Case, name: str, model: nn.Module) -> Row:
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    seconds, peak = step_seconds(model)
    return Row(case, name, seconds, f"whole step of GPT d={WIDTH} x{LAYERS}, peak {peak / 2**30:.2f} GiB")
