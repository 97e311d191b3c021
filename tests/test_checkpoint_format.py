"""A second reader, written from the docstring of `sparselearn.checkpoint` alone, in Python and numpy."""

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sparselearn import checkpoint
from sparselearn.checkpoint import load_masks, load_state_dict, save

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

GOLDEN = Path(__file__).parent / "golden" / "checkpoint_v1"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "BOOL": 1}
SIZES |= {"U8": 1, "U16": 2, "U32": 4}


def hash_of(data):
    return hashlib.sha256(data).hexdigest()


def shard_tensors(path, record):
    """Name -> unsigned integers of the tensor's shape."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert len(data) == record["bytes"]
    assert hash_of(data[:start]) == record["header"]
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            array = np.frombuffer(data[start + first : start + last], f"<u{SIZES[entry['dtype']]}")
            tensors[name] = array.reshape(entry["shape"])
    return tensors


def bits(array, n):
    found = [bool(array[b // 8] >> b % 8 & 1) for b in range(8 * len(array))]
    assert not any(found[n:])
    return found[:n]


def packed(parts, shape, n, m, dim):
    width = math.ceil(math.log2(math.comb(m, n)))
    patterns = sorted(sum(1 << i for i in kept) for kept in itertools.combinations(range(m), n))
    moved = [size for d, size in enumerate(shape) if d != dim] + [shape[dim]]
    groups = math.prod(shape) // m
    stream = bits(parts["patterns"], groups * width)
    mask = []
    for g in range(groups):
        number = sum(stream[g * width + i] << i for i in range(width))
        mask += [bool(patterns[number] >> i & 1) for i in range(m)]
    return np.moveaxis(np.array(mask).reshape(moved), -1, dim)


def mask_of(entry, parts):
    shape, size = entry["shape"], math.prod(entry["shape"])
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, size)
    if entry["encoding"] in ("dense", "bitmask"):
        return np.array(bits(parts["bits"], size) if "bits" in parts else [True] * size, bool).reshape(shape)
    if entry["encoding"] == "packed_nm":
        return packed(parts, shape, **entry["parameters"])
    mask = np.zeros((rows, columns), bool)
    if entry["encoding"] == "condensed":
        active = np.flatnonzero(bits(parts["rows"], rows))
        for row, indices in zip(active, parts["indices"], strict=True):
            mask[row, indices] = True
    else:
        for row, (first, last) in enumerate(itertools.pairwise(parts["pointers"].tolist())):
            mask[row, parts["indices"][first:last]] = True
    return mask.reshape(shape)


def read(folder):
    """The bits of every tensor, and every mask, by name."""
    text = (folder / "sparselearn.json").read_bytes()
    manifest = json.loads(text)
    assert (manifest["format"], manifest["format_version"]) == ("sparselearn", 1)
    line = f',\n "digest": "{manifest["digest"]}"\n}}\n'.encode()
    assert text.endswith(line)
    assert hash_of(text.removesuffix(line)) == manifest["digest"]
    shards = [shard_tensors(folder / record["file"], record) for record in manifest["shards"]]
    state, masks = {}, {}
    for entry in manifest["weights"]:
        name, stored = entry["name"], shards[entry["shard"]]
        if not entry["masked"]:
            assert hash_of(stored[name].tobytes()) == entry["values_hash"]
            state[name] = stored[name]
        else:
            parts = {key.rpartition("#")[2]: array for key, array in stored.items() if key.startswith(f"{name}#")}
            mask = masks[name] = mask_of(entry, parts)
            assert int(mask.sum()) == entry["nnz"]
            assert hash_of(np.packbits(mask, bitorder="little").tobytes()) == entry["mask_hash"]
            values = stored[name][mask] if entry["encoding"] == "dense" else parts["values"].reshape(-1)
            assert hash_of(values.tobytes()) == entry["values_hash"]
            state[name] = np.zeros(mask.shape, values.dtype)
            state[name][mask] = values
        state |= dict.fromkeys(entry["aliases"], state[name])
    return state, masks


def check(folder):
    state, masks = read(folder)
    loaded, loaded_masks = load_state_dict(folder), load_masks(folder)
    assert state.keys() == loaded.keys()
    assert masks.keys() == loaded_masks.keys()
    for name, tensor in loaded.items():
        assert state[name].shape == tensor.shape
        assert state[name].tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert all(np.array_equal(mask, loaded_masks[name].numpy()) for name, mask in masks.items())


def test_the_golden_checkpoint_is_read_from_its_description():
    check(GOLDEN)


def test_larger_weights_are_read_from_their_description(tmp_path):
    """Wider indices, several shards, n:m with numbers of up to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    masks = {
        "wide": torch.rand(3, 70_000, generator=generator) < 0.02,
        "rows": torch.rand(300, 500, generator=generator).argsort(1) < 5,
        "4:8": (torch.rand(64, 4, 8, generator=generator).argsort(-1) < 4).view(64, 32),
        "5:10": (torch.rand(3, 4, 10, generator=generator).argsort(-1) < 5).movedim(-1, 0).reshape(10, 12),
    }
    state = {name: torch.randn(mask.shape, generator=generator).masked_fill_(~mask, 0) for name, mask in masks.items()}
    save(state, tmp_path, masks=masks, max_shard_bytes=20_000)
    found = {weight.name: weight.encoding for weight in checkpoint.inspect(tmp_path).weights}
    assert found == {"wide": "csr", "rows": "condensed", "4:8": "packed_nm", "5:10": "packed_nm"}
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check(tmp_path)


def test_the_description_is_short():
    assert len(checkpoint.__doc__.splitlines()) <= 60
