"""A GPT on bytes of text, dense and sparse, trained for equal time or equal steps: validation loss over both.

    python -m sparselearn.recipes.bench_gpt --variants dense masked1 grouped32 --minutes 5 --out gpt.csv
    python -m sparselearn.recipes.bench_gpt_picture gpt.csv

A variant is a kind, then `@sparsity` and `xFACTOR` where they differ from `--sparsity` and `--width`: `grouped64x1.5`
is one and a half times as wide as the others, `rigl@0.8` has 80 % zeros.

    dense       every weight
    rigl        RigL, weights one by one; dense weights behind masks
    masked16    RigL, 16 neighbouring neurons share their inputs (1: constant fan-in); dense weights behind masks
    grouped16   the same masks and rule in condensed form (`GroupedFanInLinear`): values, gradients and moments of
                active weights alone, products by the kernels
    nm          2:4 by SR-STE; dense weights behind masks

All train in the same loop: AdamW, warm-up and cosine, gradients clipped, bfloat16 autocast and compiled layers on a
GPU. Seeds fix the weights, masks and batches. Initial variance and learning rate of sparse layers follow their density
(`sparselearn.scaling`); those of a wider model's matrices its width, in the same way. `seconds` are those of training
steps, mask updates included; compiling, choosing among the kernels' ways and validation are left out.
"""

import argparse
import csv
import gc
import itertools
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselearn as sl
from sparselearn.distributions import uniform
from sparselearn.errors import SparsityError
from sparselearn.kernels.timing import Calls, commit, event_seconds
from sparselearn.modules.grouped import GroupedFanInLinear, measure_layers
from sparselearn.modules.update import captured, update_condensed
from sparselearn.recipes.data import Split
from sparselearn.recipes.data.text import text_bytes
from sparselearn.recipes.models import gpt
from sparselearn.structures import NM, ConstantFanIn, Structure, Unstructured

