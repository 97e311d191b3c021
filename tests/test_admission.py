"""The one test that every method of the library passes: exact at every step, whatever the optimizer and precision,
with accumulated gradients, after a resume, and on two processes."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from method_list import METHODS, OPTIMIZERS, STEPS, Case, assert_equal, backward, batch, build, snapshot, train
from torch import nn

import sparselearn as sl
from sparselearn.distributions import uniform
from sparselearn.wrappers import NestedSubnets

RANKS = 2


def assert_exact(model: nn.Module, sparsifier: sl.Sparsifier, optimizer: sl.SparseOptimizer, case: Case) -> None:
    """Counts, structure, zeros outside of the mask; straight-through: the projection of the dense weights."""
    method = case.method
    now = snapshot(model, sparsifier)
    for name, mask in now["masks"].items():
        layer, weight = sparsifier.state.layers[name], now["weights"][name]
        assert int(mask.sum()) == layer.nnz == now["nnz"][name] > 0
        assert layer.support is None or not (mask & ~layer.support).any()
        assert weight.isfinite().all()
        structure = method.structure
        if case.straight_through:
            structure = method.structure_at(layer.step)
            view = sl.Layer(name, now["dense"][name], None, mask, {}, layer.step, torch.Generator())
            assert torch.equal(weight, method.forward_weights(view))
            if method.residual(layer.step) != 0:
                continue
        assert not weight[~mask].any()
        if structure is not None:
            structure.check(mask, layer.nnz)
        for key, slot in optimizer.state[model.get_parameter(name)].items():
            if torch.is_tensor(slot) and slot.shape == mask.shape and method.optimizer_state != "keep":
                assert not slot[~mask].any(), key


def assert_budget(sparsifier: sl.Sparsifier, case: Case) -> None:
    """The density at the end is what was asked for."""
    if case.sparsity is None:
        return
    size = sum(mask.numel() for mask in sparsifier.masks.values())
    slack = sum(len(mask) for mask in sparsifier.masks.values())  # constant fan-in rounds down by row
    loose = isinstance(case.method.structure, sl.ConstantFanIn | sl.Block)
    assert abs(sparsifier.nnz - round((1 - case.sparsity) * size)) <= (slack if loose else 0)


# ---- optimizers and precisions -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_exact_at_every_step(name, optimizer_name):
    case = METHODS[name]
    model, sparsifier, optimizer = build(case, optimizer_name)
    assert_exact(model, sparsifier, optimizer, case)
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        assert_exact(model, sparsifier, optimizer, case)
    assert sparsifier.step == STEPS
    assert_budget(sparsifier, case)


@pytest.mark.parametrize("name", METHODS)
def test_exact_in_bf16_autocast_and_in_bf16(name):
    case = METHODS[name]
    for dtype in (torch.float32, torch.bfloat16):
        model, sparsifier, optimizer = build(case, "adamw-fused", dtype)
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                x, y = batch(step, dtype)
                loss = nn.functional.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()
            assert_exact(model, sparsifier, optimizer, case)
        assert_budget(sparsifier, case)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_grad_scaler_skips_changes_nothing(name):
    """In fp16 with an overflow on step 3, an update step of most methods: that step counts for nothing."""
    case = METHODS[name]
    model, sparsifier, optimizer = build(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    taken = 0
    for attempt in range(STEPS + 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            x, y = batch(attempt)
            loss = nn.functional.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        before = snapshot(model, sparsifier)
        if attempt == 3:
            model[3].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        optimizer.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if attempt == 3:
            assert_equal(snapshot(model, sparsifier), before)
            assert sparsifier.step == before["step"] == 3
        taken += attempt != 3
        assert sparsifier.step == taken
        assert_exact(model, sparsifier, optimizer, case)
    assert_budget(sparsifier, case)


# ---- accumulation ------------------------------------------------------------------------------------------

PER_FORWARD = {"g2gnet"}  # running means over forward passes see two halves where they saw one whole


def assert_close(a: dict, b: dict) -> None:
    """Masks to the bit, weights to rounding."""
    assert a["step"] == b["step"]
    assert a["nnz"] == b["nnz"]
    for name, mask in a["masks"].items():
        assert torch.equal(mask, b["masks"][name]), name
    for part in ("weights", "dense"):
        for name, value in a[part].items():
            torch.testing.assert_close(value, b[part][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - PER_FORWARD))
def test_two_micro_batches_equal_one_batch(name):
    """In double precision, so that the other order of a sum tips no mask."""
    whole, whole_sparsifier, whole_optimizer = build(METHODS[name], dtype=torch.float64)
    train(whole, whole_optimizer)
    model, sparsifier, optimizer = build(METHODS[name], dtype=torch.float64)
    train(model, optimizer, parts=2)
    assert_close(snapshot(model, sparsifier), snapshot(whole, whole_sparsifier))


# ---- resume ------------------------------------------------------------------------------------------------


def saved_run(case: Case) -> tuple[list[dict], dict]:
    """What could be saved before every step, and the end."""
    model, sparsifier, optimizer = build(case, "adamw-fused")
    saved = []
    for step in range(STEPS):
        with sparsifier.dense_weights():
            saved.append(copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
        train(model, optimizer, step, step + 1)
    return saved, snapshot(model, sparsifier)


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_exact_from_every_awkward_step(name):
    """Before an update or a switch (3, 6, 9), right after one (4), at the start of a stage (8), and before the last."""
    saved, end = saved_run(METHODS[name])
    for at in (3, 4, 6, 8, 9, 11):
        model, sparsifier, optimizer = build(METHODS[name], "adamw-fused", seed=99)
        with sparsifier.dense_weights():
            model.load_state_dict(saved[at]["model"])
        optimizer.load_state_dict(copy.deepcopy(saved[at]["optimizer"]))
        train(model, optimizer, at)
        resumed = snapshot(model, sparsifier)
        assert_equal(resumed, end)
        for layer, memory in end["memory"].items():
            assert_equal({"memory": resumed["memory"][layer]}, {"memory": memory}, ("memory",))


# ---- two processes -----------------------------------------------------------------------------------------


def worker(rank: int, port: int, folder: str) -> None:
    """One of two gloo processes: all methods in one go, each on its half of every batch."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    out = {}
    for name, case in METHODS.items():
        model, sparsifier, optimizer = build(case, "adamw-fused", torch.float64)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = batch(step, torch.float64)
            backward(wrapped, (x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]))
            optimizer.step()
        out[name] = snapshot(model, sparsifier)
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(worker, args=(port, str(folder)), nprocs=RANKS, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name, ranks):
    first, second = (rank[name] for rank in ranks)
    assert_equal(first, second)
    model, sparsifier, optimizer = build(METHODS[name], "adamw-fused", torch.float64)
    start = snapshot(model, sparsifier)
    train(model, optimizer)
    end = snapshot(model, sparsifier)
    assert_close(first, end)
    still = all(torch.equal(mask, end["masks"][key]) for key, mask in start["masks"].items())
    assert still == (name in {"static", "static-fan-in", "static-reinit", "asp"})


