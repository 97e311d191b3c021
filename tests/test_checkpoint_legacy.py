"""The legacy bitmask layouts: bytes against a loop that packs bit by bit, round trips, refusals."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselearn import SparsityError
from sparselearn.checkpoint.legacy import read_legacy, write_legacy

safetensors = pytest.importorskip("safetensors.torch", reason="checkpoints need safetensors")

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


# ---- bytes by hand: a second writer that knows nothing of ours -------------------------------------------------------


def packed(rows):
    """Bit by bit, column c into bit c % 8 of byte c // 8."""
    out = []
    for row in rows:
        line = [0] * -(-len(row) // 8)
        for column, kept in enumerate(row):
            line[column // 8] |= int(kept) << (column % 8)
        out.append(line)
    return out


def raw_file(path, entries, metadata=True):
    """A safetensors file written with struct: {name: (dtype, shape, bytes)}."""
    header, at = {"__metadata__": {"format": "pt"}} if metadata else {}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in entries.values()))


def bitmask_entries():
    """The sheet's example: 2 x 10, nonzeros (0: 0, 3, 9), (1: 1) -> bitmask [[9, 2], [2, 0]], row_offsets [0, 3]."""
    return {
        "m.shape": ("I64", [2], struct.pack("<2q", 2, 10)),
        "m.bitmask": ("U8", [2, 2], bytes([9, 2, 2, 0])),
        "m.compressed": ("F32", [4], struct.pack("<4f", 1.5, -2.0, 0.25, 7.0)),
        "m.row_offsets": ("I64", [2], struct.pack("<2q", 0, 3)),
        "m.bias": ("F32", [2], struct.pack("<2f", 0.5, -0.5)),
    }


WEIGHT = torch.zeros(2, 10)
WEIGHT[0, 0], WEIGHT[0, 3], WEIGHT[0, 9], WEIGHT[1, 1] = 1.5, -2.0, 0.25, 7.0


def entries_24():
    """2 x 8: row 0 keeps columns 0, 3 | 5, 6; row 1 keeps 1, 2 | 4, 7."""
    return {
        "m.shape": ("I64", [2, 1], struct.pack("<2q", 2, 8)),
        "m.bitmask": ("U8", [2, 1], bytes([1 + 8 + 32 + 64, 2 + 4 + 16 + 128])),
        "m.compressed": ("F16", [2, 4], np.array([1, 2, 3, 4, 5, 6, 7, 8], "<f2").tobytes()),
    }


WEIGHT_24 = torch.tensor([[1, 0, 0, 2, 0, 3, 4, 0], [0, 5, 6, 0, 7, 0, 0, 8]], dtype=torch.float16)


