"""Several processes: one spawn of 2 gloo ranks runs every scenario below, and the tests read what it wrote."""

import copy
import os
import socket
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sparselearn import (
    DropGrow,
    Layer,
    SparseOptimizer,
    Sparsifier,
    SparsityError,
    UpdateSchedule,
    criteria,
    distributed,
    rigl,
    set_,
)
from sparselearn.methods import global_ranking

RANKS, STEPS, BATCH = 2, 11, 8
METHODS = {
    "rigl": rigl(stop=10, every=3, drop_fraction=0.5),
    "rigl-with-step": rigl(stop=10, every=3, drop_fraction=0.5, skip_step=False),
    "set": set_(stop=10, every=3, drop_fraction=0.5),
}


@dataclass(frozen=True)
class gradient_sum:
    """A tracker of our own, so that weight-shaped memory is sharded, too."""

    key: str = "gradient_sum"

    def init(self, layer):
        return torch.zeros_like(layer.weight)

    def after_step(self, layer, value):
        return value if layer.grad is None else value + layer.grad.abs()

    def after_update(self, layer, value):
        return value * layer.mask


@dataclass(frozen=True)
class much_trained:
    trackers = (gradient_sum(),)

    def __call__(self, layer):
        return layer.memory["gradient_sum"] + layer.weight.abs()


FSDP_METHODS = {
    **METHODS,
    "tracker": DropGrow(
        much_trained(), criteria.gradient, UpdateSchedule(3, 10), grow_init=criteria.initial_distribution()
    ),
    "global": DropGrow(grow=criteria.gradient, updates=UpdateSchedule(3, 10), reallocate=global_ranking()),
    "momentum": DropGrow(grow=criteria.momentum, updates=UpdateSchedule(3, 10), optimizer_state="keep"),
}


