"""Runs the selection kernels in the interpreter against `reference.update`; a script, started by a test.

TRITON_INTERPRET must be set before a kernel is defined, so this needs a process of its own. `--device cuda` runs the
same cases natively, `--quick` a tenth of them.
"""

# ruff: noqa: E402

import os
import sys
from itertools import product

DEVICE = "cuda" if "--device" in sys.argv else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from sparselearn.kernels.select import Item, launch, reference, triton_lines
from sparselearn.kernels.select import triton_search as kernels
from sparselearn.structures.base import highest

SMALL = {"block": 128, "steps": 2, "warps": 1, "sample": 64}  # several programs for each layer
TINY = torch.finfo(torch.float32).smallest_normal


def scores(kind, shape, dtype, g):
    """Scores on which selection is hard."""
    x = torch.randn(shape, generator=g)
    if kind == "equal":
        x = torch.full(shape, 0.5)
    elif kind == "half ties":
        x = torch.where(torch.rand(shape, generator=g) < 0.5, 1.0, x)
    elif kind == "few values":
        x = torch.randint(-2, 3, shape, generator=g).float()
    elif kind == "zeros":  # of both signs, and a few others
        x = torch.where(x > 2, x, x.sign() * 0)
    elif kind == "denormals":
        x = x * TINY / 8 if dtype != torch.float16 else x * 1e-7
    elif kind == "infinities":
        x = torch.where(x.abs() > 1, x.sign() * torch.inf, x)
    elif kind == "wide":
        x = x * torch.exp2(torch.randint(-100, 100, shape, generator=g).float())
    elif kind == "steps":  # the sample's order is not that of the rest
        x = torch.linspace(-1, 1, x.numel()).view(shape) ** 9
    elif kind == "outlier":
        x = torch.full(shape, 0.25)
        x.view(-1)[7 % x.numel()] = 3
    return x.to(dtype)


KINDS = ("normal", "equal", "half ties", "few values", "zeros", "denormals", "infinities", "wide", "steps", "outlier")
SHAPES = [(1, 1), (16, 48), (3, 5, 3, 3), (7, 11), (8, 16, 3, 3), (2, 300)]


def item(w_kind, g_kind, shape, dtype, density, drop, g, *, states=1, channels_last=False, exclude=False):
    n = torch.Size(shape).numel()
    m = torch.rand(shape, generator=g) < density
    active = int(m.sum())
    n_keep = active - int(drop * active)
    n_grow = min(active - n_keep, n - active) if exclude else active - n_keep
    w = scores(w_kind, shape, dtype, g).masked_fill(~m, 0)
    grown, fired = m & (torch.rand(shape, generator=g) < 0.2), m | (torch.rand(shape, generator=g) < 0.2)
    state = [torch.rand(shape, generator=g).add(1).masked_fill(~m, 0) for _ in range(states)]
    tensors = [w, scores(g_kind, shape, dtype, g), m, grown, fired, *state]
    order = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    w, grad, m, grown, fired, *state = (t.to(DEVICE, memory_format=order) for t in tensors)
    return Item(w, grad, m, grown, fired, tuple(state), active, n_keep, n_grow)


def copied(items):
    return [i._replace(weight=i.weight.clone(), state=tuple(s.clone() for s in i.state)) for i in items]


def check(items, what, blocks=SMALL, **options):
    expected_items = copied(items)
    expected = reference.update(expected_items, **options)
    got = launch.update(items, **options, **blocks)
    assert got is not None, what
    for i, (a, b, x, y) in enumerate(zip(got.masks, expected.masks, items, expected_items, strict=True)):
        for name, s, t in zip(a._fields, a, b, strict=True):
            assert torch.equal(s, t), f"{what}: {name} of {i}, {tuple(x.weight.shape)}"
            assert s.stride() == t.stride(), what
        for s, t in zip((x.weight, *x.state), (y.weight, *y.state), strict=True):
            assert torch.equal(s, t), f"{what}: values of {i}"
    assert got[1:5] == expected[1:5], what
    near = torch.isclose(torch.tensor(got.squares), torch.tensor(expected.squares), rtol=1e-5)
    assert near or not torch.isfinite(torch.tensor(expected.squares)), what


WAYS = set()


class Seen(launch.Search):
    """Notes the ways that searches took."""

    def find(self):
        found = super().find()
        for row in self.search.tolist():
            sure, packed, missing, ties, threshold = (
                row[i.value] for i in (kernels.SURE, kernels.PACKED, kernels.MISSING, kernels.TIES, kernels.LO)
            )
            way = "packed" if packed else "too many" if sure else "wrong guess"
            at_end = threshold in row[kernels.HOT.value :][:2]
            WAYS.add((way, "some ties" if missing < ties else "all ties", "end" if at_end else "inside"))
        return found


