"""Recipes end to end: what a run leaves behind, exact resume, sweeps, and the data readers."""

import gzip
import json
import signal
import statistics
import struct
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparselearn import SparsityError
from sparselearn.config import load
from sparselearn.recipes import data, models, table
from sparselearn.recipes import train as training
from sparselearn.recipes.data import Batches, Chunks, read_idx
from sparselearn.recipes.sweep import sweep
from sparselearn.recipes.train import Classifier, train

STEPS = "max_steps=50"
METHODS = {
    "dense": ["variant=dense"],
    "static": ["variant=static"],
    "set": ["variant=set", "method.every=5"],
    "rigl": ["method.every=5"],
    "srigl": ["variant=srigl", "method.every=5"],
    "nm": ["variant=nm"],
    "gmp": ["variant=gmp", "method.every=5", "method.start=5"],
    "rigl-accumulate": ["method.every=5", "accumulate=2"],
}

TIMES = {"seconds": 0, "examples_per_second": None}


def run(out, *changes, resume=False):
    return train(load("digits", [STEPS, *changes]), out, resume=resume, progress=False)


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=False)["model"]


def interrupt_at(monkeypatch, batch):
    """A Ctrl-C during this micro-batch of the next run."""
    seen, original = [], Classifier.training_step

    def step(self, *args):
        seen.append(0)
        if len(seen) == batch:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(Classifier, "training_step", step)


# ---- one run -------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_behind(tmp_path):
    result = run(tmp_path, "method.every=10", "eval_every=25")
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.yaml", "versions.json", "metrics.csv", "last.ckpt", "model.pt", "result.json"
    }  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (result["nnz"], result["parameters"], result["steps"]) == (2852, 26122, 50)
    assert result["sparsity"] == 1 - (2852 - 266) / (26122 - 266)
    # Updates at steps 10, 20 and 30 (stop = 37) need the dense gradient: 2 * d + 1 instead of 3 * d.
    d = (2852 - 266) / (26122 - 266)  # every operation of an MLP is a weight's
    assert result["training_flops"] == pytest.approx((47 * 3 * d + 3 * (2 * d + 1)) / 150)
    names = {line.split(",")[1] for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]}
    assert names >= {"train_loss", "test_accuracy"}
    assert any(name.startswith("sparsity/") for name in names)
    sparse = sum(int((w != 0).sum()) for name, w in weights(tmp_path).items() if name.endswith("weight"))
    assert sparse <= 2852 - 266  # 266 biases


@pytest.mark.parametrize("eval_every", [0, 20, 25, 100])
def test_the_accuracy_reported_is_the_saved_models(tmp_path, eval_every):
    result = run(tmp_path, "variant=static", f"eval_every={eval_every}")
    split, network = data.digits(), models.mlp([64, 128, 128, 10])
    network.load_state_dict(weights(tmp_path))
    truth = (network(split.test_x).argmax(1) == split.test_y).float().mean().item()
    assert result["test_accuracy"] == pytest.approx(truth, abs=1e-6)