def network():
    """Double precision, so that sums in another order cannot tip a mask; no dimension is divisible by 2 but one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 6), nn.Tanh(), nn.Linear(6, 1)
    ).double()


def data(n=STEPS, seed=5):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, 7, generator=g).double(), torch.randn(BATCH, 1, generator=g).double()) for _ in range(n)
    ]


def part(batch, rank):
    return tuple(t.chunk(RANKS)[rank] for t in batch)


def build(method, module=None, **options):
    model = network() if module is None else module
    sparsifier = Sparsifier(model, method, **{"sparsity": 0.7, **options})
    return model, sparsifier, optimizer_of(model, sparsifier)


def optimizer_of(model, sparsifier):
    return SparseOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), sparsifier)


def backward(model, batch):
    model.zero_grad()
    nn.functional.mse_loss(model(batch[0]), batch[1]).backward()


def steps(model, optimizer, batches, clip=None):
    for batch in batches:
        backward(model, batch)
        if clip is not None:
            optimizer.before_step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()  # not the model's: its parameters may be FSDP's gathered ones


def snapshot(model, sparsifier):
    """Whole copies of weights and masks."""
    return {
        "weights": {n: distributed.full(p.detach()).clone() for n, p in model.named_parameters()},
        "masks": {n: distributed.full(m).clone() for n, m in sparsifier.masks.items()},
        "nnz": {n: layer.nnz for n, layer in sparsifier.state.layers.items()},
        "step": sparsifier.step,
    }


def single(method, n=STEPS, clip=None, **options):
    model, sparsifier, optimizer = build(method, **options)
    steps(model, optimizer, data(n), clip)
    return snapshot(model, sparsifier)


# ---- what each of the two ranks runs -----------------------------------------------------------------------


def ddp_masks(rank):
    out = {}
    for name, method in METHODS.items():
        model, sparsifier, optimizer = build(method)
        wrapped = nn.parallel.DistributedDataParallel(model)
        steps(wrapped, optimizer, [part(b, rank) for b in data()], clip=0.5)
        out[name] = snapshot(model, sparsifier)
    # built from the wrapped model, with density scaling
    model = network()
    wrapped, sparsifier, optimizer = build(
        METHODS["rigl"], nn.parallel.DistributedDataParallel(model), density_scaling=True
    )
    steps(wrapped, optimizer, [part(b, rank) for b in data()])
    out["scaled"] = snapshot(model, sparsifier)
    return out


def before_first_update(rank):
    """Each rank's own gradient at the first update step, without DDP's average; and the masks that DDP then gets."""
    model, sparsifier, optimizer = build(METHODS["rigl"])
    wrapped = nn.parallel.DistributedDataParallel(model)
    steps(wrapped, optimizer, [part(b, rank) for b in data(3)])
    with wrapped.no_sync():
        backward(wrapped, part(data()[3], rank))
    own = {n: p.grad.clone() for n, p in model.named_parameters()}
    before = snapshot(model, sparsifier)
    backward(wrapped, part(data()[3], rank))
    optimizer.step()
    return {"own": own, "before": before, "after": snapshot(model, sparsifier)}


def message(run):
    try:
        run()
    except SparsityError as error:
        return str(error)
    return ""


def different_seeds(rank):
    model, _, optimizer = build(METHODS["rigl"], seed=rank)
    wrapped = nn.parallel.DistributedDataParallel(model)
    return message(lambda: steps(wrapped, optimizer, data()))


def loaded(rank, saved_after, seeds=(0, 0)):
    """Ranks load states that were saved after different numbers of steps, or by runs of different seeds."""
    model, _sparsifier, optimizer = build(METHODS["rigl"])
    alone, own, own_optimizer = build(
        DropGrow(updates=UpdateSchedule(99, 100)), seed=seeds[rank]
    )  # never exchanges masks
    for batch in data(saved_after[rank]):
        backward(alone, batch)
        own.before_step(own_optimizer.base)
        own_optimizer.base.step()
        own.after_step(own_optimizer.base)
    optimizer.load_state_dict(copy.deepcopy(own_optimizer.state_dict()))
    model.load_state_dict(alone.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    return message(lambda: steps(wrapped, optimizer, data(4)))


def without_average(rank):
    method = rigl(stop=10, every=3, start=0, drop_fraction=0.5)
    model, sparsifier, optimizer = build(method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, optimizer, [part(data()[0], rank)])
    return {**snapshot(model, sparsifier), "warnings": [str(w.message) for w in caught]}


def one_rank_overflows(rank):
    model, sparsifier, optimizer = build(METHODS["rigl"])
    batches = data(5)
    steps(model, optimizer, batches[:3])
    before = snapshot(model, sparsifier)
    backward(model, batches[3])
    inactive = sparsifier.masks["0.weight"].logical_not().nonzero()[0]
    if rank == 1:  # where it is masked, so that the step itself can go on
        model[0].weight.grad[tuple(inactive)] = torch.inf
    optimizer.step()
    deferred = snapshot(model, sparsifier)
    flags = [layer.deferred for layer in sparsifier.state.layers.values()]
    steps(model, optimizer, batches[4:])
    return {"before": before, "deferred": deferred, "flags": flags, "after": snapshot(model, sparsifier)}


def saved_midway(rank):
    """Six steps on split batches, a save, and five more on equal batches: (g+g)/2 is g, so one process can follow."""
    model, sparsifier, optimizer = build(METHODS["rigl"])
    wrapped = nn.parallel.DistributedDataParallel(model)
    steps(wrapped, optimizer, [part(b, rank) for b in data(6)])
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps(wrapped, optimizer, data()[6:])
    return {"saved": saved, "end": snapshot(model, sparsifier)}


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for layer in (model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp_run(method, rank, built, **options):
    if built == "after":
        model, sparsifier, optimizer = build(method, sharded(network()), **options)
    else:
        model = network()
        sparsifier = Sparsifier(model, method, sparsity=0.7, **options)
        optimizer = optimizer_of(sharded(model), sparsifier)
    exact = True
    for batch in data():
        steps(model, optimizer, [part(batch, rank)], clip=0.5)
        now = snapshot(model, sparsifier)
        for name, mask in now["masks"].items():
            exact &= int(mask.sum()) == now["nnz"][name]
            exact &= not bool(now["weights"][name][~mask].any())
        if method.optimizer_state == "zero":
            for name, p in model.named_parameters():
                if name in now["masks"]:
                    for slot in optimizer.state[p].values():
                        if slot.shape == p.shape:
                            exact &= not bool(distributed.full(slot)[~now["masks"][name]].any())
    return model, sparsifier, optimizer, {**now, "exact": exact}


def fsdp_masks(rank):
    out = {}
    for name, method in FSDP_METHODS.items():
        for built in ("before", "after"):
            out[name, built] = fsdp_run(method, rank, built)[-1]
    for built in ("before", "after"):
        out["scaled", built] = fsdp_run(METHODS["rigl"], rank, built, density_scaling=True, init="fan_in")[-1]
        out["support", built] = fsdp_run(METHODS["rigl"], rank, built, support=0.6)[-1]
    return out


def fsdp_checkpoint(rank):
    """Saved after all steps; loaded here again before and after a change, and by a single process in the tests."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    model, sparsifier, optimizer, end = fsdp_run(FSDP_METHODS["tracker"], rank, "after")
    first_sparsifier, first_optimizer = sparsifier, optimizer
    options = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(model, optimizer.base, options=options)
    saved = copy.deepcopy({"model": weights, "optimizer": state, "sparsifier": sparsifier.state_dict()})
    steps(model, optimizer, [part(b, rank) for b in data(4, seed=6)])
    # a new sharded run goes on from it (set_state_dict shards in place what it is given)
    again, sparsifier, optimizer = build(FSDP_METHODS["tracker"], sharded(network()))
    set_state_dict(
        again, optimizer.base, model_state_dict=copy.deepcopy(saved["model"]), options=options,
        optim_state_dict=copy.deepcopy(saved["optimizer"]),
    )  # fmt: skip
    sparsifier.load_state_dict(saved["sparsifier"])
    steps(again, optimizer, [part(b, rank) for b in data(4, seed=6)])
    sparsifier.summary()
    sparsifier.apply_masks()
    # after a forward pass without backward the root is not sharded until the next one
    with torch.no_grad():
        again(data(1)[0][0])
    sparsifier.summary()
    sparsifier.load_state_dict(sparsifier.state_dict())
    steps(again, optimizer, [part(b, rank) for b in data(2, seed=7)])
    steps(model, first_optimizer, [part(b, rank) for b in data(2, seed=7)])
    later = snapshot(model, first_sparsifier)
    return {"saved": saved, "end": end, "later": later, "resumed": snapshot(again, sparsifier)}


