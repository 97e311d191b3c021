"""Damaged and hostile checkpoints: one clear error each, in bounded memory; and a save that is killed harms nothing."""

import copy
import json
import os
import random
import tracemalloc

import pytest
import torch

from sparselearn import SparsityError
from sparselearn.checkpoint import inspect, load, load_state_dict, manifest, save, verify

safetensors = pytest.importorskip("safetensors.torch", reason="checkpoints need safetensors")


def example(value=1.0):
    """One weight of each encoding, and tensors without a mask."""
    generator = torch.Generator().manual_seed(0)
    fan_in = torch.rand(8, 12, generator=generator).argsort(1) < 3
    fan_in[2] = False
    masks = {
        "bitmask": torch.rand(5, 7, generator=generator) < 0.4,
        "condensed": fan_in,
        "csr": torch.rand(6, 40, generator=generator) < 0.05,
        "packed": (torch.rand(3, 8, generator=generator).view(6, 4).argsort(1) < 2).view(3, 8),
        "dense": torch.rand(3, 5, generator=generator) < 0.5,
    }
    state = {name: value * torch.randn(mask.shape, generator=generator) * mask for name, mask in masks.items()}
    state = {name: tensor.masked_fill(~masks[name], 0).bfloat16() for name, tensor in state.items()}
    state |= {"bias": torch.randn(7, generator=generator), "flags": torch.tensor([True, False])}
    return state, masks


def write(folder, value=1.0):
    state, masks = example(value)
    save(state, folder, masks=masks, encoding={"dense": "dense", "condensed": "condensed", "csr": "csr"})
    assert {weight.encoding for weight in inspect(folder).weights} == set(manifest.KINDS)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "checkpoint")


def parts(folder):
    return folder / manifest.FILE, next(folder.glob("*.safetensors"))


def edit(folder, change):
    """Change the manifest, and make its digest right again."""
    path, _ = parts(folder)
    content = json.loads(path.read_text())
    del content["digest"]
    change(content)
    path.write_bytes(manifest.seal(json.dumps(content, indent=1)))


def reseal(folder):
    """Make size, header hash and digest right for the shard as it is."""
    _, shard = parts(folder)
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    record = {"bytes": len(data), "header": manifest.hash_of(data[: 8 + length])}
    edit(folder, lambda content: content["shards"][0].update(record))


def rewrite(folder, change):
    """Change the shard's tensors, and make the manifest right for its size and header."""
    _, shard = parts(folder)
    tensors = safetensors.load_file(shard)
    change(tensors)
    safetensors.save_file(tensors, shard)
    reseal(folder)


def refused(folder, match):
    for read in (verify, load_state_dict):
        with pytest.raises(SparsityError, match=match):
            read(folder)


def entry(content, name):
    return next(weight for weight in content["weights"] if weight["name"] == name)


# ---- the table -------------------------------------------------------------------------------------------------------


def set_weight(which, /, **values):
    return lambda content: entry(content, which).update(values)


def set_shard(**values):
    return lambda content: content["shards"][0].update(values)


def set_top(**values):
    return lambda content: content.update(values)