def test_equal_seeds_give_equal_runs(tmp_path):
    first, second, _ = (
        run(tmp_path / n, "method.every=5", s) for n, s in [("a", "seed=1"), ("b", "seed=1"), ("c", "seed=2")]
    )
    assert first["test_accuracy"] == second["test_accuracy"]
    a, b, c = (weights(tmp_path / n) for n in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_a_compiled_run_is_the_same_run(tmp_path, monkeypatch):
    """Mask updates change parameters in place: nothing is compiled again, and evaluation is not compiled at all."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    run(tmp_path / "eager", "method.every=5")
    assert not graphs
    run(tmp_path / "compiled", "method.every=5", "compile=true", "eval_every=20")
    assert graphs == [True]
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert all(torch.equal(eager[name], compiled[name]) for name in eager | compiled)


def test_what_a_run_holds_and_costs_is_told(tmp_path):
    """Of 26,122 float32 parameters 25,856 are masked; SGD keeps a momentum for each."""
    result = run(tmp_path / "rigl", "method.every=10")
    assert result["parameter_mb"] == result["optimizer_mb"] == pytest.approx(4 * 26_122 / 1e6, abs=6e-4)
    assert result["size_mb"] == pytest.approx((4 * 2852 + 25_856 / 8) / 1e6)
    assert result["inference_flops"] == pytest.approx(1 - result["sparsity"])
    assert result["examples_per_second"] > 64
    nm = run(tmp_path / "nm", "variant=nm")
    assert nm["parameter_mb"] == pytest.approx(4 * (26_122 + 25_856) / 1e6, abs=6e-4)  # and the dense weights
    assert nm["training_flops"] == pytest.approx((2 * 0.5 + 1) / 3)  # the gradient of every weight on every step


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen += any(word in str(operation) for word in ("local_scalar", "nonzero", "masked_select", "is_nonzero"))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["dense", "static", "set", "rigl", "srigl"])
def test_an_ordinary_step_never_waits_for_the_device(tmp_path, monkeypatch, variant):
    waits, original = Waits(), Classifier.training_step

    def step(self, batch, index):
        if index == 6:
            waits.__enter__()
        if index == 16:
            waits.__exit__(None, None, None)
        return original(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", step)
    updates = [] if variant in ("dense", "static") else ["method.every=4", "method.start=4", "method.stop=5"]
    rate = "schedule.fn=sparselearn.recipes.rates.constant"  # the cosine is a number that torch computes on the CPU
    run(tmp_path, f"variant={variant}", "eval_every=0", rate, *updates)
    assert waits.seen == 0


# ---- interrupted runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "eval_every"), [*((name, 0) for name in METHODS), ("rigl", 10), ("nm", 10)])
def test_an_interrupted_run_goes_on_exactly(name, eval_every, tmp_path, monkeypatch):
    changes = [*METHODS[name], f"eval_every={eval_every}"]
    whole = run(tmp_path / "whole", *changes)
    for batch in (5, 6, 11) if name == "rigl" else (11,):  # before, at and after updates
        folder = tmp_path / f"at{batch}"
        with monkeypatch.context() as patch:
            interrupt_at(patch, batch)
            stopped = run(folder, *changes)
        assert stopped == {"interrupted": True, "step": -(-batch // (2 if "accumulate" in name else 1))}
        assert not (folder / "result.json").exists()
        resumed = run(folder, *changes, resume=True)
        a, b = weights(tmp_path / "whole"), weights(folder)
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert whole | TIMES == resumed | TIMES


@pytest.mark.parametrize("name", ["rigl", "nm", "rigl-accumulate"])
def test_a_killed_run_goes_on_from_its_last_evaluation(name, tmp_path, monkeypatch):
    changes = [*METHODS[name], "eval_every=10"]
    whole = run(tmp_path / "whole", *changes)
    original, seen = Classifier.training_step, []

    def step(self, *args):
        seen.append(0)
        if len(seen) == 27 * (2 if "accumulate" in name else 1):
            raise MemoryError("killed")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", step)
        with pytest.raises(MemoryError):
            run(tmp_path / "part", *changes)
    saved = torch.load(tmp_path / "part" / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 20
    resumed = run(tmp_path / "part", *changes, resume=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert whole | TIMES == resumed | TIMES
    assert not list((tmp_path / "part").glob("*.tmp"))


def test_a_finished_run_may_be_resumed(tmp_path):
    whole = run(tmp_path, "variant=static")
    (tmp_path / "result.json").unlink()  # killed between the last checkpoint and the result
    assert run(tmp_path, "variant=static", resume=True) | TIMES == whole | TIMES


def test_another_configuration_is_not_resumed(tmp_path):
    run(tmp_path, "variant=static")
    with pytest.raises(SparsityError, match="holds a run with another configuration"):
        run(tmp_path, "variant=static", "seed=5", resume=True)


# ---- sweeps --------------------------------------------------------------------------------------------------


def counting(monkeypatch):
    """The folders that are trained from now on."""
    from sparselearn.recipes import sweep as sweeping

    trained = []

    def record(config, folder, **options):
        trained.append(folder.name)
        return train(config, folder, **options)

    monkeypatch.setattr(sweeping, "train", record)
    return trained


def test_a_sweep_never_repeats_a_finished_run(tmp_path, monkeypatch):
    grid = {"variant": ["dense", "static"], "seed": ["0", "1"], "max_steps": ["50"]}
    trained = counting(monkeypatch)
    sweep("digits", grid, tmp_path, progress=False)
    assert len(trained) == 4
    lost = tmp_path / "variant=static,seed=1,max_steps=50"
    (lost / "result.json").unlink()
    trained.clear()
    rows = sweep("digits", grid, tmp_path, progress=False)
    assert trained == [lost.name]
    assert len(rows) == 4
    assert {"results.csv", "results.md", "results.png"} <= {p.name for p in tmp_path.iterdir()}
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[0] == (
        "| variant | n | test accuracy, % | test loss | sparsity, % | nonzero parameters | training FLOPs / dense "
        "| seconds |"
    )
    assert lines[2].startswith("| dense | 2 | ")
    assert "| 0.000 | 26,122 | 1.000 |" in lines[2]
    assert lines[3].startswith("| static | 2 | ")
    assert "| 89.998 | 2,852 | 0.100 |" in lines[3]
    accuracies = [100 * row["test_accuracy"] for row in rows[:2]]
    spread = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
    losses = [row["test_loss"] for row in rows[2:]]
    assert f"| dense | 2 | {spread} |" in lines[2]
    assert f" | {statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f} | 89.998" in lines[3]
    assert lines[-2:] == ["", "    sparselearn sweep digits variant=dense,static seed=0,1 max_steps=50"]
    assert "digits, 50 optimizer steps, " in lines[-3]
    assert f"commit {rows[0]['commit']}" in lines[-3] or rows[0]["hardware"] in lines[-4]


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch):
    grid = {"variant": ["dense", "static"], "max_steps": ["50"]}
    with monkeypatch.context() as patch:
        interrupt_at(patch, 70)  # within the second run
        with pytest.raises(KeyboardInterrupt):
            sweep("digits", grid, tmp_path, progress=False)
    text = (tmp_path / "results.md").read_text()  # of what is finished
    assert "1 of 2 cells are not finished. Mean" in text
    assert "| dense | 1 | " in text
    assert "static | 1 |" not in text
    trained = counting(monkeypatch)
    assert len(sweep("digits", grid, tmp_path, progress=False)) == 2
    assert trained == ["variant=static,max_steps=50"]
    assert "not finished" not in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(("named", "devices", "wanted"), [
    ("3,5", "1", ["3", "3", "5", "5"]),
    ("3,5", "2", ["3,5"] * 4),  # a run on both sees both
    (None, "1", ["0", "0", "1", "1"]),
])  # fmt: skip
def test_runs_at_a_time_are_spread_over_the_gpus(tmp_path, monkeypatch, named, devices, wanted):
    from sparselearn.recipes import sweep as sweeping

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named or "")
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sweeping.torch.cuda, "device_count", lambda: 2)
    seen, started = [], threading.Barrier(4, timeout=60)

    def run(command, *, env, **_):
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        started.wait()  # all four are under way at once
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweeping.subprocess, "run", run)
    grid = {"seed": ["0", "1", "2", "3"], "devices": [devices]}
    assert sweep("digits", grid, tmp_path, jobs=4, progress=False) == []
    assert sorted(seen) == wanted


def test_a_mode_of_compile_is_handed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda network, mode: asked.append(mode) or network)
    for value in ("false", "true", "reduce-overhead"):
        Classifier(load("digits", [f"compile={value}"]))
    assert asked == [None, "reduce-overhead"]


def test_a_sweep_over_lengths_names_them_all(tmp_path):
    sweep("digits", {"variant": ["static"], "max_steps": ["60", "50"]}, tmp_path, progress=False)
    assert "digits, 50 or 60 optimizer steps, " in (tmp_path / "results.md").read_text()


def test_long_names_of_cells_are_cut_and_stay_apart(tmp_path):
    from sparselearn.recipes import sweep as sweeping

    cells = [{"exclude": "ä" * 150, "seed": str(seed)} for seed in (0, 1)]
    folders = [sweeping.folder_of(tmp_path, cell) for cell in cells]
    assert folders[0] != folders[1]
    for folder in folders:
        folder.mkdir()
        assert len(folder.name.encode()) <= sweeping.LONGEST
    assert sweeping.folder_of(tmp_path, {"a": "b/c"}).name == "a=b_c"


def test_a_wrong_cell_stops_a_sweep_before_it_trains(tmp_path, monkeypatch):
    trained = counting(monkeypatch)
    with pytest.raises(SparsityError, match="has no variant `rgl`"):
        sweep("digits", {"variant": ["dense", "rgl"]}, tmp_path, progress=False)
    sweep("digits", {"variant": ["static"], STEPS.split("=")[0]: ["50"]}, tmp_path, progress=False)
    trained.clear()
    folder = tmp_path / "variant=static,max_steps=50"
    (folder / "config.yaml").write_text("name: other\n")
    with pytest.raises(SparsityError, match="another configuration"):
        sweep("digits", {"variant": ["dense", "static"], "max_steps": ["50"]}, tmp_path, progress=False)
    assert trained == []


def test_dense_at_two_sparsities_is_one_run_and_counts_once(tmp_path, monkeypatch):
    grid = {"variant": ["dense", "static"], "sparsity": ["0.8", "0.9"], "seeds": ["3"], "max_steps": ["50"]}
    trained = counting(monkeypatch)
    sweep("digits", grid, tmp_path, progress=False)
    assert len(trained) == 3
    assert trained[0] == "variant=dense,sparsity=0.8,seed=3,max_steps=50"  # `seeds` is `seed`
    rows = [line.split(" | ")[:3] for line in (tmp_path / "results.md").read_text().splitlines()[2:6]]
    assert rows == [[f"| {v}", s, "1"] for v in ("dense", "static") for s in ("0.8", "0.9")]
    found = table.group(table.read(tmp_path / "results.csv"), ["variant"])
    assert [(g.keys, len(g.rows)) for g in found] == [(("dense",), 1), (("static",), 2)]
    trained.clear()
    sweep("digits", grid | {"sparsity": ["0.9", "0.8"]}, tmp_path, progress=False)
    assert trained == []


# ---- data and models -----------------------------------------------------------------------------------------


def idx(shape, body):
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + body


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read(tmp_path, packed):
    path = tmp_path / ("x.gz" if packed else "x")
    content = idx((2, 3), bytes(range(6)))
    path.write_bytes(gzip.compress(content) if packed else content)
    read = read_idx(path)
    assert read.dtype == torch.uint8
    assert read.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x", b"", "is not an IDX file of unsigned bytes"),
        ("x", b"\0\0\x0d\x01\0\0\0\x01aaaa", "is not an IDX file of unsigned bytes"),  # floats
        ("x", b"\0\0\x08\x03\0\0", "is not an IDX file of unsigned bytes"),  # cut within the header
        ("x", idx((5,), b"ab"), r"says \(5,\) but holds 2 bytes"),
        ("x.gz", b"junk", "cannot be unpacked"),
        ("x.gz", gzip.compress(idx((5,), b"abcde"))[:-9], "cannot be unpacked"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SparsityError, match=text):
        read_idx(tmp_path / name)


def test_fashion_mnist_is_found_in_torchvisions_layout(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 6), ("t10k", 2)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx((n, 28, 28), bytes(i % 256 for i in range(n * 784))))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((n,), bytes(range(n)))))
    split = data.fashion_mnist(str(tmp_path))
    assert split.train_x.shape == (6, 1, 28, 28)
    assert split.test_y.tolist() == [0, 1]
    assert split.train_x.mean().item() == pytest.approx(0, abs=1e-5)
    assert split.train_x.std().item() == pytest.approx(1)


def test_digits_are_split_the_same_way_each_time():
    split = data.digits()
    assert (split.train_x.shape, split.test_x.shape) == ((1437, 64), (360, 64))
    assert torch.equal(split.test_x, data.digits().test_x)
    assert split.test_y.bincount().min() >= 34  # stratified
    assert data.digits(flat=False).train_x.shape == (1437, 1, 8, 8)


def test_batches_depend_on_seed_and_step_alone():
    x = torch.arange(10)
    whole = [b.tolist() for b, _ in Batches(x, x, 3, 8, seed=1)]
    assert len(whole) == 8
    assert all(len({v for batch in whole[i : i + 3] for v in batch}) == 9 for i in (0, 3))
    late = Batches(x, x, 3, 8, seed=1)
    late.load_state_dict({"position": 5})
    assert [b.tolist() for b, _ in late] == whole[5:]
    assert [b.tolist() for b, _ in Batches(x, x, 3, 8, seed=2)] != whole
    ranks = [[b.tolist() for b, _ in Batches(x, x, 3, 8, 1, rank, 2)] for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(b) for b in whole]


def test_chunks_hold_every_example_once():
    x = torch.arange(7)
    chunks = Chunks(x, x, 3)
    assert len(chunks) == 3
    assert torch.cat([c for c, _ in chunks]).equal(x)


@pytest.mark.parametrize(
    ("network", "shape", "parameters"),
    [
        (models.mlp, (2, 64), 85_002),
        (models.lenet5, (2, 1, 28, 28), 431_080),
        (models.resnet, (2, 1, 28, 28), 272_186),
    ],
)
def test_networks(network, shape, parameters):
    model = network()
    assert model(torch.randn(shape)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)


def test_a_half_written_result_is_never_seen(tmp_path, monkeypatch):
    training.write(tmp_path / "result.json", "old")
    monkeypatch.setattr(training.Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        training.write(tmp_path / "result.json", "new")
    assert (tmp_path / "result.json").read_text() == "old"
