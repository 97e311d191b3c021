"""Every encoding holds every mask and every bit; the smallest is chosen; files of version 1 stay readable.

`python tests/test_checkpoint_encodings.py` writes the golden checkpoint anew; only a new format version calls for it.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselearn import SparsityError
from sparselearn.checkpoint import bits, encodings, inspect, load_masks, load_state_dict, save, verify
from sparselearn.checkpoint.encodings import Bitmask, Condensed, Csr, Dense, Packed, choose

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

GOLDEN = Path(__file__).parent / "golden" / "checkpoint_v1"
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
OTHERS = [torch.int64, torch.int8, torch.uint16, torch.bool, torch.complex64]


def same(a, b):
    """Equal in dtype, shape and every bit."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def noise(shape, dtype, generator):
    """Random bits: numbers, infinities, NaN with all kinds of payload, and zeros of both signs."""
    raw = torch.from_numpy(generator.integers(0, 256, (math.prod(shape), dtype.itemsize), dtype=np.uint8))
    raw[::5] = 0
    raw[::7, :-1] = 0
    raw[::7, -1] = 0x80
    return (raw % 2 if dtype == torch.bool else raw).reshape(-1).view(dtype).reshape(shape)


def bools(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


# ---- what is written, worked by hand ---------------------------------------------------------------------------------


def check(encoding, mask, expected):
    flat, shape = mask.numpy().reshape(-1), tuple(mask.shape)
    parts = encoding.encode(flat, shape)
    assert {name: (array.dtype.name, array.tolist()) for name, array in parts.items()} == expected
    claimed = encoding.parts(shape, int(mask.sum()))
    assert claimed == {name: (array.dtype, array.shape) for name, array in parts.items()}
    assert np.array_equal(encoding.decode(parts, shape, int(mask.sum())), flat)


def test_bitmask_lowest_bit_first():
    check(Bitmask(), bools("10010", "01001"), {"bits": ("uint8", [0b01001001, 0b10])})


def test_condensed_names_active_rows_and_columns():
    mask = bools("0110", "0000", "1001")
    check(Condensed(2), mask, {"rows": ("uint8", [0b101]), "indices": ("uint8", [[1, 2], [0, 3]])})


def test_csr_points_to_the_start_of_each_row():
    mask = bools("0110", "0000", "0001")
    check(Csr(), mask, {"pointers": ("uint8", [0, 2, 2, 3]), "indices": ("uint8", [1, 2, 3])})


def test_packed_numbers_patterns_in_ascending_order():
    # 2:4 patterns, weight 0 in the lowest bit: 0011 0101 0110 1001 1010 1100 = numbers 0 to 5, 3 bits each
    mask = bools("11000011", "01101001")  # groups 0011, 1100, 0110, 1001: numbers 0, 5, 2, 3
    check(Packed(2, 4, 1), mask, {"patterns": ("uint8", [0b10101000, 0b0110])})
    # 1:2 along dimension 0: columns (1,0) (0,1) (1,0): numbers 0, 1, 0, one bit each
    check(Packed(1, 2, 0), bools("101", "010"), {"patterns": ("uint8", [0b010])})
    # 1:3 takes two bits: numbers 2, 0, 1
    check(Packed(1, 3, 1), bools("001", "100", "010"), {"patterns": ("uint8", [0b010010])})


def test_groups_of_a_convolution_run_over_channels():
    mask = torch.zeros(1, 2, 1, 3, dtype=torch.bool)
    mask[0, 0, 0, 1] = mask[0, 1, 0, 0] = mask[0, 1, 0, 2] = True  # channel 1, 0, 1 at the three positions
    check(Packed(1, 2, 1), mask, {"patterns": ("uint8", [0b101])})


def test_index_types():
    types = [encodings.index_dtype(n).name for n in (0, 1, 256, 257, 65536, 65537, 1 << 32)]
    assert types == ["uint8", "uint8", "uint8", "uint16", "uint16", "uint32", "uint32"]


@pytest.mark.parametrize(
    ("encoding", "mask"),
    [(Condensed(2), bools("110", "100")), (Packed(1, 2, 1), bools("1011")), (Packed(2, 4, 1), bools("11100100"))],
)
def test_an_encoding_refuses_masks_that_it_cannot_hold(encoding, mask):
    with pytest.raises(SparsityError):
        encoding.encode(mask.numpy().reshape(-1), tuple(mask.shape))


# ---- which is chosen -------------------------------------------------------------------------------------------------


def pick(mask, kind=None, itemsize=2):
    return choose(mask.numpy().reshape(-1), tuple(mask.shape), int(mask.sum()), itemsize, kind)


def scattered(rows, columns, nnz):
    flat = torch.zeros(rows * columns, dtype=torch.bool)
    flat[torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))[:nnz]] = True
    return flat.view(rows, columns)


