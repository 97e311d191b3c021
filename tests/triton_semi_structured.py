"""Runs the Triton kernels for n:m weights in the interpreter and compares them with `reference.py`; a script, started
by a test. TRITON_INTERPRET must be set before a kernel is defined. On a GPU (without that variable) `--device cuda`
runs the same cases natively.
"""

import os
import sys

DEVICE = "cuda" if "--device" in sys.argv else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from sparselearn.kernels.semi_structured import launch, reference  # noqa: E402
from sparselearn.kernels.semi_structured.launch import Blocks  # noqa: E402

empty = torch.empty


def poisoned(*args, **options):
    """Fresh memory is full of NaN or ones, so that a number that a kernel forgets is seen."""
    tensor = empty(*args, **options)
    return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)


torch.empty = poisoned
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
SHAPES = [(1, 8), (5, 24), (16, 256), (20, 264), (3, 520)]


def weights(neurons, inputs, dtype, kind="normal"):
    g = torch.Generator().manual_seed(neurons * 1000 + inputs)
    weight = torch.randn(neurons, inputs, generator=g)
    if kind == "ties":
        weight = torch.randint(-1, 2, (neurons, inputs), generator=g).float()
    if kind == "strange":
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-40, 6e4, -1.0])
        weight = odd[torch.randint(0, 8, (neurons, inputs), generator=g)]
    return weight.to(DEVICE, dtype)


def equal(actual, expected, what):
    """The same bits."""
    for a, e in zip(actual, expected, strict=True):
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
        assert a.shape == e.shape, f"{what}: shape {list(a.shape)}, expected {list(e.shape)}"
        assert torch.equal(a.view(kind), e.contiguous().view(kind)), what


def check_pack():
    for shape in SHAPES:
        for dtype in DTYPES:
            for kind in ("normal", "ties", "strange"):
                weight = weights(*shape, dtype, kind)
                mask = reference.magnitude_mask(weight)
                equal(launch.pack(weight), reference.pack(weight, mask), f"pack {shape} {dtype} {kind}")
                other = reference.magnitude_mask(weights(*shape, torch.float32).roll(1, 1))
                expected = reference.pack(weight, other)
                equal(launch.pack(weight, other), expected, f"pack by a mask {shape} {dtype} {kind}")


def check_pack_transposable():
    for shape in [(8, 8), (40, 136)]:
        for dtype in DTYPES:
            for kind in ("normal", "ties", "strange"):
                weight = weights(*shape, dtype, kind)
                mask = reference.transposable_mask(weight)
                transposed = reference.pack(weight.T.contiguous(), mask.T.contiguous())
                expected = (*reference.pack(weight, mask), *transposed)
                made = launch.pack_transposable(weight)
                equal(made, expected, f"tiles {shape} {dtype} {kind}")
                values, places, values_t, places_t = made
                equal([launch.transpose_values(values, places, places_t)], [values_t], f"transpose {shape} {dtype}")


PATTERNS = [(2, 4), (1, 4), (2, 8), (1, 8), (2, 16), (1, 16), (3, 8), (1, 2), (1, 3)]


def check_products():
    for n, m in PATTERNS:
        for tokens, neurons, groups in [(1, 5, 7), (3, 9, 11), (8, 4, 33)]:
            for dtype in DTYPES:
                weight = weights(neurons, groups * m, dtype)
                values, places = reference.pack(weight, reference.magnitude_mask(weight, n, m), n, m)
                x = weights(tokens, groups * m, dtype)
                bias = weights(1, neurons, dtype)[0] if tokens != 3 else None
                wide = [None if t is None else t.double() for t in (x, values, bias)]
                expected = reference.linear(*wide[:2], places, wide[2], n, m)
                limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
                for blocks in (None, Blocks(2, 16, 4)):
                    y = launch.gemv(x, values, places, bias, n, m, blocks)
                    error = (y.double() - expected).abs().max() / expected.abs().max()
                    assert error <= limit, f"{n}:{m} {tokens} {neurons} {groups} {dtype}: {error}"  # NaN is not


def check_unpack_and_gather():
    for n, m in PATTERNS:
        for dtype in DTYPES:
            weight = weights(6, 37 * m, dtype, "strange")
            values, places = reference.pack(weight, reference.magnitude_mask(weights(6, 37 * m, dtype), n, m), n, m)
            dense = reference.unpack(values, places, n, m)
            equal([launch.unpack(values, places, n, m)], [dense], f"unpack {n}:{m}")
            equal([launch.gather(weight, places, n, m)], [values], f"gather {n}:{m}")


def check_nan_stays_in_its_row():
    """A NaN in an input or token that a neuron does not use, and what fills up blocks, reaches no other number."""
    weight = weights(9, 40, torch.float32)
    mask = torch.zeros(9, 40, dtype=torch.bool, device=DEVICE)
    mask[:, 1::4] = mask[:, 2::4] = True
    x = weights(3, 40, torch.float32)
    x[:, ::4], x[1] = torch.nan, torch.nan
    y = launch.gemv(x, *reference.pack(weight, mask), None, 2, 4)
    assert torch.isfinite(y[[0, 2]]).all()
    assert y[1].isnan().all()


if __name__ == "__main__":
    check_pack()
    check_pack_transposable()
    check_products()
    check_unpack_and_gather()
    check_nan_stays_in_its_row()
    print("all equal")
