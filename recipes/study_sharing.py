"""What a constant fan-in costs on a CNN, and what sharing it among V filters costs: the runs of `sharing-cnn.csv`.

    python -m sparselearn.recipes.study_sharing --root data --jobs 16 --seconds 300 --out runs/sharing

ResNet-8 of width 64 on Fashion-MNIST, 936 steps of 256 (the recipe `fashion_mnist`). The cells are in order of
importance; `--jobs` processes take one after the other, and after `--seconds` what is not finished is given up, so that
a run always ends with whole rows in `<out>/results.csv`. Finished cells are kept: a second call goes on.

Ways to share that are compared at V = 16, and at V = 8 in a narrow network (column `way`; empty is `ConstantFanIn(V)`
as it is: neighbours are a group, and the sum of |w| or |dL/dw| over it ranks):

- `squares`, `largest`: Σ s², or max s, in place of Σ s. (Means need no run: all groups are of equal size.)
- `coherent`: growth by |Σ dL/dw|, what the loss would gain if the whole group moved in one direction.
- `random`: random growth, as in SET. `unbalanced`: groups begin at random, not with every input used about as often.
- `similar`: groups of filters that want like inputs, not of neighbours (`SimilarFanIn`), for methods that have dense
  weights to compare: SR-STE with masks chosen every 50 steps (each time groups may change) and magnitude pruning
  (grouped once, where dense weights are first pruned). Their V = 1 and neighbours are there for comparison.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparselearn import config as configs
from sparselearn.criteria import Criterion, Layer, gradient, random
from sparselearn.errors import SparsityError
from sparselearn.methods import DropGrow, gmp, rigl
from sparselearn.recipes.sweep import folder_of
from sparselearn.recipes.train import train
from sparselearn.structures import ConstantFanIn, rows

RECIPE = "fashion_mnist"
BASE = ("extend=0.4", "eval_every=0", "model.depth=8", "exclude=[network.0.weight,network.8.weight]")
COLUMNS = ("recipe", "method", "structure", "group", "way", "width", "sparsity", "learning_rate", "density_scaling",
           "seed", "steps", "test_accuracy", "test_loss", "nnz", "parameters", "training_flops", "seconds", "hardware",
           "torch", "commit")  # fmt: skip
HERE = "sparselearn.recipes.study_sharing"
WAYS = {"squares": "power=squares", "coherent": "grow=coherent", "random": "grow=random",
        "unbalanced": "balanced=false", "largest": "power=largest"}  # fmt: skip
Power = Literal["sum", "squares", "largest"]


@dataclass(frozen=True)
class PooledFanIn(ConstantFanIn):
    """`ConstantFanIn` whose groups are ranked by Σ s² or max s over their filters; for methods of drop and grow."""

    power: Power = "sum"

    def pool(self, score: Tensor) -> Tensor:
        if self.power == "squares":
            return super().pool(score.square())
        if self.power == "sum" or self.group == 1:
            return super().pool(score)
        matrix = rows(score)
        best = self._grouped(matrix).amax(1)
        silent = (matrix == -torch.inf).all(1, keepdim=True)
        pooled: Tensor = self._spread(best, len(matrix)).masked_fill(silent, -torch.inf).view(score.shape)
        return pooled


@dataclass(frozen=True)
class coherent_gradient:
    """|Σ dL/dw| over the filters of a group, for each of them."""

    group: int

    def __call__(self, layer: Layer) -> Tensor:
        matrix = rows(layer.dense_grad())
        missing = -len(matrix) % self.group
        groups: Tensor = torch.nn.functional.pad(matrix, (0, 0, 0, missing)).unflatten(0, (-1, self.group)).sum(1)
        return groups.abs().repeat_interleave(self.group, 0)[: len(matrix)].view(layer.weight.shape)


def assign(score: Tensor, group: int, fan_in: int, rounds: int = 5) -> Tensor:
    """A group for every row of `score` [n, inputs], `group` rows each, so that sharing keeps more of the score.

    A group's inputs are the `fan_in` with the highest sum over its rows. Rows are dealt to the groups anew, the best
    fit first, `rounds` times; the best of all assignments is taken, the first of which is that of neighbours. Every
    row's score counts as a fraction of its sum.
    """
    n, n_groups = len(score), math.ceil(len(score) / group)
    score = score.float().cpu()
    score = score / score.sum(1, keepdim=True).clamp(min=1e-30)
    now = torch.arange(n) // group
    best, most = now, -math.inf
    for _ in range(rounds + 1):
        sums = torch.zeros(n_groups, score.shape[1]).index_add_(0, now, score)
        chosen = sums.topk(fan_in, dim=1)
        if (kept := float(chosen.values.sum())) > most:
            best, most = now, kept
        inputs = torch.zeros_like(sums).scatter_(1, chosen.indices, 1.0)
        now = _dealt(score @ inputs.T, group)
    return best


def _dealt(fit: Tensor, group: int) -> Tensor:
    """A group for each row of `fit` [rows, groups], the best pairs first; the last group may have fewer rows."""
    n, n_groups = fit.shape
    room = [group] * n_groups
    room[-1] -= n_groups * group - n
    result, left = torch.full((n,), -1), n
    for pair in fit.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(pair, n_groups)
        if room[column] and result[row] < 0:
            result[row], room[column], left = column, room[column] - 1, left - 1
            if not left:
                break
    return result


@dataclass(frozen=True)
class SimilarFanIn(ConstantFanIn):
    """`group` filters share their inputs, but which ones are a group follows from the scores (`assign`).

    Filters that may have different weights (their scores are `-inf` at different places) are never grouped: a method
    that only prunes keeps the groups that its first pruning made.
    """

    def first(self, score: Tensor, nnz: int) -> Tensor:
        return ConstantFanIn(self.group, self.balanced).first(score, nnz)

    def topk(self, score: Tensor, nnz: int, keep: Tensor | None = None) -> Tensor:
        matrix = rows(score)
        fan_in = nnz // len(matrix)
        _, kinds = (matrix > -torch.inf).byte().unique(dim=0, return_inverse=True)
        place, start = torch.empty(len(matrix), dtype=torch.long), 0
        for kind in range(int(kinds.max()) + 1):
            members = (kinds == kind).nonzero()[:, 0].cpu()
            worth = matrix[members.to(matrix.device)].clamp(min=0)
            own = assign(worth, self.group, fan_in) if len(members) > self.group else torch.zeros(len(members))
            place[members] = start + own.argsort(stable=True).argsort()
            start += len(members)
        order = place.argsort().to(matrix.device)  # filter after filter, groups beside each other
        kept = None if keep is None else rows(keep)[order]
        mask = torch.empty_like(matrix, dtype=torch.bool)
        mask[order] = ConstantFanIn(self.group).topk(matrix[order], nnz, kept)
        return mask.view(score.shape)

    def pool(self, score: Tensor) -> Tensor:
        return score  # groups are known in `topk` only

    def check(self, mask: Tensor, nnz: int) -> None:
        ConstantFanIn().check(mask, nnz)
        alike = rows(mask).byte().unique(dim=0, return_counts=True)[1]
        if int((alike % self.group).sum()) != len(mask) % self.group:
            raise SparsityError(
                f"A mask of `{self}` must have {self.group} rows of every kind; it has {alike.tolist()}."
            )


def shared_rigl(
    *, stop: int, every: int, drop_fraction: float, group: int, power: Power = "sum",
    grow: Literal["gradient", "coherent", "random"] = "gradient", balanced: bool = True,
) -> DropGrow:  # fmt: skip
    """RigL with a constant fan-in that groups share in one of the ways above."""
    growth: dict[str, Criterion] = {"gradient": gradient, "coherent": coherent_gradient(group), "random": random}
    structure = PooledFanIn(group, balanced, power)
    return replace(rigl(stop=stop, every=every, drop_fraction=drop_fraction, structure=structure), grow=growth[grow])


def shared_gmp(*, stop: int, every: int, start: int, group: int, similar: bool = False) -> DropGrow:
    """Gradual magnitude pruning to a constant fan-in that groups share."""
    structure = SimilarFanIn(group) if similar else ConstantFanIn(group)
    return replace(gmp(stop=stop, every=every, start=start), structure=structure)


class Cell(NamedTuple):
    """One run: what it is called in the table, and what is set for it."""

    labels: dict[str, Any]
    changes: tuple[str, ...]


def cell(method: str, sparsity: float, seed: int, group: int | None = None, *, way: str = "", width: int = 64) -> Cell:
    """The run of a method with free masks (`group` None) or a constant fan-in that `group` filters share."""
    fan_in = ("method.structure.fn=sparselearn.ConstantFanIn", f"method.structure.group={group}") if group else ()
    changes: tuple[str, ...] = (f"variant={method}",)
    if method == "dense":
        sparsity = 0.0
    elif method == "sr_ste":
        free = ("method.structure.fn=sparselearn.Unstructured",)
        if way.endswith("similar"):
            fan_in = (f"method.structure.fn={HERE}.SimilarFanIn", f"method.structure.group={group}")
        changes = ("variant=dense", "method.fn=sparselearn.sr_ste", "method.decay=0.0002", *(fan_in or free))
        if way.startswith("every 50"):
            changes += ("method.every=50",)
    elif method == "srigl":
        changes = ("variant=rigl", "method.fn=sparselearn.srigl", "method.gamma=0.3", f"method.group={group}")
    elif method == "gmp":
        changes += ("density_scaling=false", f"method.fn={HERE}.shared_gmp", f"method.group={group}")
        changes += ("method.similar=true",) if way == "similar" else ()
    elif way:
        changes += (f"method.fn={HERE}.shared_rigl", f"method.group={group}", f"method.{WAYS[way]}")
    else:
        changes += fan_in
    labels = {
        "method": method, "structure": "constant fan-in" if group else "" if method == "dense" else "unstructured",
        "group": group or "", "way": way, "width": width, "sparsity": sparsity, "seed": seed,
    }  # fmt: skip
    return Cell(labels, (*changes, f"sparsity={sparsity:g}", f"model.width={width}", f"seed={seed}"))


def cells() -> list[Cell]:
    """All runs, the most important first."""
    kinds = (("static", None), ("rigl", None), ("rigl", 1), ("srigl", 1), ("sr_ste", None), ("sr_ste", 1))
    wanted: list[tuple[tuple[str, float], dict[str, Any]]] = [(("dense", 0.0), {})]
    wanted += [((method, 0.95), {"group": group}) for method, group in kinds]
    wanted += [(("rigl", 0.95), {"group": group}) for group in (4, 8, 16, 32)]
    wanted += [((method, sparsity), {"group": group}) for sparsity in (0.9, 0.98) for method, group in kinds]
    wanted += [(("static", 0.95), {"group": 16})]
    wanted += [(("rigl", 0.95), {"group": 16, "way": way}) for way in WAYS]
    for method, ways in (("sr_ste", ("every 50", "every 50, similar")), ("gmp", ("", "similar"))):
        wanted += [((method, 0.95), {"group": 16, "way": way}) for way in ways]
        wanted += [((method, 0.95), {"group": 1, "way": ways[0]})]
    wanted += [(("rigl", sparsity), {"group": group}) for sparsity in (0.9, 0.98) for group in (16, 8, 32, 4)]
    wanted += [(("rigl", 0.95), {"group": group, "width": 32}) for group in (1, 16, 4, 8)]
    wanted += [(("rigl", 0.95), {"group": group, "width": 16}) for group in (1, 4, 8, 16)]
    wanted += [(("rigl", 0.95), {"group": 8, "way": way, "width": 16}) for way in WAYS]
    wanted += [(("srigl", 0.95), {"group": group, "width": 16}) for group in (8, 1)]
    return [cell(method, sparsity, seed, **more) for (method, sparsity), more in wanted for seed in (0, 1, 2)]


def _work(out: Path, todo: Sequence[Cell], more: Sequence[str], counter: Any, done: Any) -> None:
    """Train cells until none is left; the counter is shared by all processes."""
    torch.set_num_threads(1)
    while True:
        with counter.get_lock():
            i, counter.value = counter.value, counter.value + 1
        if i >= len(todo):
            return
        start = time.perf_counter()
        try:
            config = configs.load(RECIPE, [*BASE, *todo[i].changes, *more])
            train(config, _folder(out, todo[i]), progress=False)
            done.put((i, time.perf_counter() - start, ""))
        except Exception as error:  # one bad cell must not cost the others their time on a GPU
            done.put((i, time.perf_counter() - start, f"{type(error).__name__}: {error}"))


def _folder(out: Path, one: Cell) -> Path:
    return folder_of(out, {key: value for key, value in one.labels.items() if value != ""})


def collect(out: Path, wanted: Sequence[Cell]) -> list[dict[str, Any]]:
    """The rows of the finished cells, written to `<out>/results.csv`."""
    table = []
    for one in wanted:
        if (path := _folder(out, one) / "result.json").exists():
            table.append(json.loads(path.read_text()) | one.labels)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.csv.tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    (out / "results.csv.tmp").replace(out / "results.csv")
    return table


def run(out: Path, wanted: Sequence[Cell], more: Sequence[str], jobs: int, seconds: float) -> list[str]:
    """Train what is not finished, at most for so long; returns what went wrong."""
    todo = [one for one in wanted if not (_folder(out, one) / "result.json").exists()]
    context = multiprocessing.get_context("spawn")
    counter, done = context.Value("l", 0), context.Queue()
    started, errors, finished = time.monotonic(), list[str](), 0
    os.environ["OMP_NUM_THREADS"] = "1"  # for the children, else they fight for the cores
    share = (out, todo, more, counter, done)
    workers = [context.Process(target=_work, args=share) for _ in range(min(jobs, len(todo)))]
    for worker in workers:
        worker.start()
    while finished < len(todo) and (left := seconds - (time.monotonic() - started)) > 0:
        try:
            i, took, error = done.get(timeout=min(left, 2.0))
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        finished += 1
        table, name = collect(out, wanted), " ".join(f"{v}" for v in todo[i].labels.values() if v != "")
        now = f"{time.monotonic() - started:5.0f} s, {len(table)} of {len(wanted)}, {took:.1f} s"
        if error:
            errors.append(f"{name}: {error}")
        else:
            error = f"{json.loads((_folder(out, todo[i]) / 'result.json').read_text())['test_accuracy']:.2%}"
        print(f"{now}: {name}: {error}", flush=True)
    for worker in workers:  # our own children; an unfinished cell begins anew with the next call
        worker.kill()  # Lightning takes SIGTERM for a wish to end well
        worker.join()
    collect(out, wanted)
    return errors


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m sparselearn.recipes.study_sharing", description=__doc__)
    made.add_argument("--root", default="data", help="folder with Fashion-MNIST's files")
    made.add_argument("--out", type=Path, default=Path("runs/sharing"))
    made.add_argument("--jobs", type=int, default=1, help="processes at a time")
    made.add_argument("--seconds", type=float, default=math.inf, help="give up what is not finished by then")
    made.add_argument("--first", type=int, help="only so many cells")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all runs, e.g. max_steps=10")
    made.add_argument("--list", action="store_true", help="print the cells and end")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    return made


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    wanted = cells()[: args.first]
    if args.list:
        for i, one in enumerate(wanted):
            print(i, *BASE, *one.changes)
        return
    errors = run(args.out, wanted, [f"data.root={args.root}", *args.set], args.jobs, args.seconds)
    print(f"{len(collect(args.out, wanted))} of {len(wanted)} runs are in {args.out / 'results.csv'}.")
    if errors:
        raise SystemExit("\n".join(errors))


if __name__ == "__main__":
    main()
