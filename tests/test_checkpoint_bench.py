"""recipes/bench_checkpoint.py: what it measures is what it says, on small models."""

import csv
import time
from pathlib import Path

import pytest
import torch

import sparselearn as sl
from sparselearn.checkpoint import inspect, load_state_dict

pytest.importorskip("safetensors", reason="checkpoints need safetensors")
pytest.importorskip("torchvision", reason="the table of sizes is of torchvision's ResNet-50")
bench = pytest.importorskip("sparselearn.recipes.bench_checkpoint")


def small(structure, sparsity):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(128, 256, 3), torch.nn.Linear(1024, 512)).bfloat16()
    sparsifier = sl.Sparsifier(
        model, sl.static(structure=structure), sparsity=sparsity, distribution=sl.distributions.uniform
    )
    return model.state_dict(), sparsifier.masks


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(("pattern", "limit"), [("90 %", 0.17), ("95 %", 0.115), ("2:4", 0.57)])
def test_every_format_is_written_and_ours_keeps_the_promised_size(tmp_path, pattern, limit):
    structure, sparsity = bench.PATTERNS[pattern]
    state, masks = small(structure, sparsity)
    sizes = {name: bench.size_of(path) for name, path in bench.in_formats(state, masks, tmp_path)}
    dense = sum(tensor.nbytes for tensor in state.values())
    assert sizes["sparselearn"] <= limit * dense
    assert dense < sizes["plain safetensors"] < 1.01 * dense
    assert sizes["sparselearn"] < sizes["torch.save of CSR, int32"] < sizes["torch.save of CSR, int64"]
    assert sizes["sparselearn"] < sizes["legacy sparse-bitmask, of matrices"]
    assert ("legacy sparse-24-bitmask, of matrices" in sizes) == (pattern == "2:4")
    loaded = load_state_dict(tmp_path / "sparse")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_csr_holds_the_same_weights():
    weight = torch.randn(6, 3, 2).masked_fill(torch.rand(6, 3, 2) < 0.7, 0)
    for index in (torch.int32, torch.int64):
        sparse = bench.csr(weight, index)
        assert sparse.col_indices().dtype == index
        assert torch.equal(sparse.to_dense(), weight.view(6, 6))


@pytest.mark.skipif(not hasattr(__import__("os"), "posix_fadvise"), reason="pages are dropped by posix_fadvise")
def test_tasks_store_and_load_the_filled_model(tmp_path):
    model = bench.transformer(torch.bfloat16, 0.026)
    assert sum(p.nbytes for p in model.parameters()) == pytest.approx(25e6, rel=0.01)
    masks = bench.fill(model, *bench.PATTERNS["90 %"])
    assert all(mask.float().mean() == pytest.approx(0.1, abs=0.001) for mask in masks.values())
    for save in bench.SAVING.values():
        save(model, masks, tmp_path)
    assert inspect(tmp_path / "sparse").sparsity == pytest.approx(0.9, abs=0.001)
    for task, call in bench.LOADING.items():
        other = bench.transformer(torch.bfloat16, 0.026)
        call(other, tmp_path)
        expected = 0 if task in ("verify_sparse", "map_plain") else 1  # these leave the model alone
        for a, b in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b * expected), task


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is started anew through /proc")
def test_a_call_takes_the_time_and_memory_that_it_takes():
    def function():
        time.sleep(0.05)
        torch.ones(8 << 20)  # 32 MiB

    for _ in range(2):  # the second does not hide behind the peak of the first
        found = bench.call(function)
        assert 0.05 < found["seconds"] < 5
        assert 33 < found["peak"] < 60


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is started anew through /proc")
def test_rows_compare_with_the_plain_file_in_the_same_cache():
    rows = {(row["task"], row["cache"]): row for row in bench.speed("bfloat16", "90 %", 0.026, 2)}
    assert list(rows) == bench.TASKS
    for (task, cache), row in rows.items():
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        if task in bench.BASELINE:
            plain = rows[bench.BASELINE[task], cache]["seconds"]
            assert row["of_plain"] == pytest.approx(row["seconds"] / plain, rel=0.3)  # seconds are rounded
        else:
            assert row["of_plain"] == ""


def test_new_rows_take_the_place_of_older_ones(tmp_path, capsys):
    out = tmp_path / "out.csv"
    for pattern, task, seconds in (("90 %", "save", 1), ("2:4", "save", 2), ("90 %", "save", 3)):
        bench.write([{"pattern": pattern, "task": task, "seconds": seconds}], out, ("pattern", "task"))
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(row["pattern"], row["seconds"]) for row in rows] == [("2:4", "2"), ("90 %", "3")]


def test_a_table_says_where_it_was_measured(tmp_path, capsys):
    bench.write([{"task": "save", "seconds": 1.5}], tmp_path / "out.csv")
    assert capsys.readouterr().out == "save  1.5000\n"
    (row,) = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert (row["task"], row["torch"]) == ("save", torch.__version__)
    assert {"cpu", "commit", "python"} <= row.keys()
