"""Thousands of damaged checkpoints raise `SparsityError` or hold what was saved, and nothing else happens."""

import copy
import os
import random
import subprocess
import sys

import pytest
import torch
from test_checkpoint_faults import edit, example, header_of, parts, reseal, swap_header, write

from sparselearn import SparsityError
from sparselearn.checkpoint import load_state_dict, verify


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "checkpoint")


ODD = [
    None, True, -1, 0, 1, 2, 7, 255, 1 << 31, 1 << 63, 1 << 200, 0.5, 1e308, "", "x", "../x", "\0", "csr", "dense",
    "float32", [], [[]], [1], [1 << 62], {}, {"n": 1}, "0" * 64,
]  # fmt: skip


def leaves(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def mutate_json(generator, content):
    """Another value, none at all, or that of another place, at one place."""
    path = generator.choice([path for path in leaves(content) if path])
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    action = generator.randrange(4)
    if action == 0:
        del parent[path[-1]]
    elif action == 1 and type(parent[path[-1]]) is int:
        parent[path[-1]] += generator.choice([-1, 1, 8, 1 << 40])
    elif action == 2:
        other = content
        for key in generator.choice(list(leaves(content))):
            other = other[key]
        parent[path[-1]] = copy.deepcopy(other)
    else:
        parent[path[-1]] = generator.choice(ODD)


def mutate_bytes(generator, data):
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 8])):
        at = generator.randrange(len(data)) if data else 0
        action = generator.randrange(6)
        if action == 0:
            del data[at : at + generator.choice([1, 2, 64, 100_000])]
        elif action == 1:
            data[at:at] = generator.randbytes(generator.choice([1, 2, 64]))
        elif action == 2:
            data[at:at] = data[: generator.randrange(64)]
        elif action == 3 and data:
            data[at] = generator.choice(b'\0\xff"{}[]:,0129- \\')
        elif data:
            data[at] ^= 1 << generator.randrange(8)
    return bytes(data)


def fuzz(folder, rounds, seed):
    """Change the files in all ways; returns how often they could be read all the same."""
    generator = random.Random(seed)
    state, _ = example()
    kept = {path.name: path.read_bytes() for path in parts(folder)}
    text, shard = parts(folder)
    read = 0
    for _ in range(rounds):
        kind = generator.randrange(4)
        whole = True  # whether what is read must be what was saved
        if kind == 0:
            path = generator.choice([text, shard])
            path.write_bytes(mutate_bytes(generator, path.read_bytes()))
        elif kind == 1:
            edit(folder, lambda content: mutate_json(generator, content))
            whole = False  # another shape with the same entries, another name: a valid checkpoint, but not this one
        elif kind == 2:
            data = mutate_bytes(generator, shard.read_bytes())
            shard.write_bytes(data)
            reseal(folder)
        else:
            header, data = header_of(shard)
            mutate_json(generator, header)
            swap_header(folder, header, data)
        try:
            loaded = load_state_dict(folder)
        except SparsityError:
            with pytest.raises(SparsityError):
                verify(folder)
        else:
            read += 1
            assert not whole or all(torch.equal(loaded[name], state[name]) for name in state)
        for path in (text, shard):
            path.write_bytes(kept[path.name])
    return read


def test_fuzzed_files_raise_nothing_else(folder):
    assert fuzz(folder, 300, seed=0) < 100


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_fuzzed_files_raise_nothing_else(folder):
    assert fuzz(folder, 10_000, seed=1) < 3300


LIMITED = """
import pathlib, resource, sys, tracemalloc
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_checkpoint_faults as faults, test_checkpoint_fuzz as t
from sparselearn.checkpoint import load_state_dict

folder = faults.write(pathlib.Path(sys.argv[2]))
load_state_dict(folder)  # threads and their memory are there from now on
taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 256 * 2**20, resource.RLIM_INFINITY))
try:
    bytearray(2**29)
except MemoryError:
    pass
else:
    raise SystemExit("the limit does nothing")
for name, (change, match) in faults.MANIFESTS.items():
    if name in ("shard twice", "larger shard") or "bomb" in name or "huge" in name:
        kept = [(path, path.read_bytes()) for path in faults.parts(folder)]
        faults.edit(folder, change)
        faults.refused(folder, match)
        for path, data in kept:
            path.write_bytes(data)
tracemalloc.start()
t.fuzz(folder, 300, seed=2)
assert tracemalloc.get_traced_memory()[1] < 16_000_000, tracemalloc.get_traced_memory()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the limit is set from /proc")
def test_claims_of_any_size_take_no_memory(tmp_path):
    """Under a limit of 256 MiB of address space beyond what the process has."""
    command = [sys.executable, "-c", LIMITED, os.path.dirname(__file__), str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