launch.Search = Seen
launch.TILE = 32  # several tiles for the packed keys of a program


def check_refused():
    g = torch.Generator().manual_seed(3)
    for part, active in product(("weight", "grad"), (True, False)):
        shapes = SHAPES[3:4] if "--quick" in sys.argv and active else SHAPES
        items = [item("normal", "normal", shape, torch.float32, 0.4, 0.3, g) for shape in shapes]
        refused = items[3 % len(items)]
        getattr(refused, part)[tuple((refused.mask == active).nonzero()[-1])] = -torch.nan
        before = copied(items)
        assert launch.update(items, **SMALL) is None
        assert reference.update(items) is None
        for a, b in zip(items, before, strict=True):
            assert torch.equal(a.weight.nan_to_num(9), b.weight.nan_to_num(9))
            assert torch.equal(a.state[0], b.state[0])
    items = [item("normal", "normal", (9, 9), torch.float32, 0.5, 0.3, g)]
    items = [items[0]._replace(n_keep=items[0].n_active + 1)]  # more than there are
    assert launch.update(items, **SMALL) is None


def check_misled():
    """Scores that are otherwise at the places of the sample than elsewhere, and many of them equal."""
    g = torch.Generator().manual_seed(5)
    x = item("few values", "few values", (16, 64), torch.float32, 1, 0.5, g)
    i = torch.arange(64)
    sampled = i * 16 + ((i * 40503) & 0xFFFF) * 16 // 65536
    for score in (x.weight, x.grad):
        score.view(-1)[sampled] = 9
    check([x], "misled")


def check_lines():
    """Against the formula on the CPU; the mask lies in memory as the score does, and nothing is written beside it."""
    g = torch.Generator().manual_seed(7)
    views = {
        "rows": lambda x: x.unflatten(1, (-1, 4)),
        "columns": lambda x: x.unflatten(0, (-1, 4)).movedim(1, -1),
        "input channels": lambda x: x.view(-1, 8, 3, 3).movedim(1, -1).unflatten(-1, (-1, 4)),
        "with gaps": lambda x: x[:, :-1].unflatten(1, (-1, 5)),
        "single numbers": lambda x: x.unsqueeze(-1),
        "one line": lambda x: x.flatten()[:16],
    }
    for i, (name, view) in enumerate(views.items()):
        for kind in (
            ("normal", "equal", "few values", "infinities") if i == 2 or "--quick" not in sys.argv else KINDS[:1]
        ):
            dtype = (torch.float32, torch.bfloat16, torch.float64)[i % 3]
            score = view(scores(kind, (72, 36), dtype, g))
            for k in {1, min(2, score.shape[-1]), score.shape[-1]}:
                mask = triton_lines.highest(score.to(DEVICE), k).cpu()
                assert torch.equal(mask, highest(score, k)), f"{name} {kind} {k}"
                assert name == "with gaps" or mask.stride() == score.stride(), name


def check_all():
    g = torch.Generator().manual_seed(1)
    pairs = [*zip(KINDS, KINDS[3:] + KINDS[:3], strict=True)]
    if DEVICE == "cuda":  # twice as many would take the interpreter a minute
        pairs += zip(KINDS, KINDS, strict=True)
    for i, (w_kind, g_kind) in enumerate(pairs):
        if "--quick" in sys.argv and i % 10:
            continue
        dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float16)[i % 4]
        exclude, reinit, last = i % 3 == 1, i % 5 == 2, i % 2 == 1
        parts = zip(SHAPES, (1, 0.1, 0.5, 0.9, 0.3, 0.2), (1, 0.3, 0.5, 0.1, 0.0, 0.9), strict=True)
        items = [
            item(w_kind, g_kind, shape, dtype, density, drop, g, states=i % 4, channels_last=last, exclude=exclude)
            for shape, density, drop in parts
        ]
        what = f"{w_kind} {g_kind} {dtype} {exclude=} {reinit=} {last=}"
        check(items, what, exclude_dropped=exclude, reinit=reinit)
    aligned = [item("normal", "half ties", (16, 64), torch.float32, 0.3, 0.3, g, states=2) for _ in range(2)]
    check(aligned, "sizes of whole sectors", {"block": 128, "steps": 4, "warps": 1, "sample": 16})
    grows = [x._replace(n_grow=x.n_grow + 5) for x in aligned]
    check(grows, "more than before")
    check([item("few values", "equal", (9, 9), torch.float32, 0.5, 0, g)], "nothing moves")


if __name__ == "__main__":
    check_refused()
    check_misled()
    check_lines()
    assert ("wrong guess", "some ties", "inside") in WAYS
    check_all()
    seen = {way[:2] for way in WAYS}
    assert "--quick" in sys.argv or len(seen) == 6, f"no case went other ways than {sorted(seen)}"
    print("all equal")