def fsdp_one_shard_overflows(rank):
    model, sparsifier, optimizer = build(METHODS["rigl"], sharded(network()))
    batches = [part(b, rank) for b in data(5)]
    steps(model, optimizer, batches[:3])
    before = snapshot(model, sparsifier)
    backward(model, batches[3])
    if rank == 1:
        grad, mask = distributed.local(model[2].weight.grad), distributed.local(sparsifier.masks["2.weight"])
        grad[tuple(mask.logical_not().nonzero()[0])] = torch.nan
    optimizer.step()
    deferred = snapshot(model, sparsifier)
    steps(model, optimizer, batches[4:])
    return {"before": before, "deferred": deferred, "after": snapshot(model, sparsifier)}


def lightning(rank):
    """A fit of two ranks as torchrun starts them."""
    import pytorch_lightning as pl

    from sparselearn.lightning import SparsityCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(RANKS)}
    module, callback = Module(), SparsityCallback(METHODS["rigl"], sparsity=0.7)
    trainer = pl.Trainer(
        strategy="ddp", devices=RANKS, accelerator="cpu", callbacks=[callback], max_epochs=1, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        use_distributed_sampler=False, gradient_clip_val=0.5,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([part(b, rank) for b in data()], batch_size=None)
    trainer.fit(module, loader)
    assert trainer.world_size == RANKS
    return snapshot(module, callback.sparsifier)


SCENARIOS = {
    "ddp": ddp_masks,
    "first_update": before_first_update,
    "seeds": different_seeds,
    "loaded_steps": lambda rank: loaded(rank, (2, 3)),
    "loaded_masks": lambda rank: loaded(rank, (0, 0), seeds=(0, 1)),
    "loaded_equal": lambda rank: loaded(rank, (2, 2)),
    "without_average": without_average,
    "overflow": one_rank_overflows,
    "midway": saved_midway,
    "fsdp": fsdp_masks,
    "fsdp_checkpoint": fsdp_checkpoint,
    "fsdp_overflow": fsdp_one_shard_overflows,
    "lightning": lightning,
}


def worker(rank, port, folder):
    import traceback
    from datetime import timedelta

    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
    }  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=100))
    out = {}
    for name, scenario in SCENARIOS.items():
        try:
            out[name] = scenario(rank)
        except Exception:
            out[name] = traceback.format_exc()
        dist.barrier()
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(worker, args=(port, str(folder)), nprocs=RANKS, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def results(ranks, name):
    got = [rank[name] for rank in ranks]
    for rank, result in enumerate(got):
        assert not (isinstance(result, str) and result.startswith("Traceback")), f"rank {rank}: {result}"
    return got


def bitwise_equal(a, b):
    assert a["masks"].keys() == b["masks"].keys()
    for name, mask in a["masks"].items():
        assert torch.equal(mask, b["masks"][name]), name
    for name, weight in a["weights"].items():
        assert torch.equal(weight, b["weights"][name]), name


def matches(result, reference):
    """Masks to the bit, weights to rounding (the order of sums differs)."""
    assert result["step"] == reference["step"]
    assert result["nnz"] == reference["nnz"]
    for name, mask in reference["masks"].items():
        assert torch.equal(result["masks"][name], mask), name
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-6)


