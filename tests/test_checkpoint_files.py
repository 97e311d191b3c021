"""Saving and loading whole models: sparsifiers, tied weights, shards, wrappers, processes, and what is refused."""

import builtins
import copy
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tracemalloc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sparselearn import SparseOptimizer, Sparsifier, SparsityError, rigl, static
from sparselearn.checkpoint import inspect, iterate, load, load_masks, load_state_dict, save, verify
from sparselearn.methods import sr_ste
from sparselearn.modules import CondensedLinear, CsrLinear
from sparselearn.structures import NM, ConstantFanIn

pytest.importorskip("safetensors", reason="checkpoints need safetensors")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 4))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(method=None, steps=5, **options):
    model = network()
    sparsifier = Sparsifier(model, method or rigl(stop=100, every=2), **{"sparsity": 0.8} | options)
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
    return model, sparsifier, optimizer


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_sparsifier_and_its_model(tmp_path):
    model, sparsifier, _ = trained()
    save(model, tmp_path, masks=sparsifier, recipe={"epochs": 3}, metadata={"note": "ü"})
    assert equal(load_state_dict(tmp_path), model.state_dict())
    assert equal(load_masks(tmp_path), sparsifier.masks)
    found = inspect(tmp_path)
    assert [weight.name for weight in found.weights] == list(model.state_dict())
    assert {weight.name: weight.nnz for weight in found.weights if weight.masked} == {
        name: int(mask.sum()) for name, mask in sparsifier.masks.items()
    }
    assert found.weights[0].structure == "Unstructured()"
    assert found.weights[1].structure == "dense"
    assert found.sparsity == pytest.approx(sparsifier.sparsity)
    assert (found.recipe, found.metadata) == ({"epochs": 3}, {"note": "ü"})
    assert found.method.startswith("DropGrow(")
    assert " at 0x" not in found.method
    assert found.arguments == {"sparsity": sparsifier.sparsity, "seed": 0, "step": 5}
    assert set(found.source) == {"sparselearn", "torch"}


def test_a_model_without_masks_and_one_without_weights(tmp_path):
    model = network()
    save(model, tmp_path / "dense")
    assert equal(load_state_dict(tmp_path / "dense"), model.state_dict())
    assert load_masks(tmp_path / "dense") == {}
    assert {weight.encoding for weight in inspect(tmp_path / "dense").weights} == {"dense"}
    save(nn.ReLU(), tmp_path / "none")
    assert load_state_dict(tmp_path / "none") == {}
    verify(tmp_path / "none")


def test_the_structure_is_recorded(tmp_path):
    model = nn.Linear(16, 8)
    save(model, tmp_path, masks=Sparsifier(model, static(structure=NM(2, 4))))
    assert (inspect(tmp_path).weights[0].structure, inspect(tmp_path).weights[0].encoding) == ("NM(2, 4)", "packed_nm")
    model = nn.Linear(160, 8)
    save(model, tmp_path, masks=Sparsifier(model, static(structure=ConstantFanIn()), sparsity=0.95))
    assert inspect(tmp_path).weights[0].structure == "ConstantFanIn()"
    assert inspect(tmp_path).weights[0].encoding == "condensed"


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 50, bias=False)
            self.head.weight = self.embedding.weight

    model, other = Tied(), Tied()
    mask = torch.rand(50, 8) < 0.3
    model.head.weight.data.masked_fill_(~mask, 0)
    save(model, tmp_path, masks={"head.weight": mask})
    (info,) = inspect(tmp_path).weights
    assert (info.name, info.aliases) == ("embedding.weight", ("head.weight",))
    loaded = load_state_dict(tmp_path)
    assert loaded["head.weight"] is loaded["embedding.weight"]
    assert [name for name, _, _ in iterate(tmp_path)] == ["embedding.weight"]
    load(tmp_path, other)
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)
    with pytest.raises(SparsityError, match=r"`masks` names the tied weight `embedding.weight` twice, also as `head"):
        save(model, tmp_path, masks={"embedding.weight": mask, "head.weight": mask})


def test_views_and_memory_formats_are_stored_as_they_look(tmp_path):
    base = torch.arange(24.0)
    conv = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    mask = (torch.rand(4, 3, 2, 2) < 0.5).to(memory_format=torch.channels_last)
    state = {"all": base, "part": base[3:9], "odd": base[::2], "turned": base.view(4, 6).T, "conv": conv * mask}
    save(state, tmp_path, masks={"conv": mask})
    assert equal(load_state_dict(tmp_path), state)
    assert torch.equal(load_masks(tmp_path)["conv"], mask)
    assert torch.equal(base, torch.arange(24.0))


