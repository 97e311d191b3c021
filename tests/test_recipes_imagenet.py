"""The ImageNet recipes end to end on generated folders of JPEGs: training, exact resume, workers, two processes."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sparselearn import SparsityError
from sparselearn.config import load, packaged
from sparselearn.recipes.data.imagenet import image_folder
from sparselearn.recipes.train import Classifier, train

TINY = [
    "data.size=32", "data.workers=0", "max_steps=4", "batch_size=8", "accumulate=2", "eval_every=2", "method.every=2",
    "method.start=2", "precision=32-true",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes of 8 pictures for training and 3 for test, of odd sizes."""
    folder, random = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 3)):
        for label in ("n01", "n02"):
            (folder / part / label).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 256, (40 + i, 60 - i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.JPEG")
    return folder


TIMES = {"seconds": 0, "examples_per_second": None}


def run(root, out, recipe, *changes, resume=False):
    return train(load(recipe, [f"data.root={root}", *TINY, *changes]), out, resume=resume, progress=False)


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=False)["model"]


def interrupt_at(monkeypatch, batch):
    seen, original = [], Classifier.training_step

    def step(self, *args):
        seen.append(0)
        if len(seen) == batch:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(Classifier, "training_step", step)


# ---- data --------------------------------------------------------------------------------------------------------


def test_workers_change_nothing(root):
    alone, workers = (image_folder(str(root), 16, n, rand_augment=True).batches(4, 6, seed=1) for n in (0, 2))
    state = torch.random.get_rng_state()
    first = list(alone)
    assert torch.equal(state, torch.random.get_rng_state())  # dropout's random numbers are not touched
    for (a, labels), (b, same) in zip(first, workers, strict=True):
        assert a.shape == (4, 3, 16, 16)
        assert torch.equal(a, b)
        assert torch.equal(labels, same)
    assert {tuple(y.tolist()) for _, y in first} != {tuple(first[0][1].tolist())}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_position_is_what_was_given_out(root, workers):
    folders = image_folder(str(root), 16, workers)
    whole = [x for x, _ in folders.batches(4, 6, seed=1)]
    assert not any(torch.equal(a, b) for a, b in zip(whole[:2], whole[4:], strict=True))  # the second epoch
    stopped, late = folders.batches(4, 6, seed=1), folders.batches(4, 6, seed=1)
    for _, batch in zip(range(3), stopped, strict=False):
        assert len(batch[1]) == 4
    assert stopped.state_dict() == {"position": 3}  # though workers have read further
    late.load_state_dict(stopped.state_dict())
    assert all(torch.equal(a, b) for (a, _), b in zip(late, whole[3:], strict=True))


def test_ranks_share_batches_and_the_test_set(root):
    folders = image_folder(str(root), 16, 0)
    whole = [x for x, _ in folders.batches(8, 2, seed=0)]
    ranks = [[x for x, _ in folders.batches(8, 2, 0, rank, 2)] for rank in (0, 1)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole[step])
    labels = [torch.cat([y for _, y in folders.chunks(rank, 4)]) for rank in range(4)]
    assert [len(y) for y in labels] == [2, 2, 1, 1]
    assert torch.cat(labels).bincount().tolist() == [3, 3]
    with pytest.raises(SparsityError, match="only 6 test images for 8 devices"):
        folders.chunks(0, 8)
    assert folders.classes == 2
    assert folders.example().shape == (2, 3, 16, 16)