def fan_in(rows, columns, k):
    return torch.stack([scattered(1, columns, k)[0].roll(i) for i in range(rows)])


def test_the_smallest_is_chosen():
    assert pick(torch.ones(3, 4, dtype=torch.bool)) == Dense()
    assert pick(torch.zeros(0, 4, dtype=torch.bool)) == Dense()
    assert pick(scattered(64, 300, 1920)) == Bitmask()  # 10 %: 2400 bytes against 3840 of indices
    assert pick(scattered(64, 300, 400)) == Csr()  # 800 + 130
    assert pick(scattered(64, 256, 1638)) == Csr()  # one byte an index: 1638 + 130 against 2048
    assert pick(fan_in(64, 300, 15)) == Condensed(15)
    ablated = fan_in(64, 300, 15)
    ablated[::3] = False
    assert pick(ablated) == Condensed(15)
    assert pick(fan_in(64, 300, 60)) == Bitmask()
    assert pick(bools("11000011", "01101001")) == Packed(2, 4, 1)
    assert pick(bools("10011010", "01100101")) == Packed(1, 2, 1)  # the shortest group
    assert pick(bools("1101", "0010", "1111", "0000")) == Packed(1, 2, 0)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_encoding_is_smaller(seed):
    generator = np.random.default_rng(seed)
    for _ in range(30):
        rows, columns = generator.integers(1, 40, 2) * generator.choice([1, 4, 30])
        nnz = int(rows * columns * generator.choice([0.5, 0.1, 0.03, 0.005]))
        mask = scattered(rows, columns, nnz) if generator.random() < 0.5 else fan_in(rows, columns, nnz // rows)
        chosen = pick(mask)
        sizes = {}
        for kind in encodings.KINDS:
            try:
                parts = pick(mask, kind).encode(mask.numpy().reshape(-1), tuple(mask.shape))
            except SparsityError:
                continue
            values = mask.numel() if kind == "dense" else int(mask.sum())
            sizes[kind] = 2 * values + sum(part.nbytes for part in parts.values())
        assert sizes[chosen.name] == min(sizes.values()), (sizes, mask.shape, int(mask.sum()))
        assert chosen.stored_bytes(tuple(mask.shape), int(mask.sum()), 2) == sizes[chosen.name]


def test_a_layer_that_is_almost_empty_cannot_become_a_bomb():
    mask = torch.zeros(2, 1 << 20, dtype=torch.bool)
    assert pick(mask) == Bitmask()
    with pytest.raises(SparsityError, match="more than 1024 entries for each byte"):
        pick(mask, "csr")


# ---- sizes -----------------------------------------------------------------------------------------------------------


def resnet50():
    """Weights of ResNet-50, and the numbers beside them."""
    shapes, width = {"conv1": (64, 3, 7, 7)}, 64
    for stage, (blocks, planes) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes |= {f"{name}.conv1": (planes, width, 1, 1), f"{name}.conv2": (planes, planes, 3, 3)}
            shapes[f"{name}.conv3"] = (4 * planes, planes, 1, 1)
            if block == 0:
                shapes[f"{name}.downsample"] = (4 * planes, width, 1, 1)
            width = 4 * planes
    shapes["fc"] = (1000, 2048)
    norms = {f"{name}.bn": (4, shape[0]) for name, shape in shapes.items()}  # scale, shift, mean, variance
    return shapes, norms


def saved_fraction(path, masks, norms):
    state = {name: torch.ones(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, 0) for name, mask in masks.items()}
    state |= {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in norms.items()}
    save(state, path, masks=masks)
    found = inspect(path)
    on_disk = sum(file.stat().st_size for file in path.iterdir())
    assert found.stored_bytes < on_disk < found.stored_bytes + 100_000
    return on_disk / found.dense_bytes, {weight.encoding for weight in found.weights if weight.masked}


@pytest.mark.parametrize(("sparsity", "limit"), [(0.9, 0.17), (0.95, 0.113)])
def test_size_of_an_unstructured_resnet50(tmp_path, sparsity, limit):
    shapes, norms = resnet50()
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(shape, generator=generator) >= sparsity for name, shape in shapes.items()}
    fraction, _ = saved_fraction(tmp_path, masks, norms)
    print(f"{sparsity}: {fraction:.4f}")
    assert fraction <= limit


