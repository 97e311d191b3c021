"""The benchmark of N:M masks compares ways that do the same, and says so in its table."""

import csv
from pathlib import Path

import pytest
import torch

from sparselearn import SparsityError
from sparselearn.recipes import bench_masks as bench
from sparselearn.structures import NM, TransposableNM


@pytest.mark.parametrize("choose", [bench.by_argsort, bench.by_topk])
def test_the_eager_masks_by_hand(choose):
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 5.0, 8.0, -7.0, 6.0]])
    assert choose(weight, 2, 4).tolist() == [[0, 1, 0, 1, 0, 1, 1, 0]]
    assert choose(weight, 1, 8).tolist() == [[0, 0, 0, 0, 0, 1, 0, 0]]
    conv = weight.view(1, 4, 1, 2)  # groups run over channels: (1, 2, 5, 7) and (4, 3, 8, 6)
    assert choose(conv, 2, 4).flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_the_patterns_are_all_and_choose_the_best_tile():
    tiles = bench.all_tiles()
    assert tiles.shape == (90, 4, 4)
    assert len(tiles.flatten(1).unique(dim=0)) == 90
    chosen = tiles[17]
    assert torch.equal(bench.by_patterns(chosen + 0.1, tiles), chosen)
    two = torch.stack([tiles[3], tiles[80]], 2).view(4, 4, 2, 1)  # another tile at each kernel position
    assert torch.equal(bench.by_patterns(two + 0.1, tiles), two)


def test_weights_have_no_equal_magnitudes():
    weight = bench.distinct((64, 32, 3, 3), torch.device("cpu"))
    assert len(weight.abs().unique()) == weight.numel()
    assert weight.min() < 0 < weight.max()


@pytest.mark.parametrize("structure", [NM(2, 4), TransposableNM(2, 4)])
def test_a_way_that_chooses_another_mask_is_refused(monkeypatch, structure):
    weight = bench.distinct((8, 8), torch.device("cpu"))
    first = torch.tensor([1.0, 1, 0, 0] * 2).expand(8, 8)
    transposable = torch.tensor([[1.0, 1, 0, 0]] * 2 + [[0.0, 0, 1, 1]] * 2).repeat(2, 2)
    wrong = first if isinstance(structure, NM) else transposable
    monkeypatch.setattr(bench, "eager", lambda *_: {"wrong": lambda _: wrong})
    with pytest.raises(SparsityError, match=r"and `wrong` choose different masks for shape \[8, 8\]"):
        bench.selections(structure, weight)


def test_a_step_that_does_other_work_is_refused(monkeypatch):
    weight = bench.distinct((8, 8), torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(bench.Official, "backward", staticmethod(lambda ctx, grad: (grad, None)))  # no decay
        with pytest.raises(SparsityError, match="and by `argsort` differ"):
            bench.steps(NM(2, 4), weight)
    monkeypatch.setattr(bench, "eager", lambda *_: {"inverted": lambda w: 1 - bench.by_topk(w, 2, 4)})
    with pytest.raises(SparsityError, match="by `inverted` differ"):
        bench.steps(NM(2, 4), weight)


def test_the_table_has_a_row_for_each_way(tmp_path: Path, capsys):
    out = tmp_path / "masks.csv"
    small = ["--shape", "16x32", "16x16x3x3", "--rounds", "2", "--least", "0"]
    small += ["--threads", str(torch.get_num_threads())]
    assert bench.main([*small, "--device", "cpu", "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * (5 * 3 + 2)  # shapes, works, patterns and ways
    assert {row["way"] for row in rows if row["pattern"] == "NM(4, 8)"} == {"ours", "argsort", "topk"}
    assert {row["way"] for row in rows if row["pattern"] == "TransposableNM(2, 4)"} == {"ours", "patterns"}
    assert all(float(row["ratio"]) == 1 for row in rows if row["way"] == "ours")
    assert all(row["hardware"] and row["torch"] == torch.__version__ and row["commit"] for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