WAYS = ("dense", "sparse", "collected")
WARM_EVERY, WARM_STEPS = 4, 12  # the warm-up updates masks twice: the first is not timed
FORMAT = re.compile(r"(dense|rigl|nm|(masked|grouped)(\d+))(?:@(0\.\d+))?(?:x(\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class Variant:
    """What is trained. `group` is 0 where weights have no constant fan-in."""

    name: str
    kind: str
    group: int
    sparsity: float
    wider: float

    @classmethod
    def parse(cls, text: str, sparsity: float) -> Self:
        """
        >>> Variant.parse("grouped64x1.5", 0.9)
        Variant(name='grouped64x1.5', kind='grouped', group=64, sparsity=0.9, wider=1.5)

        Raises:
            SparsityError: a name of another form.
        """
        if not (found := FORMAT.fullmatch(text)):
            raise SparsityError(
                f"A variant is `dense`, `rigl`, `nm`, `masked` or `grouped` with a number of neurons, then `@sparsity` "
                f"and `xFACTOR` if wanted, like grouped64@0.95x1.5; got {text!r}."
            )
        whole, kind, group, own, wider = found.groups()
        kind = kind or whole
        zeros = {"dense": 0.0, "nm": 0.5}.get(kind, float(own or sparsity))
        return cls(text, kind, int(group or 0), zeros, float(wider or 1))

    def method(self, steps: int, every: int, fraction: float) -> sl.DropGrow | sl.StraightThrough | None:
        """How masks move in a run of so many steps; None for dense weights."""
        if self.kind == "dense":
            return None
        if self.kind == "nm":
            return sl.sr_ste(NM(2, 4))
        structure: Structure = ConstantFanIn(self.group) if self.group else Unstructured()
        return sl.rigl(stop=int(0.75 * steps), every=every, drop_fraction=fraction, structure=structure)


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    width: int = 2048
    depth: int = 4
    head: int = 128  # width of an attention head
    context: int = 512
    batch: int = 32
    weight_decay: float = 0.1
    warmup: float = 0.05
    every: int = 50
    drop_fraction: float = 0.1
    windows: int = 512  # of validation text
    kind: str = "cpu"  # of device
    tune: bool = False
    compiler: Any = None  # torch.compile's backend for the layers; None: they run as they are written

    @property
    def tokens(self) -> int:
        return self.batch * self.context


class Run:
    """One variant's model. It can be trained several times, from other seeds, and is compiled once."""

    def __init__(self, variant: Variant, setting: Setting, data: Split) -> None:
        self.variant, self.setting, self.data = variant, setting, data
        self.width = max(1, round(setting.width * variant.wider / setting.head)) * setting.head
        self.model = self._fresh(0)
        self.sparsifier: sl.Sparsifier | None = None
        self.ways = ""
        self.plain_seconds = self.update_seconds = self.validation_seconds = 0.0
        if setting.kind == "cuda":
            if setting.tune:
                measure_layers(self.model, setting.tokens, dtype=torch.bfloat16)
            self.ways = " ".join(sorted(set(choose_ways(self.model, setting.tokens).values())))
        if setting.compiler is not None:
            for layer in cast(nn.Sequential, self.model.layers):  # equal pieces of code are compiled once
                layer.compile(backend=setting.compiler, dynamic=False)

    def _fresh(self, seed: int) -> nn.Module:
        """A model with its first weights; with its first masks, too, where it holds active weights alone."""
        torch.manual_seed(seed)
        with torch.device(self.setting.kind):
            model = gpt(256, self.setting.context, self.width, self.setting.depth, self.width // self.setting.head)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(self.variant.wider**-0.5)
        if self.variant.kind == "grouped":
            masks = self._sparsifier(model, seed, sl.static(structure=ConstantFanIn(self.variant.group))).masks
            for name, mask in masks.items():
                path = name.removesuffix(".weight")
                layer = GroupedFanInLinear.from_dense(model.get_submodule(path), mask, self.variant.group)
                layer.by_feature = path.endswith("fc1")  # GELU keeps the layout, and fc2 reads it without a copy
                model.set_submodule(path, layer)
        return model

    def _sparsifier(self, model: nn.Module, seed: int, method: sl.DropGrow | sl.StraightThrough) -> sl.Sparsifier:
        return sl.Sparsifier(
            model, method, sparsity=self.variant.sparsity, distribution=uniform, exclude=["head"], seed=seed,
            init="keep" if self.variant.kind == "nm" else "density",  # the optimizer moves dense weights under 2:4
        )  # fmt: skip

    def start(self, seed: int, lr: float, steps: int, every: int) -> None:
        """First weights, masks, optimizer and the order of the batches."""
        self.stop()
        self.model.load_state_dict(self._fresh(seed).state_dict())
        self.lr, self.steps = lr, steps
        self.method = self.variant.method(steps, every, self.setting.drop_fraction)
        if self.method is not None and self.variant.kind != "grouped":
            self.sparsifier = self._sparsifier(self.model, seed, self.method)
        cuda = self.setting.kind == "cuda"
        self.base = torch.optim.AdamW(self._groups(), lr=lr, betas=(0.9, 0.95), fused=cuda)
        self.optimizer: torch.optim.Optimizer = self.base
        if self.sparsifier is not None:
            self.optimizer = sl.SparseOptimizer(self.base, self.sparsifier, fused=cuda)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randint(len(self.data.train_x), (steps, self.setting.batch), generator=generator)
        self.order = order.to(self.setting.kind)

    def stop(self) -> None:
        """Give back all memory but the model's."""
        self.sparsifier = None
        self.__dict__.pop("base", None)
        self.__dict__.pop("optimizer", None)
        self.model.zero_grad()
        if self.setting.kind == "cuda":
            gc.collect()  # what is left in cycles would count as memory in use

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate and decay: `scale` multiplies the rate, and lr·decay stays as it is."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        linear = (nn.Linear, GroupedFanInLinear)
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                scale = 1.0
                if isinstance(module, linear) and name != "bias":
                    scale = 1 / self.variant.wider
                    if self.variant.kind != "nm" and module is not self.model.head:
                        scale /= 1 - self.variant.sparsity
                decay = self.setting.weight_decay / scale if parameter.ndim > 1 else 0.0
                groups.setdefault((scale, decay), []).append(parameter)
        return [{"params": p, "scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        kind = self.setting.kind
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            logits = self.model(x)
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    def step(self, step: int) -> Tensor:
        """One optimizer step or mask update; returns the loss."""
        warm = min(1.0, (step + 1) / max(1.0, self.setting.warmup * self.steps))
        for group in self.base.param_groups:
            group["lr"] = self.lr * group["scale"] * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        rows = self.order[step % len(self.order)]
        x, y = self.data.train_x[rows], self.data.train_y[rows]
        if self.variant.kind == "grouped" and isinstance(self.method, sl.DropGrow) and self.method.due(step):
            with captured(self.model) as traffic, torch.compiler.set_stance("force_eager"):  # for the hooks
                loss = self.loss(x, y)
                loss.backward()
            update_condensed(self.model, self.method, self.base, traffic, step=step)  # in place of the step, as RigL's
        else:
            loss = self.loss(x, y)
            loss.backward()
            if isinstance(self.optimizer, sl.SparseOptimizer):
                self.optimizer.before_step()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def validation(self) -> float:
        """Nats per byte on windows spread over the held-out text."""
        x, y = self.data.test_x, self.data.test_y
        count = min(self.setting.windows, len(x))
        rows = torch.arange(count, device=x.device) * len(x) // count
        with torch.compiler.set_stance("force_eager"):  # compiling for one pass is not worth it
            losses = [self.loss(x[part], y[part]) * len(part) for part in rows.split(self.setting.batch)]
        return float(torch.stack(losses).sum()) / count

    def wait(self) -> float:
        """The time once everything is done."""
        if self.setting.kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def warm_up(self) -> None:
        """Compile all that training needs, and time a plain step, an update step and a validation."""
        self.start(0, 1e-4, 1000, WARM_EVERY)
        plain: list[float] = []
        update: list[float] = []
        for step in range(WARM_STEPS):
            due = self.method is not None and self.variant.kind != "nm" and self.method.due(step)
            begin = self.wait()
            self.step(step)
            (update if due else plain).append(self.wait() - begin)
        self.plain_seconds = sorted(plain)[len(plain) // 2]
        self.update_seconds = update[-1] if update else self.plain_seconds
        self.validation()
        begin = self.wait()
        self.validation()
        self.validation_seconds = self.wait() - begin
        self.stop()

    def steps_in(self, seconds: float) -> int:
        """How many steps fit."""
        share = 0.75 / self.setting.every if self.update_seconds != self.plain_seconds else 0.0
        return max(8, int(seconds / ((1 - share) * self.plain_seconds + share * self.update_seconds)))

    def rows(self, seed: int, lr: float, steps: int, validations: int) -> Iterator[dict[str, Any]]:
        """Train from the start; a row of the table at each validation."""
        cuda = self.setting.kind == "cuda"
        own = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        held = torch.cuda.memory_allocated() - own if cuda else 0  # by the models of the other variants
        self.start(seed, lr, steps, self.setting.every)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds, loss = 0.0, torch.tensor(math.nan)
        marks = sorted({round(steps * i / validations) for i in range(validations + 1)})
        for last, mark in itertools.pairwise([0, *marks]):
            begin = self.wait()
            for step in range(last, mark):
                loss = self.step(step)
            seconds += self.wait() - begin
            peak = torch.cuda.max_memory_allocated() - held if cuda else 0
            yield {
                "variant": self.variant.name, "seed": seed, "lr": lr, "step": mark, "seconds": round(seconds, 4),
                "val_loss": round(self.validation(), 5), "train_loss": round(float(loss), 5), "steps": steps,
                "step_ms": round(self.plain_seconds * 1e3, 3), "update_ms": round(self.update_seconds * 1e3, 3),
                "peak_gib": round(peak / 2**30, 3), "weights": self.weights(), "width": self.width,
                "depth": self.setting.depth, "batch": self.setting.batch, "context": self.setting.context,
                "sparsity": self.variant.sparsity, "every": self.setting.every, "ways": self.ways,
            }  # fmt: skip
        self.stop()

    def weights(self) -> int:
        """Active weights of the layers."""
        layers = cast(nn.Module, self.model.layers).modules()
        held = sum(m.nnz if isinstance(m, GroupedFanInLinear) else m.weight.numel()
                   for m in layers if isinstance(m, nn.Linear | GroupedFanInLinear))  # fmt: skip
        return held if self.variant.kind == "grouped" else round(held * (1 - self.variant.sparsity))


def choose_ways(
    model: nn.Module, tokens: int, timer: Callable[[Calls], float] = event_seconds, dtype: torch.dtype = torch.bfloat16
) -> dict[tuple[int, ...], str]:
    """Give every grouped layer the fastest of its ways, forward and backward; each shape is timed once, in seconds.

    The host's time counts, since this loop uses no CUDA graph and `collected` starts many kernels.
    `GroupedFanInLinear.measure` would tune the kernels' blocks, too, which takes a minute.
    """
    chosen: dict[tuple[int, ...], str] = {}
    for layer in model.modules():
        if not isinstance(layer, GroupedFanInLinear):
            continue
        shape = (layer.out_features, layer.in_features, layer.group, layer.fan_in)
        if shape not in chosen:
            x = torch.randn(tokens, layer.in_features, device=layer.values.device, dtype=dtype, requires_grad=True)
            grad = torch.randn(tokens, layer.out_features, device=x.device, dtype=dtype)
            seconds = {}
            for way in WAYS:
                layer.way = way
                seconds[way] = timer([partial(_forward_backward, layer, x, grad)])
            chosen[shape] = min(seconds, key=seconds.__getitem__)
        layer.way = chosen[shape]
    return chosen


def _forward_backward(layer: GroupedFanInLinear, x: Tensor, grad: Tensor) -> None:
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != layer.values.dtype):
        y = layer(x)
    torch.autograd.grad(y, (x, layer.values), grad)


def record(path: Path | None, row: dict[str, Any]) -> None:
    """Print a row and append it to the CSV at once, so that a command that is cut short leaves what it has."""
    print("{variant:<18} seed {seed} lr {lr:g} step {step:>5} {seconds:>8.2f} s  validation {val_loss:.4f}"
          .format(**row), flush=True)  # fmt: skip
    if path is None:
        return
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def facts(kind: str) -> dict[str, str]:
    """Hardware, versions and commit."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    gpu = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton, "commit": commit()}


def prepared(variants: Iterable[Variant], setting: Setting, data: Split) -> Iterator[Run]:
    """The variants' models, compiled and timed. One that fails is told of and left out."""
    for variant in variants:
        begin = time.perf_counter()
        try:
            run = Run(variant, setting, data)
            run.warm_up()
        except Exception:  # the others' results are worth having
            print(f"{variant.name} could not be prepared:\n{traceback.format_exc()}", flush=True)
            continue
        print(
            f"{variant.name:<18} {run.plain_seconds * 1e3:.1f} ms a step, {run.update_seconds * 1e3:.1f} ms a mask "
            f"update; ready in {time.perf_counter() - begin:.0f} s {run.ways}", flush=True,
        )  # fmt: skip
        yield run


def share(left: float, runs: Sequence[Run], validations: int) -> float:
    """Seconds of training for each of these runs, in turn, with so many in all.

    Raises:
        SparsityError: nothing is left.
    """
    left -= sum((validations + 2) * run.validation_seconds for run in runs)
    if left <= 0:
        raise SparsityError(
            "`--minutes` leaves no time to train: building, compiling and validation take it all. Give more, or fewer "
            "variants."
        )
    return 0.93 * left / max(1, len(runs))  # for starts, and steps slower than in the warm-up


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m sparselearn.recipes.bench_gpt", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("--variants", nargs="+", default=["dense", "masked1", "grouped16", "grouped32", "grouped64"])
    made.add_argument("--root", default="data/text", help="folder with .txt files")
    budget = made.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="optimizer steps of every training")
    budget.add_argument("--seconds", type=float, help="training time of every training")
    budget.add_argument("--minutes", type=float, help="for this whole command: trainings share what compiling leaves")
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--lr", nargs="+", type=float, default=[5e-4], help="each for every variant (%(default)s)")
    made.add_argument("--sparsity", type=float, default=0.90625, help="(%(default)s: fan-ins are multiples of 64)")
    for name in ("width", "depth", "head", "context", "batch", "every", "windows"):
        made.add_argument(f"--{name}", type=int, default=getattr(Setting, name), help="(%(default)s)")
    made.add_argument("--drop-fraction", type=float, default=Setting.drop_fraction, help="(%(default)s)")
    made.add_argument("--validations", type=int, default=8, help="in every training (%(default)s)")
    made.add_argument("--tune", action="store_true", help="tune the kernels' blocks before (a minute for each group)")
    made.add_argument("--eager", action="store_true", help="layers are not compiled")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--out", type=Path, help="CSV file to write or to go on with")
    return made


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    args = parser().parse_args(arguments)
    setting = Setting(
        args.width, args.depth, args.head, args.context, args.batch, every=args.every,
        drop_fraction=args.drop_fraction, windows=args.windows, kind=args.device, tune=args.tune,
        compiler="inductor" if args.device == "cuda" and not args.eager else None,
    )  # fmt: skip
    variants = [Variant.parse(text, args.sparsity) for text in args.variants]
    torch.set_float32_matmul_precision("high")
    # The layers of all variants are one piece of code to the compiler.
    torch._dynamo.config.recompile_limit = 64
    data = text_bytes(args.root, args.context).to(torch.device(setting.kind))
    runs = list(prepared(variants, setting, data))
    failed = len(runs) < len(variants)
    found = facts(setting.kind)
    # Seeds outermost, so that what is cut short has all variants of the first ones.
    plan = list(itertools.product(args.seeds, args.lr, runs))
    seconds: float | None = args.seconds
    if args.minutes:
        seconds = share(60 * args.minutes - (time.perf_counter() - began), [run for *_, run in plan], args.validations)
        print(f"{len(plan)} trainings of {seconds:.1f} s", flush=True)
    for seed, lr, run in plan:
        steps = run.steps_in(seconds) if seconds else args.steps or 500
        try:
            for row in run.rows(seed, lr, steps, args.validations):
                record(args.out, row | found)
        except Exception:
            print(f"{run.variant.name} failed:\n{traceback.format_exc()}", flush=True)
            run.stop()
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
