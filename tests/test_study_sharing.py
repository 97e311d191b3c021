"""The study of shared fan-ins: its ways to rank and to group, by hand, and that its runs end in a table."""

import csv
import multiprocessing
import queue

import pytest
import torch

from sparselearn import SparsityError
from sparselearn import config as configs
from sparselearn.criteria import Layer
from sparselearn.recipes import study_sharing as study
from sparselearn.structures import ConstantFanIn


def layer(grad):
    grad = torch.tensor(grad)
    return Layer("w", torch.zeros_like(grad), grad, torch.ones_like(grad, dtype=torch.bool), {}, 0, torch.Generator())


def test_ways_to_rank_by_hand():
    score = torch.tensor([[3.0, 2.0, 0.0, 2.5], [0.0, 2.0, 3.5, 2.0]])  # sums 3, 4, 3.5, 4.5; largest 3, 2, 3.5, 2.5
    chosen = {
        power: study.PooledFanIn(2, power=power).pool(score)[0].argmax() for power in ("sum", "squares", "largest")
    }
    assert chosen == {"sum": 3, "squares": 2, "largest": 2}
    pooled = study.PooledFanIn(2, power="largest").pool(score)
    assert pooled.tolist() == [[3.0, 2.0, 3.5, 2.5]] * 2
    assert study.PooledFanIn(2, power="squares").pool(score)[1].tolist() == [4.5, 4.0, 6.125, 5.125]
    assert torch.equal(study.PooledFanIn(2).pool(score), ConstantFanIn(2).pool(score))
    lost = torch.cat([score, torch.full((1, 4), -torch.inf)])  # a row that takes no part stays so
    assert study.PooledFanIn(3, power="largest").pool(lost)[2].tolist() == [-torch.inf] * 4


def test_gradients_of_a_group_may_cancel():
    growth = study.coherent_gradient(2)(layer([[1.0, 2.0], [-3.0, 1.0], [5.0, -1.0]]))
    assert growth.tolist() == [[2.0, 3.0], [2.0, 3.0], [5.0, 1.0]]


def test_similar_rows_find_each_other():
    generator = torch.Generator().manual_seed(0)
    score = 0.1 * torch.rand(12, 30, generator=generator)
    kinds = torch.arange(12) % 3  # neighbours never want the same
    for row, kind in enumerate(kinds):
        score[row, 10 * kind : 10 * kind + 5] += 1
    group = study.assign(score, 4, 5)
    assert all(len(group[kinds == kind].unique()) == 1 for kind in range(3))
    structure = study.SimilarFanIn(4)
    mask = structure.topk(score, 60)
    structure.check(mask, 60)
    assert all(mask[row, 10 * kind : 10 * kind + 5].all() for row, kind in enumerate(kinds))
    with pytest.raises(SparsityError):
        ConstantFanIn(4).check(mask, 60)
    neighbours = ConstantFanIn(4).topk(score, 60)
    structure.check(neighbours, 60)
    wrong = neighbours.clone()
    wrong[0] = wrong[0].roll(1)
    with pytest.raises(SparsityError, match="4 rows of every kind"):
        structure.check(wrong, 60)
    # Pruning on: the groups stay, whatever the scores are now.
    later = torch.rand(12, 30, generator=generator).masked_fill(~mask, -torch.inf)
    fewer = structure.topk(later, 36)
    structure.check(fewer, 36)
    assert not bool((fewer & ~mask).any())
    assert [len(fewer[kinds == kind].unique(dim=0)) for kind in range(3)] == [1, 1, 1]


def test_an_assignment_never_keeps_less_than_neighbours():
    generator = torch.Generator().manual_seed(1)
    for rows in (16, 18):  # 18 = 4 groups of 4 and one of 2
        score = torch.rand(rows, 40, generator=generator) ** 4
        score /= score.sum(1, keepdim=True)
        group = study.assign(score, 4, 6)
        assert sorted(group.bincount().tolist()) == [4] * (rows // 4) if rows == 16 else [2, 4, 4, 4, 4]

        def kept(groups, score=score):
            sums = torch.zeros(-(-len(score) // 4), 40).index_add_(0, groups, score)
            return float(sums.topk(6).values.sum())

        assert kept(group) >= kept(torch.arange(rows) // 4)


def test_every_cell_is_a_run_of_its_own():
    cells = study.cells()
    assert len({str(cell.labels) for cell in cells}) == len({cell.changes for cell in cells}) == len(cells)
    for cell in cells[::3]:  # three seeds each
        config = configs.load(study.RECIPE, [*study.BASE, *cell.changes])
        assert config.max_steps == 936
        assert config.density_scaling == (cell.labels["method"] not in ("dense", "sr_ste", "gmp"))
        method = configs.build("method", config.method) if config.method else None
        assert getattr(getattr(method, "structure", None), "group", "") == cell.labels["group"]


@pytest.fixture
def tiny(tmp_path):
    """Settings for runs of seconds, on a data set of the right form."""
    pixels = torch.Generator().manual_seed(0)
    for part, n in (("train", 64), ("t10k", 32)):
        images = torch.randint(0, 256, (n * 28 * 28,), generator=pixels, dtype=torch.uint8).numpy().tobytes()
        header = b"\x00\x00\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (n, 28, 28))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + images)
        labels = bytes(i % 10 for i in range(n))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + n.to_bytes(4, "big") + labels)
    return [f"data.root={tmp_path}", "extend=1", "max_steps=5", "batch_size=16", "warmup=0", "model.width=8"]


def methods(group):
    """Cells of the ways that need code of their own; their masks move on every step."""
    soon = ("method.every=1", "method.stop=4")
    cells = [study.cell("rigl", 0.9, 0, group, way=way) for way in study.WAYS]
    cells += [
        study.cell(method, 0.9, 0, group, way=way)
        for method, way in (("gmp", "similar"), ("sr_ste", "every 50, similar"))
    ]
    return [
        c._replace(changes=(*c.changes, *soon, *(["method.start=0"] if "gmp" in c.labels.values() else [])))
        for c in cells
    ]


def test_every_way_trains_to_its_structure(tmp_path, tiny):
    wanted, done = methods(4), queue.Queue()
    study._work(tmp_path / "out", wanted, tiny, multiprocessing.get_context("spawn").Value("l", 0), done)
    assert [done.get_nowait()[2] for _ in wanted] == [""] * len(wanted)
    table = study.collect(tmp_path / "out", wanted)
    assert [row["steps"] for row in table] == [5] * len(wanted)
    for cell in wanted:
        masks = torch.load(study._folder(tmp_path / "out", cell) / "model.pt", weights_only=False)
        weight = masks["model"]["3.conv1.weight"].flatten(1)
        alike = (weight != 0).byte().unique(dim=0, return_counts=True)[1]
        assert all(int(n) % 4 == 0 for n in alike), cell.labels


@pytest.mark.slow
def test_runs_end_in_a_table_and_go_on(tmp_path, tiny, capsys):
    wanted = methods(4)[:2]
    assert study.run(tmp_path / "out", wanted[:1], tiny, 1, 240) == []
    bad = study.cell("rigl", 0.9, 1, 4, way="squares")._replace(changes=("no_such_key=1",))
    [error] = study.run(tmp_path / "out", [*wanted, bad], tiny, 1, 240)
    assert "no_such_key" in error
    assert capsys.readouterr().out.count("squares 64 0.9 0") == 1  # what is finished is not run again
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = [(row["method"], row["way"], row["steps"]) for row in csv.DictReader(file)]
    assert rows == [("rigl", "squares", "5"), ("rigl", "coherent", "5")]