# ---- DDP -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_ddp_equals_one_process_on_the_same_global_batch(ranks, name):
    first, second = (r[name] for r in results(ranks, "ddp"))
    bitwise_equal(first, second)
    reference = single(METHODS[name], clip=0.5)
    matches(first, reference)
    start = build(METHODS[name])[1].masks
    assert any(not torch.equal(start[n], m) for n, m in reference["masks"].items())


def test_a_sparsifier_built_from_the_ddp_module_with_density_scaling(ranks):
    first, second = (r["scaled"] for r in results(ranks, "ddp"))
    bitwise_equal(first, second)
    matches(first, single(METHODS["rigl"], density_scaling=True))


def test_the_mean_gradient_is_ranked_and_not_the_mean_of_magnitudes(ranks):
    first, second = results(ranks, "first_update")
    differs = False
    for name, mask in first["before"]["masks"].items():
        own = torch.stack([first["own"][name], second["own"][name]])
        weight = first["before"]["weights"][name]

        def choose(grad, name=name, weight=weight, mask=mask):
            layer = Layer(name, weight, grad, mask, {}, 3, torch.Generator())
            return METHODS["rigl"].new_masks([layer], [int(mask.sum())])[0][0]

        ours, theirs = choose(own.mean(0)), choose(own.abs().mean(0))
        assert torch.equal(first["after"]["masks"][name], ours)
        differs |= not torch.equal(ours, theirs)
    assert differs


@pytest.mark.parametrize("name", ["seeds", "loaded_steps", "loaded_masks"])
def test_ranks_that_differ_are_refused(ranks, name):
    for text in results(ranks, name):
        assert text.startswith("Ranks hold different masks at step")


def test_ranks_that_load_the_same_state_go_on(ranks):
    assert results(ranks, "loaded_equal") == ["", ""]


def test_gradients_that_are_not_averaged_warn_and_rank_0_decides(ranks):
    first, second = results(ranks, "without_average")
    bitwise_equal(first, second)
    assert first["warnings"] == []
    assert second["warnings"]
    for text in second["warnings"]:
        assert text.startswith("Ranks proposed different masks for")
    model, sparsifier, optimizer = build(rigl(stop=10, every=3, start=0, drop_fraction=0.5))
    steps(model, optimizer, [part(data()[0], 0)])
    bitwise_equal(first, snapshot(model, sparsifier))