def test_compiled_models_have_the_names_of_plain_ones(tmp_path):
    model, sparsifier, _ = trained()
    save(torch.compile(model), tmp_path, masks=sparsifier)
    assert equal(load_state_dict(tmp_path), model.state_dict())
    other = network(1)
    load(tmp_path, torch.compile(other))
    assert equal(other.state_dict(), model.state_dict())


def test_the_same_content_gives_the_same_files(tmp_path):
    model, sparsifier, _ = trained()
    for name in ("a", "b"):
        save(model, tmp_path / name, masks=sparsifier)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]
    save(model, tmp_path / "a", masks=sparsifier)  # over itself
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == files[0]


def test_files_may_be_read_by_those_who_may_read_others(tmp_path):
    save(network(), tmp_path / "a")
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_load_dense(tmp_path):
    model, sparsifier, _ = trained()
    save(model, tmp_path, masks=sparsifier)
    other = network(1)
    weight = other[0].weight
    assert load(tmp_path, other) == {}
    assert equal(other.state_dict(), model.state_dict())
    assert other[0].weight is weight  # an optimizer's reference stays good


@pytest.mark.parametrize("method", [None, sr_ste(NM(2, 4), every=2)], ids=["rigl", "sr-ste"])
def test_training_goes_on_from_masks_and_weights(tmp_path, method):
    options = {} if method is None else {"sparsity": None}
    model, sparsifier, _ = trained(method, **options)
    save(model, tmp_path, masks=sparsifier)
    other, again, optimizer = trained(method, steps=1, **options, seed=7)
    masks = load(tmp_path, other, "masked", sparsifier=again)
    assert equal(masks, sparsifier.masks)
    assert equal({name: mask.clone() for name, mask in again.masks.items()}, masks)
    assert equal(other.state_dict(), model.state_dict())
    optimizer.zero_grad()
    other(torch.randn(8, 20)).square().mean().backward()
    optimizer.step()
    assert again.nnz == sparsifier.nnz
    for name, mask in again.masks.items():
        assert not bool(other.get_parameter(name)[~mask].any())
    assert not equal(other.state_dict(), model.state_dict())


def test_masks_are_returned_for_a_loop_of_ones_own(tmp_path):
    model, sparsifier, _ = trained()
    save(model, tmp_path, masks=sparsifier)
    assert equal(load(tmp_path, network(1), "masked"), sparsifier.masks)


def test_load_condensed(tmp_path):
    model, sparsifier, _ = trained(static(structure=ConstantFanIn()))
    save(model, tmp_path, masks=sparsifier)
    other = network(1)
    load(tmp_path, other, "condensed")
    assert type(other[0]) is CondensedLinear
    x = torch.randn(5, 20)
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    model, sparsifier, _ = trained()
    save(model, tmp_path, masks=sparsifier)
    load(tmp_path, other := network(1), "condensed")
    assert type(other[0]) is CsrLinear