def tensors_of(path):
    """All (dtype, shape, bytes) of a file, read with struct."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    body = data[8 + length :]
    return metadata, {
        name: (e["dtype"], e["shape"], body[e["data_offsets"][0] : e["data_offsets"][1]]) for name, e in header.items()
    }


def test_the_bitmask_layout_byte_by_byte(tmp_path):
    state = {"m.weight": WEIGHT, "m.bias": torch.tensor([0.5, -0.5])}
    write_legacy(state, {"m.weight": WEIGHT != 0}, tmp_path / "out")
    metadata, written = tensors_of(tmp_path / "out" / "model.safetensors")
    assert metadata == {"format": "pt"}
    assert written == bitmask_entries()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "version": "0.14.0.1",
            "sparsity_config": {
                "format": "sparse-bitmask",
                "targets": ["m"],
                "ignore": [],
                "global_sparsity": 16 / 22,
                "sparsity_structure": "unstructured",
            },
            "transform_config": {},
        }
    }


def test_the_24_layout_byte_by_byte(tmp_path):
    write_legacy({"m.weight": WEIGHT_24}, {"m.weight": WEIGHT_24 != 0}, tmp_path / "out", "sparse-24-bitmask")
    assert tensors_of(tmp_path / "out" / "model.safetensors")[1] == entries_24()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert (config["format"], config["sparsity_structure"]) == ("sparse-24-bitmask", "2:4")


@pytest.mark.parametrize(("entries", "weight"), [(bitmask_entries(), WEIGHT), (entries_24(), WEIGHT_24)])
def test_reading_bytes_made_by_hand(tmp_path, entries, weight):
    raw_file(tmp_path / "old.safetensors", entries)
    state, masks = read_legacy(tmp_path / "old.safetensors")
    assert same(state["m.weight"], weight)
    assert torch.equal(masks["m.weight"], weight != 0)
    assert set(state) == {"m.weight"} | ({"m.bias"} & set(entries))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 11), min_size=1, max_size=4),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
def test_any_mask_round_trips_and_agrees_with_the_loop(tmp_path_factory, shape, dtype, seed):
    folder = tmp_path_factory.mktemp("legacy") / "out"
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.4
    raw = torch.randint(0, 256, (*shape, DTYPES[dtype].itemsize), generator=generator, dtype=torch.uint8)
    raw[torch.rand(shape, generator=generator) < 0.3] = 0  # kept zeros among random bits: NaNs, -0.0, subnormals
    weight = raw.masked_fill(~mask.unsqueeze(-1), 0).view(DTYPES[dtype]).view(shape)
    write_legacy({"a.b.weight": weight}, {"a.b.weight": mask}, folder)
    state, masks = read_legacy(folder)
    assert same(state["a.b.weight"], weight)
    assert torch.equal(masks["a.b.weight"], mask)

    _, written = tensors_of(folder / "model.safetensors")
    rows = mask.reshape(int(np.prod(shape[:-1])), shape[-1]).tolist()
    offsets = [sum(map(sum, rows[:r])) for r in range(len(rows))]
    assert written["a.b.bitmask"] == ("U8", [*shape[:-1], -(-shape[-1] // 8)], b"".join(map(bytes, packed(rows))))
    assert written["a.b.row_offsets"] == ("I64", [len(rows)], struct.pack(f"<{len(rows)}q", *offsets))
    assert written["a.b.shape"] == ("I64", [len(shape)], struct.pack(f"<{len(shape)}q", *shape))
    assert written["a.b.compressed"] == (dtype, [int(mask.sum())], bytes(raw[mask].flatten().tolist()))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_24_round_trips_with_kept_zeros_and_minus_zero(tmp_path, dtype):
    mask = torch.rand(6, 5, 4).argsort(-1).lt(2).view(6, 20)
    weight = torch.randn(6, 20).masked_fill(~mask, 0).to(dtype)
    first = mask[0].nonzero().view(-1)
    weight[0, first[0]], weight[0, first[1]] = 0.0, -0.0
    write_legacy({"x.weight": weight}, {"x.weight": mask}, tmp_path / "out", "sparse-24-bitmask")
    state, masks = read_legacy(tmp_path / "out")
    assert same(state["x.weight"], weight)
    assert torch.equal(masks["x.weight"], mask)


def test_shards_and_the_old_config_key(tmp_path):
    entries = bitmask_entries()
    bias = {"m.bias": entries.pop("m.bias")}
    raw_file(tmp_path / "model-1.safetensors", entries)
    raw_file(tmp_path / "model-2.safetensors", bias)
    where = dict.fromkeys(entries, "model-1.safetensors") | {"m.bias": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text(
        json.dumps({"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}})
    )
    state, _ = read_legacy(tmp_path)
    assert same(state["m.weight"], WEIGHT)
    assert same(state["m.bias"], torch.tensor([0.5, -0.5]))


def test_row_offsets_of_convolutions_may_be_those_of_the_old_encoder(tmp_path):
    weight = torch.arange(24.0).view(2, 3, 2, 2) % 3
    mask = weight != 0
    counts = mask.sum(dim=-1)  # what 0.14.0.1 wrote: running sums over dimension 0 only
    safetensors.save_file(
        {
            "c.shape": torch.tensor(weight.shape),
            "c.compressed": weight[mask],
            "c.bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
            "c.row_offsets": torch.cumsum(counts, 0) - counts,
        },
        tmp_path / "old.safetensors",
    )
    state, masks = read_legacy(tmp_path / "old.safetensors")
    assert same(state["c.weight"], weight)
    assert torch.equal(masks["c.weight"], mask)


def test_the_base_folder_gives_the_config(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "bert", "quantization_config": {"quant_method": "gptq"}}')
    (base / "vocab.txt").write_text("a\n")
    write_legacy({"m.weight": WEIGHT}, {"m.weight": WEIGHT != 0}, tmp_path / "out", base=base)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (tmp_path / "out" / "vocab.txt").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(match, function, *args, **kwargs):
    with pytest.raises(SparsityError, match=match):
        function(*args, **kwargs)


@pytest.mark.parametrize(
    ("weight", "mask", "match"),
    [
        ([[1.0, 2, 3, 0]], None, r"1 of 1 groups do not: row 0, columns 0 to 3 keep 3\. Use sparse-bitmask"),
        ([[1.0, 2, 0, 0, 0, 0, 0, 1]], None, "1 of 2 groups do not: row 0, columns 4 to 7 keep 1"),
        ([[1.0, 2, 0, 0], [0, 0, 0, 0]], None, "row 1, columns 0 to 3 keep 0"),
        ([[1.0, 2]], None, "must be 2-D with a fan-in that is a multiple of 4"),
        ([[[1.0, 2, 0, 0]]], None, r"its shape is \[1, 1, 4\]"),
    ],
)
def test_what_is_not_24_is_refused_and_nothing_is_written(tmp_path, weight, mask, match):
    weight = torch.tensor(weight)
    refused(match, write_legacy, {"m.weight": weight}, {"m.weight": weight != 0}, tmp_path / "o", "sparse-24-bitmask")
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_would_lose_something_are_refused(tmp_path):
    out, one = tmp_path / "out", torch.ones(2, 8)
    none = torch.zeros(2, 8, dtype=torch.bool)
    refused("16 nonzero weights outside its mask", write_legacy, {"m.weight": one}, {"m.weight": none}, out)
    refused("must be bool", write_legacy, {"m.weight": one}, {"m.weight": one}, out)
    refused("of the weight's shape", write_legacy, {"m.weight": one}, {"m.weight": none[:1]}, out)
    refused("`<module>.weight` only", write_legacy, {"m.w": one}, {"m.w": ~none}, out)
    refused("Closest: `m.weight`", write_legacy, {"m.weight": one}, {"m.weigth": ~none}, out)
    refused("`masks` is empty", write_legacy, {"m.weight": one}, {}, out)
    clash = {"m.weight": one, "k.bitmask": one}
    refused("`k.bitmask` cannot be stored", write_legacy, clash, {"m.weight": ~none}, out)
    refused("`format` must be one of", write_legacy, {"m.weight": one}, {"m.weight": ~none}, out, "marlin-24")
    assert not out.exists()
    nan = torch.zeros(2, 8).index_fill(1, torch.tensor([3]), torch.nan)
    refused("2 nonzero weights", write_legacy, {"m.weight": nan}, {"m.weight": none}, out)
    out.mkdir()
    (out / "x").touch()
    refused("must be a new or an empty folder", write_legacy, {"m.weight": one}, {"m.weight": ~none}, out)


def changed(entries, name, dtype=None, shape=None, data=None):
    old = entries[name]
    return entries | {name: (dtype or old[0], old[1] if shape is None else shape, old[2] if data is None else data)}


A, B = bitmask_entries(), entries_24()
FAULTS = {
    "popcount": (changed(A, "m.bitmask", data=bytes([11, 2, 2, 0])), r"must have shape \[5\], since 5 bits"),
    "padding bit": (changed(A, "m.bitmask", data=bytes([9, 6, 2, 0])), "zeros after its 10 columns"),
    "row offset": (changed(A, "m.row_offsets", data=struct.pack("<2q", 0, 2)), "3 before row 1; it says 2"),
    "row offset dtype": (changed(A, "m.row_offsets", dtype="U64"), "must be 2 int64 numbers"),
    "offsets missing": (
        {n: e for n, e in A.items() if n != "m.row_offsets"},
        "must be 2-D with a fan-in that is a multiple of 4",
    ),
    "values missing": ({n: e for n, e in A.items() if n != "m.compressed"}, "`compressed` is missing"),
    "shape missing": ({n: e for n, e in A.items() if n != "m.shape"}, "`shape` is missing"),
    "bitmask missing": ({n: e for n, e in A.items() if n != "m.bitmask"}, r"has 0 tensors named `\*\.bitmask`"),
    "stray part": (A | {"k.compressed": A["m.compressed"]}, "`k.compressed` without the `bitmask`"),
    "negative": (changed(A, "m.shape", data=struct.pack("<2q", -2, 10)), "must be uint8 of shape"),
    "huge": (changed(A, "m.shape", data=struct.pack("<2q", 2, 2**62)), "must be uint8 of shape"),
    "float shape": (changed(A, "m.shape", dtype="F64"), "must be uint8 of shape None"),
    "bitmask dtype": (changed(A, "m.bitmask", dtype="I8"), "it is torch.int8"),
    "bitmask shape": (changed(A, "m.bitmask", shape=[4, 1]), r"of shape \[4, 1\]"),
    "dense too": (A | {"m.weight": ("F32", [1], b"1234")}, "`m.weight` twice"),
    "nothing sparse": ({"m.bias": A["m.bias"]}, r"has 0 tensors named `\*\.bitmask`"),
    "marlin": ({"m.scale_packed": A["m.bias"], "m.meta": A["m.bias"]}, "marlin-24 layout"),
    "24: three kept": (
        changed(changed(B, "m.bitmask", data=bytes([0x6B, 0x96])), "m.compressed", shape=[9], data=b"\0" * 18),
        "1 of 4 groups do not: row 0, columns 0 to 3 keep 3",
    ),
    "24: flat values": (changed(B, "m.compressed", shape=[8]), r"must have shape \[2, 4\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_file_is_one_error(tmp_path, fault):
    entries, match = FAULTS[fault]
    raw_file(tmp_path / "old.safetensors", entries)
    refused(match, read_legacy, tmp_path / "old.safetensors")


def test_a_config_that_contradicts_the_file(tmp_path):
    raw_file(tmp_path / "model.safetensors", A)
    for declared, match in [("sparse-24-bitmask", "one of the two is wrong"), ("dense", "names the format 'dense'")]:
        config = {"quantization_config": {"sparsity_config": {"format": declared}}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        refused(match, read_legacy, tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"format": "marlin-24"}}')
    refused("marlin-24 layout", read_legacy, tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("must be a JSON file", read_legacy, tmp_path)


def test_shard_names_stay_inside_the_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    raw_file(tmp_path / "x.safetensors", A)
    raw_file(folder / "y.safetensors", A)
    index = folder / "model.safetensors.index.json"
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors"), "..", ""):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(A, name)}))
        refused("must name files of its own folder|cannot be read", read_legacy, folder)
    index.write_text(json.dumps({"weight_map": {"m.bitmask": "y.safetensors"}}))
    refused("which the index does not place there", read_legacy, folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*A, "lost"], "y.safetensors")}))
    refused("names `lost`", read_legacy, folder)
    index.write_text("[]")
    refused("must have a `weight_map`", read_legacy, folder)


def test_missing_truncated_and_fuzzed_files_give_no_other_error(tmp_path):
    refused("cannot be read", read_legacy, tmp_path / "nowhere.safetensors")
    refused("cannot be read", read_legacy, tmp_path)
    good = tmp_path / "good.safetensors"
    raw_file(good, A)
    data, random = good.read_bytes(), np.random.default_rng(0)
    bad = tmp_path / "bad.safetensors"
    outcomes = set()
    for trial in range(600):
        content = bytearray(data)
        if trial % 3 == 0:
            content = content[: random.integers(len(content))]
        else:
            for _ in range(trial % 3):
                content[random.integers(len(content))] = random.integers(256)
        bad.write_bytes(content)
        try:
            read_legacy(bad)
            outcomes.add("read")
        except SparsityError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}  # the layout has no checksum: a changed value is not seen