def test_size_of_a_2_4_resnet50(tmp_path):
    shapes, norms = resnet50()
    masks = {}
    for name, shape in shapes.items():
        groups = torch.rand(math.prod(shape) // 4 or 1, 4).argsort(1) < 2
        masks[name] = groups.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if name != "conv1" else None
    masks["conv1"] = torch.ones(shapes["conv1"], dtype=torch.bool)
    fraction, chosen = saved_fraction(tmp_path, masks, norms)
    print(f"2:4: {fraction:.4f}")
    assert fraction <= 0.57
    assert chosen == {"dense", "packed_nm"}


# ---- round trips -----------------------------------------------------------------------------------------------------


EXAMPLES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "shape": st.lists(st.integers(0, 9), max_size=3) | st.lists(st.integers(0, 5), max_size=5),
        "dtype": st.sampled_from(FLOATS + OTHERS),
        "kind": st.sampled_from([None, *encodings.KINDS]),
        "pattern": st.sampled_from([0.0, 0.05, 0.3, 1.0, "fan-in", "n:m"]),
    }
)


def build(seed, shape, dtype, kind, pattern):
    """A weight of random bits, a mask of the pattern, and an encoding that holds it (or None: the smallest)."""
    generator = np.random.default_rng(seed)
    pattern = {"condensed": "fan-in", "packed_nm": "n:m"}.get(kind, pattern)
    if pattern == "n:m":
        shape = shape or [1]
        m, dim = int(generator.integers(2, 17)), int(generator.integers(min(len(shape), 2)))
        shape[dim] = m * -(-shape[dim] // 4)
        lines = [*shape[:dim], *shape[dim + 1 :], shape[dim] // m]
        mask = generator.random((*lines, m)).argsort(-1).argsort(-1) < generator.integers(1, m)
        mask = np.moveaxis(mask.reshape(*lines[:-1], shape[dim]), -1, dim)
    elif pattern == "fan-in":
        rows, columns = encodings.matrix(tuple(shape))
        mask = generator.random((rows, columns)).argsort(1).argsort(1) < generator.integers(1, columns + 2)
        mask[1:] &= generator.random((rows, 1))[1:] < 0.7  # some rows ablated
        mask = mask.reshape(shape)
    else:
        mask = np.asarray(generator.random(shape) < pattern)
    kind = None if mask.size == 0 and kind in ("condensed", "packed_nm") else kind
    mask = torch.tensor(mask).reshape(shape)
    return masked(noise(tuple(shape), dtype, generator), mask), mask, kind


def masked(weight, mask):
    return torch.where(mask, weight.view(bits_type(weight)), 0).view(weight.dtype)


def bits_type(tensor):
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]


@settings(max_examples=400, deadline=None)
@given(EXAMPLES)
def test_round_trip_of_every_bit(tmp_path_factory, example):
    weight, mask, kind = build(**example)
    folder = tmp_path_factory.mktemp("trip")
    save({"w": weight, "plain": weight.clone()}, folder, masks={"w": mask}, encoding=kind)
    loaded, masks = load_state_dict(folder), load_masks(folder)
    assert same(loaded["w"], weight)
    assert same(loaded["plain"], weight)
    assert list(masks) == ["w"]
    assert same(masks["w"], mask)
    info = inspect(folder).weights[0]
    assert kind in (None, info.encoding)
    assert info.nnz == int(mask.sum())
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", list(encodings.KINDS))
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_encoding_with_every_dtype(tmp_path, kind, dtype):
    mask = fan_in(8, 16, 4) if kind != "packed_nm" else bools(*["1010011000111100"] * 8)
    weight = noise((8, 16), dtype, np.random.default_rng(0))
    weight = masked(weight, mask)
    save({"w": weight}, tmp_path, masks={"w": mask}, encoding={"w": kind})
    assert inspect(tmp_path).weights[0].encoding == kind
    assert same(load_state_dict(tmp_path)["w"], weight)
    assert same(load_masks(tmp_path)["w"], mask)


@pytest.mark.parametrize("density", [0.02, 0.07, 0.3])
@pytest.mark.parametrize("size", [bits.BLOCK - 1, bits.BLOCK, bits.BLOCK + 1, 3 * bits.BLOCK])
def test_gather_and_scatter_across_blocks(size, density):
    generator = np.random.default_rng(0)
    values, mask = generator.integers(1, 2**16, size, dtype=np.uint16), generator.random(size) < density
    kept = bits.gather(values, mask, int(mask.sum()))
    assert np.array_equal(kept, values[mask])
    assert bits.count(bits.pack(mask)) == len(kept)
    out = np.full_like(values, 7)
    bits.scatter(kept, bits.pack(mask), out)
    assert np.array_equal(out, values * mask)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (1, 8), (5, 8)])