def test_an_overflow_on_one_rank_defers_the_update_on_both(ranks):
    first, second = results(ranks, "overflow")
    for stage in ("before", "deferred", "after"):
        bitwise_equal(first[stage], second[stage])
    assert all(first["flags"])
    assert all(second["flags"])
    for name, mask in first["before"]["masks"].items():
        assert torch.equal(mask, first["deferred"]["masks"][name])
    assert any(not torch.equal(m, first["after"]["masks"][n]) for n, m in first["before"]["masks"].items())


def test_a_state_of_two_ranks_resumes_on_one_process_to_the_bit(ranks):
    first, second = results(ranks, "midway")
    bitwise_equal(first["end"], second["end"])
    model, sparsifier, optimizer = build(METHODS["rigl"])
    model.load_state_dict(first["saved"]["model"])
    optimizer.load_state_dict(first["saved"]["optimizer"])
    steps(model, optimizer, data()[6:])
    bitwise_equal(snapshot(model, sparsifier), first["end"])


# ---- FSDP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.parametrize("name", [*FSDP_METHODS, "scaled", "support"])
def test_fsdp2_equals_one_process(ranks, name, built):
    first, second = (r[name, built] for r in results(ranks, "fsdp"))
    assert first["exact"]
    assert second["exact"]
    bitwise_equal(first, second)
    options = {"scaled": {"density_scaling": True, "init": "fan_in"}, "support": {"support": 0.6}}.get(name, {})
    matches(first, single(FSDP_METHODS.get(name, METHODS["rigl"]), clip=0.5, **options))


def test_a_sharded_state_is_whole_and_goes_on_sharded_or_on_one_process(ranks):
    first, second = results(ranks, "fsdp_checkpoint")
    bitwise_equal(first["later"], first["resumed"])
    bitwise_equal(first["later"], second["resumed"])
    saved = first["saved"]
    assert all(type(t) is torch.Tensor for layer in saved["sparsifier"]["layers"].values() for t in _tensors(layer))
    model, sparsifier, optimizer = build(FSDP_METHODS["tracker"])
    model.load_state_dict(saved["model"])
    sparsifier.load_state_dict(saved["sparsifier"])
    bitwise_equal(snapshot(model, sparsifier), first["end"])
    names = [n for n, _ in model.named_parameters()]
    optimizer.base.load_state_dict(
        {
            "state": {i: saved["optimizer"]["state"][n] for i, n in enumerate(names)},
            "param_groups": optimizer.base.state_dict()["param_groups"],
        }
    )
    steps(model, optimizer, data(4, seed=6) + data(2, seed=7))
    matches(first["later"], snapshot(model, sparsifier))


def _tensors(layer):
    return [v for v in (*layer.values(), *layer["memory"].values()) if isinstance(v, torch.Tensor)]


def test_an_overflow_in_one_shard_defers_the_update_on_both(ranks):
    first, second = results(ranks, "fsdp_overflow")
    for stage in ("before", "deferred", "after"):
        bitwise_equal(first[stage], second[stage])
    for name, mask in first["before"]["masks"].items():
        assert torch.equal(mask, first["deferred"]["masks"][name])
    assert any(not torch.equal(m, first["after"]["masks"][n]) for n, m in first["before"]["masks"].items())


def test_fsdp1_is_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Flat(FullyShardedDataParallel):  # wrapping a model in earnest needs a process group
        def __init__(self):
            nn.Module.__init__(self)
            self._fsdp_wrapped_module = nn.Linear(4, 4)

    with pytest.raises(SparsityError, match=r"FullyShardedDataParallel \(FSDP1\), which flattens weights"):
        Sparsifier(nn.ModuleList([Flat()]), METHODS["rigl"], sparsity=0.5)


# ---- Lightning -------------------------------------------------------------------------------------------------


def test_a_lightning_fit_of_two_ranks_equals_one_process(ranks):
    first, second = results(ranks, "lightning")
    bitwise_equal(first, second)
    module = nn.ModuleDict({"net": network()})  # masks are drawn by name
    sparsifier = Sparsifier(module, METHODS["rigl"], sparsity=0.7)
    steps(module["net"], optimizer_of(module, sparsifier), data(), clip=0.5)
    matches(first, snapshot(module, sparsifier))