def test_a_process_that_knows_no_model_reads_dense_tensors(tmp_path):
    model, sparsifier, _ = trained()
    save(model, tmp_path / "a", masks=sparsifier)
    x = torch.randn(3, 20)
    torch.save({"x": x, "y": model.eval()(x)}, tmp_path / "io.pt")
    code = (
        "import sys, torch\nfrom torch import nn\nfrom sparselearn.checkpoint import load_state_dict\n"
        "model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 4))\n"
        "model.load_state_dict(load_state_dict(sys.argv[1])), model.eval()\nio = torch.load(sys.argv[2])\n"
        "assert torch.equal(model(io['x']), io['y'])\n"
        "assert 'pickle' not in getattr(sys.modules['sparselearn.checkpoint.api'], '__dict__')"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a", tmp_path / "io.pt"], check=True)


def test_iterate_holds_few_tensors(tmp_path):
    """40 layers of 1 MiB; reading them one by one takes the memory of a few."""
    mask = torch.rand(512, 512) < 0.1
    state = {f"layer{i}": torch.randn(512, 512) * mask + 0.0 for i in range(40)}
    save({n: t.masked_fill(~mask, 0) for n, t in state.items()}, tmp_path, masks=dict.fromkeys(state, mask))
    tracemalloc.start()
    for name, tensor, read_mask in iterate(tmp_path):
        assert torch.equal(tensor, state[name] * mask)
        assert torch.equal(read_mask, mask)
    assert tracemalloc.get_traced_memory()[1] < 16_000_000
    tracemalloc.stop()


# ---- shards ----------------------------------------------------------------------------------------------------------


def test_shards_keep_a_weight_together_and_below_the_limit(tmp_path):
    mask = torch.rand(64, 64) < 0.5
    state = {f"layer{i}": torch.randn(64, 64).masked_fill(~mask, 0) for i in range(10)} | {"big": torch.randn(9000)}
    masks = {name: mask for name in state if name != "big"}
    save(state, tmp_path, masks=masks, max_shard_bytes=20_000)
    found = inspect(tmp_path)
    assert len(found.shards) == 6  # two layers of some 8.7 kB each, and the big one alone
    assert [weight.shard for weight in found.weights] == sorted(weight.shard for weight in found.weights)
    sizes = [(tmp_path / shard.file).stat().st_size for shard in found.shards]
    assert max(sizes[:-1]) < 20_000 < sizes[-1]
    assert equal(load_state_dict(tmp_path), state)
    save({"one": torch.ones(3)}, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the shards of before are gone


def test_a_damaged_shard_among_several_is_named(tmp_path):
    state = {f"layer{i}": torch.randn(100) for i in range(5)}
    save(state, tmp_path, max_shard_bytes=500)
    shard = tmp_path / inspect(tmp_path).shards[3].file
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SparsityError, match="`layer3` of `.*` is damaged: its values are not those that were saved"):
        verify(tmp_path)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refuse(tmp_path, match, model=None, **options):
    with pytest.raises(SparsityError, match=match):
        save(model or {"w": torch.zeros(2, 3), "b": torch.zeros(3)}, tmp_path / "out", **options)


def test_masks_that_do_not_fit(tmp_path):
    mask = torch.ones(2, 3, dtype=torch.bool)
    refuse(tmp_path, r"`masks` names `v`, which the model has not. Closest: `w`, `b`", masks={"v": mask})
    refuse(tmp_path, r"mask of `w` must be bool of shape \[2, 3\].*it is torch.float32", masks={"w": mask.float()})
    refuse(tmp_path, r"mask of `w` must be .*it is torch.bool of shape \[3, 2\]", masks={"w": mask.T})
    assert not (tmp_path / "out" / "sparselearn.json").exists()


@pytest.mark.parametrize("hidden", [1.0, -0.0, float("nan")])
def test_numbers_outside_of_the_mask_are_refused(tmp_path, hidden):
    weight = torch.tensor([[0.0, 1.0], [hidden, 0.0]])
    mask = torch.tensor([[False, True], [False, True]])
    match = (
        "`w` has 1 weights outside of its mask that are not \\+0 and would be lost. Zero them first with `sparsifier"
    )
    refuse(tmp_path, match, {"w": weight}, masks={"w": mask})
    save({"w": weight.masked_fill(~mask, 0)}, tmp_path, masks={"w": mask})


def test_encodings_that_do_not_fit(tmp_path):
    mask = torch.tensor([[True, True, True], [False, False, True]])
    refuse(tmp_path, "`encoding` must be one of dense, bitmask", masks={"w": mask}, encoding="zip")
    refuse(tmp_path, "`encoding` names `v`, which the model has not", masks={"w": mask}, encoding={"v": "csr"})
    refuse(tmp_path, "`encoding` names `b`, which has no mask", masks={"w": mask}, encoding={"b": "csr"})
    for kind in ("condensed", "packed_nm"):
        refuse(tmp_path, f"`w` cannot be stored as asked: .*'{kind}'", masks={"w": mask}, encoding=kind)


def test_tensors_that_cannot_be_stored(tmp_path):
    refuse(
        tmp_path, "`w` must be an ordinary .strided. tensor .* layout torch.sparse_coo", {"w": torch.eye(3).to_sparse()}
    )
    refuse(tmp_path, "`w` must be an ordinary", {"w": torch.empty(3, device="meta")})
    refuse(tmp_path, "`w` must be an ordinary .* it is int", {"w": 3})
    refuse(
        tmp_path, "`w` is torch.complex128; a checkpoint holds float64", {"w": torch.zeros(1, dtype=torch.complex128)}
    )
    mask = torch.ones(1, 2, dtype=torch.bool)
    state = {"w": torch.zeros(1, 2), "w#bits": torch.zeros(1)}
    mask[0, 0] = False
    refuse(tmp_path, "`w#bits`", state, masks={"w": mask}, encoding="bitmask")


def test_recipes_that_are_no_json(tmp_path):
    cycle = []
    cycle.append(cycle)
    for value in (float("nan"), {1, 2}, cycle, {1: "a", "1": "b"}):
        with pytest.raises(SparsityError):
            save(network(), tmp_path / "out", recipe=value)
    assert not (tmp_path / "out").exists()


def test_paths_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SparsityError, match="must be the folder of a checkpoint, new or old; it is a file"):
        save(network(), tmp_path / "file")
    with pytest.raises(SparsityError, match="there is no folder .* Create it first"):
        save(network(), tmp_path / "none" / "out")