@pytest.mark.parametrize("size", [8, bits.BLOCK - 8, bits.BLOCK + 8, 2 * bits.BLOCK])
def test_scatter_of_groups_looks_places_up(size, n, m, dtype):
    generator = np.random.default_rng(0)
    mask = (generator.random((size // m, m)).argsort(1) < n).reshape(-1)
    layout = Packed(n, m, 0)
    packed = layout.decode_bits(layout.encode(mask, (size,)), (size,), size // m * n)
    assert np.array_equal(packed, bits.pack(mask))
    assert layout.per_byte((size,)) == 8 // m * n
    values = generator.integers(1, 200, size).astype(dtype)
    out = np.full_like(values, 7)
    bits.scatter(values[mask], packed, out, layout.per_byte((size,)))
    assert np.array_equal(out, values * mask)


def test_bits_are_those_of_the_decoded_mask():
    """Groups along a dimension that is not the last, and groups that no byte holds whole."""
    for layout, shape in ((Packed(2, 4, 0), (8, 6)), (Packed(1, 3, 1), (5, 9)), (Packed(2, 4, 1), (3, 8, 2, 2))):
        groups = np.random.default_rng(0).random((math.prod(shape) // layout.m, layout.m)).argsort(1) < layout.n
        lines = [size for dim, size in enumerate(shape) if dim != layout.dim]
        mask = np.moveaxis(groups.reshape(*lines, shape[layout.dim]), -1, layout.dim).reshape(-1)
        parts, nnz = layout.encode(mask, shape), int(mask.sum())
        assert np.array_equal(layout.decode_bits(parts, shape, nnz), bits.pack(layout.decode(parts, shape, nnz)))
        assert np.array_equal(layout.decode(parts, shape, nnz), mask)
        assert layout.per_byte(shape) == 0


def test_kept_zeros_stay_in_the_mask_and_stored_values_are_row_major(tmp_path):
    weight, mask = torch.tensor([[0.0, 5.0, -0.0], [0.0, 0.0, 7.0]]), bools("011", "101")
    for kind in ("dense", "bitmask", "condensed", "csr"):
        save({"w": weight}, tmp_path, masks={"w": mask}, encoding=kind)
        assert torch.equal(load_masks(tmp_path)["w"], mask)
        assert same(load_state_dict(tmp_path)["w"], weight)


def test_hashes_do_not_depend_on_the_encoding(tmp_path):
    weight, mask = torch.arange(128.0).view(8, 16), fan_in(8, 16, 4)
    seen = set()
    for kind in ("dense", "bitmask", "condensed", "csr"):
        save({"w": weight * mask}, tmp_path, masks={"w": mask}, encoding=kind)
        seen.add((inspect(tmp_path).weights[0].values_hash, inspect(tmp_path).weights[0].mask_hash))
    assert len(seen) == 1


# ---- golden ----------------------------------------------------------------------------------------------------------


def golden():
    """A state and masks without random numbers: every encoding, dtypes, shapes of 0 to 5 dimensions, odd bits."""
    masks = {
        "bitmask": torch.arange(5 * 13).view(5, 13) % 7 % 3 == 1,
        "condensed": (torch.arange(40) - 3 * torch.arange(6)[:, None]) % 20 == 5,
        "csr": torch.arange(32 * 64).view(32, 2, 4, 2, 4) % 61 == 7,
        "packed": torch.arange(6 * 16).view(6, 16) % 4 // 2 == torch.arange(6)[:, None] % 2,
        "packed_conv": torch.isin(torch.arange(3 * 8 * 4).view(3, 8, 2, 2) // 4 % 8, torch.tensor([1, 2, 7])),
        "full": torch.ones(3, 5, dtype=torch.bool),
        "empty": torch.zeros(4, 9, dtype=torch.bool),
        "dense": torch.arange(20).view(4, 5) % 3 == 0,
        "line": torch.arange(17) % 5 == 0,
        "scalar": torch.tensor(True),
        "nothing": torch.zeros(3, 0, 2, dtype=torch.bool),
    }
    masks["condensed"][2] = False
    masks["condensed"][3] = torch.arange(40) < 2
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
    state = {}
    for i, (name, mask) in enumerate(masks.items()):
        dtype = dtypes[i % len(dtypes)]
        raw = torch.arange(mask.numel() * dtype.itemsize, dtype=torch.int64) * 37 + i
        state[name] = masked(raw.to(torch.uint8).view(dtype).reshape(mask.shape), mask)
    state["special"] = torch.tensor([0x80000000, 0x7FC12345, 0xFF800001, 1], dtype=torch.int64).to(torch.uint32)
    state["special"] = state["special"].view(torch.float32)  # -0.0, two NaN, the smallest denormal
    state |= {"steps": torch.tensor(7), "flags": torch.tensor([True, False]), "tied": state["bitmask"]}
    return state, masks


def write_golden(folder):
    state, masks = golden()
    save(
        state, folder, masks=masks, encoding={"dense": "dense"}, method="golden", recipe={"epochs": 1}, metadata=[None]
    )


def test_the_golden_checkpoint_loads_bit_for_bit():
    state, masks = golden()
    verify(GOLDEN)
    loaded, loaded_masks = load_state_dict(GOLDEN), load_masks(GOLDEN)
    assert loaded.keys() == state.keys()
    assert loaded_masks.keys() == masks.keys()
    assert all(same(loaded[name], state[name]) for name in state)
    assert all(same(loaded_masks[name], masks[name]) for name in masks)
    assert loaded["tied"] is loaded["bitmask"]
    found = inspect(GOLDEN)
    assert {weight.encoding for weight in found.weights} == set(encodings.KINDS)
    assert {len(weight.shape) for weight in found.weights} >= {0, 1, 2, 3, 4, 5}
    assert (found.method, found.recipe, found.metadata) == ("golden", {"epochs": 1}, [None])
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 20_000


def test_what_is_written_today_has_the_golden_hashes(tmp_path):
    write_golden(tmp_path)
    assert [weight for weight in inspect(tmp_path).weights] == list(inspect(GOLDEN).weights)
    ours, old = (json.loads((folder / "sparselearn.json").read_text()) for folder in (tmp_path, GOLDEN))
    assert ours.keys() == old.keys()
    assert ours["weights"] == old["weights"]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    write_golden(GOLDEN)