# ---- wrappers ----------------------------------------------------------------------------------------------


def nested_run(start: dict | None, first: int, last: int) -> tuple[NestedSubnets, dict]:
    """Three subnets trained jointly; masks are refreshed after steps 3, 6 and 9."""
    model, sparsifier, _ = build(Case(sl.static(structure=sl.ConstantFanIn()), {"distribution": uniform}, 0.5))
    nested = NestedSubnets(model, sparsifier, [0.5, 0.25, 0.1])
    optimizer = sl.SparseOptimizer(torch.optim.AdamW(nested.parameters(), lr=0.01), sparsifier)
    if start is not None:
        nested.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
    for step in range(first, last):
        optimizer.zero_grad()
        x, y = batch(step)
        (sum(nn.functional.cross_entropy(nested(x, subnet=k), y) for k in range(3)) / 3).backward()
        optimizer.step()
        if step % 3 == 0 and step > 0:
            nested.refresh()
        for name in sparsifier.masks:
            wide, middle, thin = (nested.masks(k)[name] for k in range(3))
            assert not (thin & ~middle).any()
            assert not (middle & ~wide).any()
            assert torch.equal(wide, sparsifier.masks[name])
            assert all(len(mask.flatten(1).sum(1).unique()) == 1 for mask in (wide, middle, thin))
    return nested, copy.deepcopy({"model": nested.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("at", [4, 5])
def test_nested_subnets_resume_bit_exactly(at):
    nested, _ = nested_run(None, 0, STEPS)
    resumed, _ = nested_run(nested_run(None, 0, at)[1], at, STEPS)
    for (name, value), other in zip(nested.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other), name
    for k in range(3):
        assert all(torch.equal(mask, resumed.masks(k)[name]) for name, mask in nested.masks(k).items())
