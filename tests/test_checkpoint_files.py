"""Saving and loading whole models: sparsifiers, tied weights, shards, wrappers."""

import os
import re
import stat
import subprocess
import sys
import tracemalloc

import pytest
import torch
from torch import nn

from sparselearn import SparseOptimizer, Sparsifier, SparsityError, rigl, static
from sparselearn.checkpoint import inspect, iterate, load, load_masks, load_state_dict, save, verify
from sparselearn.methods import sr_ste
from sparselearn.modules import CondensedLinear, CsrLinear, SemiStructuredLinear
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


def test_a_sparsifier_brings_its_model_and_masks(tmp_path):
    model, sparsifier, _ = trained()
    save(sparsifier, tmp_path / "a")
    save(model, tmp_path / "b", masks=sparsifier)
    assert (tmp_path / "a" / "sparselearn.json").read_bytes() == (tmp_path / "b" / "sparselearn.json").read_bytes()
    with pytest.raises(SparsityError, match="`masks` must be left out"):
        save(sparsifier, tmp_path / "a", masks=sparsifier.masks)


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
    state = {
        "all": base,
        "part": base[3:9],
        "odd": base[::2],
        "turned": base.view(4, 6).T,
        "conv": conv.masked_fill(~mask, 0),
    }
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


def test_ordinary_weights_are_written_in_place_and_others_through_torch(tmp_path):
    torch.manual_seed(0)
    state = {"weight": torch.randn(6, 4, 3, 3), "bias": torch.randn(6)}
    mask = torch.rand(6, 4, 3, 3) < 0.5
    state["weight"].masked_fill_(~mask, 0)
    save(state, tmp_path, masks={"weight": mask})
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = nn.Conv2d(4, 6, 3).to(memory_format=memory_format)
        place, version = layer.weight.data_ptr(), layer.weight._version
        load(tmp_path, layer)
        assert equal(layer.state_dict(), state)
        assert layer.weight.data_ptr() == place
        assert layer.weight.is_contiguous(memory_format=memory_format)
        assert layer.weight._version > version  # autograd notices that it was written


def test_load_state_dict_hooks_see_the_weights(tmp_path):
    model, other, seen = network(), network(1), {}
    save(model, tmp_path)
    other.register_load_state_dict_pre_hook(lambda module, state, *rest: seen.update(state))
    load(tmp_path, other)
    assert equal(seen, model.state_dict())


def test_weights_that_the_model_ties_but_the_checkpoint_does_not_are_loaded_in_order(tmp_path):
    torch.manual_seed(0)
    first, second = nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False)
    save(nn.Sequential(first, second), tmp_path)
    tied = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    tied[1].weight = tied[0].weight
    load(tmp_path, tied)
    assert torch.equal(tied[0].weight, second.weight)


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


@pytest.mark.filterwarnings("ignore:.*computes densely")
def test_load_semi_structured(tmp_path):
    model, sparsifier, _ = trained(static(structure=NM(2, 4)), sparsity=0.5, exclude=["4.weight"])
    save(model, tmp_path, masks=sparsifier)
    other = network(1)
    masks = load(tmp_path, other, "semi_structured")
    assert [type(layer) for layer in (other[0], other[3], other[4])] == [SemiStructuredLinear] * 2 + [nn.Linear]
    assert torch.equal(other[0].mask, masks["0.weight"])
    assert torch.equal(other[0].to_dense()[0].weight, model[0].weight)
    x = torch.randn(5, 20)
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    model, sparsifier, _ = trained()  # not n:m: stays as it is
    save(model, tmp_path, masks=sparsifier)
    load(tmp_path, other := network(1), "semi_structured")
    assert torch.equal(other[0].weight, model[0].weight)


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
    with pytest.raises(SparsityError, match=r"`layer3` of `.*` is damaged: its values are not those that were saved"):
        verify(tmp_path)


def test_nothing_on_the_load_path_unpickles():
    import sparselearn.checkpoint.api as api

    folder = os.path.dirname(api.__file__)
    for name in ("api", "encodings", "files", "manifest", "saving", "tensors"):
        with open(f"{folder}/{name}.py") as file:
            assert not re.search(r"pickle|torch\.load\b|torch\.save\b|np\.load\b|\beval\(|\bexec\(", file.read())


def test_the_package_offers_them_by_their_short_names(tmp_path) -> None:
    import sparselearn as sl

    sl.save({"weight": torch.eye(4)}, tmp_path / "model.sparse")
    assert torch.equal(sl.load_state_dict(tmp_path / "model.sparse")["weight"], torch.eye(4))
    sl.verify(tmp_path / "model.sparse")
    assert {"save", "load", "inspect", "export_onnx"} <= set(dir(sl))
    with pytest.raises(AttributeError, match="no attribute 'safe'"):
        _ = sl.safe