MANIFESTS = {
    "another version": (set_top(format_version=2), "of format version 2; this library reads version 1"),
    "version as a bool": (set_top(format_version=True), "of format version True"),
    "another format": (set_top(format="zip"), 'must be a JSON object with "format": "sparselearn"'),
    "no weights": (lambda content: content.pop("weights"), '"weights" must be a list; it is a NoneType'),
    "weights are no objects": (set_top(weights=[3]), "a weight must be a dict; it is a int"),
    "name twice": (set_weight("csr", name="bitmask"), "names the weight `bitmask` twice"),
    "alias of another": (set_weight("csr", aliases=["bias"]), "names the weight `bias` twice"),
    "components clash": (set_weight("bias", name="csr#indices"), "names the tensor `csr#indices` twice"),
    "unknown dtype": (set_weight("csr", dtype="object"), "entry of `csr` is wrong: \"dtype\" is 'object'"),
    "unknown encoding": (set_weight("csr", encoding="pickle"), "`csr` is wrong: \"encoding\" is 'pickle'"),
    "other parameters": (set_weight("csr", parameters={"n": 2}), r"\"parameters\" of csr must be \[\]"),
    "parameter no int": (set_weight("condensed", parameters={"fan_in": 3.0}), '"fan_in" must be a int'),
    "fan-in 0": (set_weight("condensed", parameters={"fan_in": 0}), "are not 0 in each of some rows"),
    "2:32": (set_weight("packed", parameters={"n": 2, "m": 32, "dim": 1}), "2:32 is not a pattern"),
    "dim 7": (set_weight("packed", parameters={"n": 2, "m": 4, "dim": 7}), "along dimension 7"),
    "negative size": (set_weight("csr", shape=[-6, 40]), '"shape" must hold at most 64 sizes, whole and not negative'),
    "size no int": (set_weight("csr", shape=[6.0, 40]), '"shape" must hold'),
    "65 dimensions": (set_weight("csr", shape=[1] * 65), '"shape" must hold at most 64 sizes'),
    "huge": (set_weight("csr", shape=[1 << 31, 1 << 31]), "too large for any machine"),
    "huge and empty": (set_weight("csr", shape=[0, 1 << 62]), "too large for any machine"),
    "bomb": (set_weight("csr", shape=[6, 1 << 40]), "are more than 1024 for each"),
    "bomb of rows": (set_weight("csr", shape=[1 << 30, 40]), "`csr#pointers` must be torch.uint8 of shape"),
    "dense bomb": (set_weight("bias", shape=[1 << 40], nnz=1 << 40), r"`bias` must be torch.float32 of shape"),
    "bitmask bomb": (set_weight("bitmask", shape=[5, 1 << 40]), "`bitmask.*` must be torch.* of shape"),
    "another shape": (set_weight("bitmask", shape=[5, 70]), "`bitmask#bits` must be torch.uint8 of shape"),
    "another dtype": (set_weight("bitmask", dtype="float32"), "`bitmask#values` must be torch.float32"),
    "negative count": (set_weight("csr", nnz=-1), '"nnz" must be from 0 to below'),
    "too large a count": (set_weight("csr", nnz=241), '"nnz" must be from 0 to below 241; it is 241'),
    "shard that is not": (set_weight("csr", shard=1), '"shard" must be from 0 to below 1'),
    "no mask but encoded": (set_weight("csr", masked=False, mask_hash=None), 'without a mask it must be "dense"'),
    "mask without hash": (set_weight("csr", mask_hash=None), '"mask_hash" must be a str'),
    "no hash": (set_weight("csr", values_hash="00"), '"values_hash" must be 64 hexadecimal digits'),
    "other values": (set_weight("csr", values_hash="0" * 64), "`csr` of .* is damaged: its values are not those"),
    "other mask": (set_weight("csr", mask_hash="0" * 64), "`csr` of .* is damaged: its mask is not the one"),
    "weight without tensors": (set_weight("bias", name="head"), "'bias' is only in it or only in the manifest"),
    "parent folder": (set_shard(file="../weights-00000-0123456789abcdef.safetensors"), "must be named like"),
    "absolute path": (set_shard(file="/etc/passwd"), "must be named like"),
    "other separator": (set_shard(file="..\\weights-00000-0123456789abcdef.safetensors"), "must be named like"),
    "NUL in the name": (set_shard(file="weights-00000-0123456789abcdef.safetensors\0"), "must be named like"),
    "newline in the name": (set_shard(file="weights-00000-0123456789abcdef.safetensors\n"), "must be named like"),
    "shard that is missing": (set_shard(file="weights-00000-0123456789abcdef.safetensors"), "there is no such file"),
    "shard twice": (lambda content: content["shards"].append(content["shards"][0]), "names the file .* twice"),
    "larger shard": (set_shard(bytes=1 << 40), "it must have 1099511627776 bytes; it has"),
    "another header": (set_shard(header="0" * 64), "its header is not the one that was written"),
}


