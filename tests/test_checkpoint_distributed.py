"""Sparse checkpoints of several processes: DDP, FSDP2, torch.distributed.checkpoint, Lightning; one spawn for all."""

import os
import socket
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_checkpoint_files import equal, network
from torch import nn
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from sparselearn import SparseOptimizer, Sparsifier, rigl, static
from sparselearn.checkpoint import inspect, load, load_masks, load_state_dict, save
from sparselearn.methods import sr_ste
from sparselearn.structures import NM

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

RANKS = 2
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (RANKS,))


def sharded(seed, method=None, **options):
    """A sharded model with masks that have followed their weights to the shards."""
    model = network(seed)
    sparsifier = Sparsifier(model, method or static(), **{"sparsity": 0.8} | options)
    fully_shard(model, mesh=mesh())
    return model, sparsifier, SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)


def whole(model):
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}


def step(model, optimizer, steps=3):
    for i in range(steps):
        torch.manual_seed(i)
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()


def fsdp_model(rank, folder):
    """A model is saved from its shards, and loaded into those of another."""
    model, sparsifier, optimizer = sharded(0, rigl(stop=100, every=2))
    step(model, optimizer)
    save(model, folder / "sparse", masks=sparsifier)
    dist.barrier()
    other, again, next_steps = sharded(1, rigl(stop=100, every=2))
    step(other, next_steps, 1)
    masks = load(folder / "sparse", other, "masked", sparsifier=again)
    assert equal(whole(other), whole(model))
    assert equal(masks, load_masks(folder / "sparse"))
    step(other, next_steps, 1)  # training goes on
    zero = [bool((whole(other)[name][~mask.full_tensor()] == 0).all()) for name, mask in again.masks.items()]
    assert all(zero)
    return whole(model), {name: mask.full_tensor() for name, mask in sparsifier.masks.items()}


def straight_through(rank, folder):
    """The forward weights of sharded dense weights."""
    model, sparsifier, optimizer = sharded(0, sr_ste(NM(2, 4, dim=1)), sparsity=None)
    step(model, optimizer)
    save(model, folder / "sparse", masks=sparsifier)
    return whole(model), {name: mask.full_tensor() for name, mask in sparsifier.masks.items()}


def state_dict(rank, folder):
    """A sharded state dict is saved; what is loaded goes into shards by torch's own function."""
    model, sparsifier, optimizer = sharded(0)
    step(model, optimizer)
    save(get_model_state_dict(model), folder / "sparse", masks=sparsifier.masks)
    dist.barrier()
    other, *_ = sharded(1)
    set_model_state_dict(other, load_state_dict(folder / "sparse"), options=FULL)
    assert equal(whole(other), whole(model))
    return whole(model), {name: mask.full_tensor() for name, mask in sparsifier.masks.items()}


def distributed_checkpoint(rank, folder):
    """Shards -> torch.distributed.checkpoint -> other shards -> sparse -> dense -> the same again."""
    model, sparsifier, optimizer = sharded(0)
    step(model, optimizer)
    dcp_save(get_model_state_dict(model), checkpoint_id=folder / "dcp")
    other, *_ = sharded(1)
    state = get_model_state_dict(other)
    dcp_load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state)
    save(other, folder / "sparse", masks=sparsifier)
    dist.barrier()
    dcp_save(load_state_dict(folder / "sparse"), checkpoint_id=folder / "dcp_again")  # whole tensors
    third, *_ = sharded(2)
    state = get_model_state_dict(third)
    dcp_load(state, checkpoint_id=folder / "dcp_again")
    set_model_state_dict(third, state)
    assert equal(whole(third), whole(model))
    return whole(model), {name: mask.full_tensor() for name, mask in sparsifier.masks.items()}


def data_parallel(rank, folder):
    """Rank 0 saves alone: unsharded models need no other process."""
    model = network()
    sparsifier = Sparsifier(model, static(), sparsity=0.8)
    parallel = nn.parallel.DistributedDataParallel(model)
    if rank == 0:
        save(parallel, folder / "sparse", masks=sparsifier)
    dist.barrier()
    other = nn.parallel.DistributedDataParallel(network(1))
    load(folder / "sparse", other)
    assert equal(other.module.state_dict(), model.state_dict())
    return model.state_dict(), sparsifier.masks


def lightning(rank, folder):
    """Both ranks train; rank 0 writes."""
    import pytorch_lightning as pl
    from test_checkpoint_lightning import Scored
    from test_lightning import batches, loader

    from sparselearn.lightning import SparsityCallback

    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(RANKS)}
    module = Scored([2.0, 1.0, 3.0])
    callback = SparsityCallback(sr_ste(NM(2, 4)), save=folder)
    saver = pl.callbacks.ModelCheckpoint(folder, "dense", monitor="score")
    trainer = pl.Trainer(
        strategy="ddp", devices=RANKS, accelerator="cpu", callbacks=[callback, saver], max_epochs=3, logger=False,
        enable_model_summary=False, enable_progress_bar=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(batches(4, seed=rank)), loader(batches(1)))
    assert trainer.world_size == RANKS
    last = load_state_dict(folder / "last")  # all wait until it is there
    assert equal(last, module.state_dict())
    assert equal(load_state_dict(folder / "best"), module.seen[1])
    dist.barrier()
    if rank == 0:
        (folder / "last").rename(folder / "sparse")
    return last, callback.sparsifier.masks


SCENARIOS = (fsdp_model, straight_through, state_dict, distributed_checkpoint, data_parallel, lightning)


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
    }  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    out = {}
    for scenario in SCENARIOS:
        try:
            out[scenario.__name__] = scenario(rank, folder / scenario.__name__)
        except Exception:
            out[scenario.__name__] = traceback.format_exc()
        dist.barrier()
    torch.save(out, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for scenario in SCENARIOS:
        (folder / scenario.__name__).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(worker, args=(port, folder), nprocs=RANKS, start_method="spawn")
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_two_processes_save_what_they_hold_together(ranks, scenario):
    folder, results = ranks
    for rank, result in enumerate(results):
        found = result[scenario.__name__]
        assert not isinstance(found, str), f"rank {rank}: {found}"
        state, masks = found
        path = folder / scenario.__name__ / "sparse"
        assert equal(load_state_dict(path), state)
        assert equal(load_masks(path), masks)
        assert {info.name for info in inspect(path).weights if info.masked} == set(masks)


def test_shards_and_a_model_that_never_was_sharded_give_the_same_checkpoint(ranks, tmp_path):
    model = network()
    sparsifier = Sparsifier(model, sr_ste(NM(2, 4, dim=1)))
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
    step(model, optimizer)
    save(model, tmp_path, masks=sparsifier)
    together = ranks[0] / "straight_through" / "sparse"
    assert equal(load_masks(together), load_masks(tmp_path))
    for name, tensor in load_state_dict(together).items():
        torch.testing.assert_close(tensor, load_state_dict(tmp_path)[name])