def test_models_that_do_not_fit(tmp_path):
    model, sparsifier, _ = trained()
    save(model, tmp_path, masks=sparsifier)
    for other, match in (
        (nn.Sequential(*list(network())[:-1]), r"holds `4.weight`, which the model has not"),
        (nn.Sequential(*network(), nn.Linear(4, 4)), r"The model has `5.weight`, which"),
        (nn.Sequential(nn.Linear(20, 30), *list(network())[1:]), r"`0.weight` is torch.float32 of shape \[30, 20\]"),
        (network().bfloat16(), r"`0.weight` is torch.bfloat16 .* so that nothing is rounded"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(SparsityError, match=match):
            load(tmp_path, other)
        assert equal(other.state_dict(), before)


def test_ways_to_load_that_do_not_fit(tmp_path):
    model, sparsifier, _ = trained()
    save(model, tmp_path, masks=sparsifier)
    with pytest.raises(SparsityError, match="`as_` must be one of dense, masked, condensed, semi_structured; got 'x'"):
        load(tmp_path, model, "x")
    with pytest.raises(SparsityError, match="semi_structured"):
        load(tmp_path, model, "semi_structured")
    with pytest.raises(SparsityError, match="`sparsifier` goes with `as_='masked'`; got 'dense'"):
        load(tmp_path, model, sparsifier=sparsifier)
    save(model, tmp_path, masks={name: mask for name, mask in sparsifier.masks.items() if name != "3.weight"})
    with pytest.raises(SparsityError, match="`3.weight` is sparse in the sparsifier and has no mask in"):
        load(tmp_path, model, "masked", sparsifier=sparsifier)


def test_without_safetensors(tmp_path, monkeypatch):
    save(network(), tmp_path)
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for call in (lambda: save(network(), tmp_path), lambda: load_state_dict(tmp_path)):
        with pytest.raises(SparsityError, match="need the package `safetensors`.* Run `pip install safetensors`"):
            call()


# ---- several processes -----------------------------------------------------------------------------------------------


def worker(rank, port, folder):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

    def sharded(seed):
        return fully_shard(network(seed), mesh=mesh)

    model = network()
    sparsifier = Sparsifier(model, static(), sparsity=0.8)
    fully_shard(model, mesh=mesh)
    sparsifier.before_step(torch.optim.SGD(model.parameters()))  # lets masks follow their weights to the shards
    save(model, f"{folder}/fsdp", masks=sparsifier)
    dist.barrier()
    save(get_model_state_dict(model), f"{folder}/state", masks=sparsifier.masks)
    dist.barrier()
    other = sharded(1)
    load(f"{folder}/fsdp", other)
    same = [torch.equal(a.full_tensor(), b.full_tensor()) for a, b in zip(model.parameters(), other.parameters())]
    parallel = nn.parallel.DistributedDataParallel(network())
    if rank == 0:  # unsharded models need no other process
        save(parallel, f"{folder}/ddp")
    dist.barrier()
    load(f"{folder}/fsdp", parallel)
    same += [torch.equal(a.full_tensor(), b) for a, b in zip(model.parameters(), parallel.parameters())]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(same, file)
    dist.destroy_process_group()


def test_sharded_models_and_their_state_dicts(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    alone = network()
    sparsifier = Sparsifier(alone, static(), sparsity=0.8)
    for name in ("fsdp", "state"):
        assert equal(load_state_dict(tmp_path / name), alone.state_dict())
        assert equal(load_masks(tmp_path / name), sparsifier.masks)
    assert equal(load_state_dict(tmp_path / "ddp"), network().state_dict())
    for rank in (0, 1):
        same = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(same) == 16
        assert all(same)


def test_nothing_on_the_load_path_unpickles():
    import sparselearn.checkpoint.api as api

    folder = os.path.dirname(api.__file__)
    for name in ("api", "encodings", "files", "manifest", "saving", "tensors"):
        with open(f"{folder}/{name}.py") as file:
            assert not re.search(r"pickle|torch\.load\b|torch\.save\b|np\.load\b|\beval\(|\bexec\(", file.read())