@pytest.mark.parametrize("fault", MANIFESTS)
def test_manifest(folder, fault):
    change, match = MANIFESTS[fault]
    edit(folder, change)
    tracemalloc.start()
    refused(folder, match)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_masked_entries_must_tell_the_truth(folder):
    edit(folder, set_weight("bitmask", masked=False, mask_hash=None, encoding="dense", nnz=35))
    refused(folder, "only in it or only in the manifest")


TEXTS = {
    "empty": (b"", "it is no JSON"),
    "no JSON": (b"{", "it is no JSON"),
    "no text": (b"\xff\xfe\x00", "it is no JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "a deep list": (b"[" * 200_000, "it is no JSON"),
    "a long number": (b'{"format": ' + b"1" * 10_000 + b"}", "it is no JSON"),
    "NaN": (b'{"format": NaN}', "it holds NaN, which is not JSON"),
    "a key twice": (b'{"format": "sparselearn", "format": "sparselearn"}', "names the key `format` twice"),
    "no digest": (b'{"format": "sparselearn", "format_version": 1}', "it was changed after it was written"),
}


@pytest.mark.parametrize("fault", TEXTS)
def test_text_of_the_manifest(folder, fault):
    content, match = TEXTS[fault]
    parts(folder)[0].write_bytes(content)
    refused(folder, match)


def test_a_manifest_of_absurd_size_is_not_read(folder):
    with parts(folder)[0].open("r+b") as file:
        file.truncate(1 << 40)  # a sparse file: it takes no disk
    refused(folder, "more than 268435456 are not read")


def test_unknown_keys_are_ignored(folder):
    edit(folder, lambda content: (content.update(later=1), content["weights"][0].update(later=2)))
    verify(folder)


def replace_part(key, **positions):
    """Set entries of one component: position -> value."""

    def change(tensors):
        flat = tensors[key].view(-1)
        for position, value in positions.items():
            flat[int(position[1:])] = value

    return change


def one_more_bit(tensors):
    bits = tensors["bitmask#bits"]
    bits[0] = int(bits[0]) ^ (int(bits[0]) + 1 & ~int(bits[0]))


SHARDS = {
    "popcount": (one_more_bit, "its mask must have .* active weights; it has"),
    "trailing bits": (replace_part("bitmask#bits", _4=0xFF), "the bits that fill up its `bits` must be 0"),
    "column out of range": (replace_part("csr#indices", _0=40), "its `indices` must be below 40; one is 40"),
    "columns descend": (replace_part("condensed#indices", _0=11, _1=0), "its `indices` must ascend in every row"),
    "column twice": (replace_part("condensed#indices", _0=5, _1=5), "its `indices` must ascend in every row"),
    "another number of rows": (replace_part("condensed#rows", _0=1), "must name 7 active rows; they name 1"),
    "other rows": (replace_part("condensed#rows", _0=0b11111110), "its mask is not the one that was saved"),
    "pointers descend": (replace_part("csr#pointers", _1=255), "its `pointers` must ascend from 0"),
    "pointers start late": (replace_part("csr#pointers", _0=1), "its `pointers` must ascend from 0"),
    "pointers end early": (replace_part("csr#pointers", _6=1), "its `pointers` must ascend from 0"),
    "pattern that is none": (replace_part("packed#patterns", _0=0xFF), "its `patterns` must be below 6; some are not"),
    "bits after the patterns": (replace_part("packed#patterns", _2=0x80), "fill up its `patterns` must be 0"),
    "bool of 2": (lambda t: t["flags"].view(torch.uint8).fill_(2), "its bools must be 0 or 1"),
    "another value": (replace_part("bias", _0=9.0), "`bias` of .* is damaged: its values are not those"),
    "NaN for NaN": (replace_part("condensed#values", _3=float("nan")), "its values are not those"),
    "hidden weights": (lambda t: t["dense"].fill_(1), "weights outside of its mask that are not \\+0"),
    "a tensor more": (lambda t: t.update(more=torch.ones(1)), "'more' is only in it or only in the manifest"),
    "a tensor less": (lambda t: t.pop("bias"), "'bias' is only in it or only in the manifest"),
    "fewer values": (lambda t: t.update({"csr#values": t["csr#values"][1:].clone()}), "`csr#values` must be torch.bf"),
    "other indices": (
        lambda t: t.update({"csr#indices": t["csr#indices"].long()}),
        "`csr#indices` must be torch.uint8",
    ),
}


@pytest.mark.parametrize("fault", SHARDS)
def test_shard(folder, fault):
    change, match = SHARDS[fault]
    rewrite(folder, change)
    refused(folder, match)


def header_of(shard):
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def swap_header(folder, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    parts(folder)[1].write_bytes(len(text).to_bytes(8, "little") + text + data)
    reseal(folder)


def test_offsets_that_overlap_or_leave_the_file(folder):
    header, data = header_of(parts(folder)[1])
    for key, offsets in (
        ("bias", header["flags"]["data_offsets"]),
        ("bias", [1, 29]),
        ("bias", [-28, 0]),
        ("bias", [28, 0]),
        ("flags", [len(data), len(data) + 2]),
        ("flags", [0, 1 << 63]),
        ("flags", [0, 1 << 70]),
        ("flags", []),
    ):
        changed = copy.deepcopy(header)
        assert changed[key]["data_offsets"] != offsets
        changed[key]["data_offsets"] = offsets
        swap_header(folder, changed, data)
        refused(folder, "is damaged")
    changed = copy.deepcopy(header)
    changed["flags"]["shape"] = [1 << 40, 1 << 40]
    swap_header(folder, changed, data)
    refused(folder, "is damaged")


def test_headers_that_are_none(folder):
    header, data = header_of(parts(folder)[1])
    text = json.dumps(header)
    twice = text[:-1] + ', "bias": ' + json.dumps(header["flags"]) + "}"
    for bad in (b"", b"{", b"[]", b"\xff" * 40, b"[" * 100_000, twice.encode()):
        swap_header(folder, bad, data)
        refused(folder, "is damaged")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1, 1 << 40])
def test_truncated_and_extended_shards(folder, size):
    shard = parts(folder)[1]
    with shard.open("r+b") as file:
        file.truncate(size if size >= 0 else shard.stat().st_size - 1)
    refused(folder, "is damaged: it must have")


def test_a_header_length_beyond_the_file(folder):
    shard = parts(folder)[1]
    data = shard.read_bytes()
    shard.write_bytes((1 << 40).to_bytes(8, "little") + data[8:])
    refused(folder, "claims a header of 1099511627776 bytes")


def test_what_is_no_checkpoint(tmp_path, folder):
    refused(tmp_path / "none", "must be a folder that `save` wrote")
    refused(tmp_path, "there is no such file")
    refused(parts(folder)[0], "there is no such file")
    parts(folder)[1].unlink()
    refused(folder, "is damaged: there is no such file")


def test_a_shard_that_is_no_file_is_not_opened(folder):
    shard = parts(folder)[1]
    shard.unlink()
    os.mkfifo(shard)  # opening it would wait for ever
    refused(folder, "is damaged: there is no such file")


# ---- every byte ------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_found(folder):
    """Each byte of each file is changed, to another random value."""
    generator = random.Random(0)
    for path in parts(folder):
        whole = path.read_bytes()
        for i in range(len(whole)):
            data = bytearray(whole)
            data[i] ^= generator.randrange(1, 256)
            path.write_bytes(data)
            for read in (verify, load_state_dict):
                with pytest.raises(SparsityError):
                    read(folder)
        path.write_bytes(whole)
    verify(folder)


def test_a_damaged_checkpoint_does_not_touch_the_model(folder):
    state, _ = example()
    model = torch.nn.Module()
    for name, tensor in state.items():
        model.register_buffer(name, torch.zeros_like(tensor))
    path = parts(folder)[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SparsityError, match="is damaged"):
        load(folder, model)
    assert not any(bool(tensor.any()) for tensor in model.state_dict().values())