def test_missing_folders_name_a_command(root, tmp_path):
    with pytest.raises(SparsityError, match=r"There is no folder .*train`.*from torchvision.datasets import ImageNet"):
        image_folder(str(tmp_path))
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(SparsityError, match="must hold a folder of images for each class"):
        image_folder(str(tmp_path))
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "train").symlink_to(root / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "n01").symlink_to(root / "val" / "n01")
    with pytest.raises(SparsityError, match=r"1 are in one of them only: n02\."):
        image_folder(str(tmp_path))


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [pytest.param("dense", marks=pytest.mark.slow), pytest.param("rigl", marks=pytest.mark.slow), "rigl_uniform"],
)
def test_resnet50_end_to_end(root, tmp_path, variant):
    changes = [] if variant != "dense" else ["method=null"]
    result = run(root, tmp_path, "imagenet_resnet50", f"variant={variant}", "sparsity=0.8", *changes)
    assert result["steps"] == 4
    assert result["parameters"] == 25_557_032
    assert result["sparsity"] == pytest.approx(0.0 if variant == "dense" else 0.8, abs=3e-3)
    assert not result["diverged"]
    if variant == "rigl_uniform":  # dense first layer
        assert bool((weights(tmp_path)["conv1.weight"] != 0).all())
    rows = (tmp_path / "metrics.csv").read_text()
    assert rows.count("test_accuracy") >= 2
    assert "test_loss" in rows


def test_throughput_is_measured_on_noise(tmp_path):
    """As on a GPU: `sparselearn train imagenet_resnet50 data.synthetic=1024 max_steps=... eval_every=0`."""
    changes = ["data.size=16", "data.synthetic=8", "max_steps=12", "batch_size=4", "accumulate=1", "eval_every=0"]
    updates = ["method.every=4", "method.start=4", "precision=32-true"]
    result = train(load("imagenet_mobilenet_v1", changes + updates), tmp_path, progress=False)
    assert result["examples_per_second"] > 1
    assert result["steps"] == 12


def test_an_interrupted_run_goes_on_exactly(root, tmp_path, monkeypatch):
    whole = run(root, tmp_path / "whole", "imagenet_mobilenet_v1")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)  # the first micro-batch of the third step, on which masks change
        stopped = run(root, tmp_path / "part", "imagenet_mobilenet_v1")
    assert stopped == {"interrupted": True, "step": 3}
    resumed = run(root, tmp_path / "part", "imagenet_mobilenet_v1", resume=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert whole | TIMES == resumed | TIMES


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["imagenet_mobilenet_v1", "imagenet_vit_b16"])
def test_the_other_recipes_end_to_end(root, tmp_path, recipe):
    size = ["model.image_size=32"] if recipe == "imagenet_vit_b16" else []
    result = run(root, tmp_path, recipe, "data.workers=2", *size)
    assert result["steps"] == 4
    assert result["sparsity"] == pytest.approx({"imagenet_vit_b16": 0.8}.get(recipe, 0.75), abs=3e-3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_as_one(root, tmp_path):
    """A network without batch norm: gradients averaged over two processes are those of the whole batch."""
    base = packaged()["imagenet_mobilenet_v1"].read_text()
    lines = [line for line in base.splitlines() if not line.startswith(("model:", "exclude:"))]
    recipe = tmp_path / "small.yaml"
    network = "model: {fn: sparselearn.recipes.models.vit, classes: 2, width: 32, depth: 2, heads: 2}"
    recipe.write_text("\n".join([*lines, network]))
    changes = [f"data.root={root}", *TINY, "accelerator=cpu", "max_steps=6", "optimizer.lr=0.05"]
    command = [sys.executable, "-m", "sparselearn.cli", "train", str(recipe), *changes, "--quiet"]
    environment = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"}
    for n in (1, 2):
        done = subprocess.run(
            [*command, f"devices={n}", "--out", str(tmp_path / str(n))],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in "12")
    assert (one["steps"], one["nnz"]) == (two["steps"], two["nnz"])
    assert one["test_accuracy"] == pytest.approx(two["test_accuracy"])
    assert one["test_loss"] == pytest.approx(two["test_loss"], abs=1e-4)
    a, b = weights(tmp_path / "1"), weights(tmp_path / "2")
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-3)
        assert torch.equal(a[key] != 0, b[key] != 0)
