"""`SparsityCallback(save=...)`: sparse checkpoints at the end of training and at each best model."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from test_checkpoint_files import equal
from test_lightning import METHOD, Net, batches, loader, trainer_of
from torch import nn

from sparselearn import SparsityError, methods
from sparselearn.checkpoint import inspect, load_masks, load_state_dict
from sparselearn.lightning import SparsityCallback
from sparselearn.structures import NM, Unstructured

pytest.importorskip("safetensors", reason="checkpoints need safetensors")


class Scored(Net):
    """Validation gives these scores, epoch by epoch, and remembers the weights and masks that they are of."""

    def __init__(self, scores, *args, **options):
        super().__init__(*args, **options)
        self.scores, self.seen = scores, []
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0].repeat(1, 2)[:, :12]), batch[1])

    def validation_step(self, batch, index):
        self.log("score", self.scores[self.current_epoch], batch_size=1)
        self.seen.append(copy.deepcopy(self.state_dict()))


def train(folder, scores, method=METHOD, others=(), sparsity=0.7, saver=None, ckpt_path=None, module=None, **options):
    module = module or Scored(scores)
    saver = saver or ModelCheckpoint(folder / "dense", "{epoch}", monitor="score")
    callback = SparsityCallback(method, sparsity=sparsity, save=folder / "sparse")
    options = {"max_epochs": len(scores), "enable_checkpointing": True} | options
    trainer = trainer_of([callback, *others, saver], folder, **options)
    data = loader(batches(4))
    trainer.fit(module, data, loader(batches(1)), ckpt_path=ckpt_path)
    return module, callback.sparsifier


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_best_and_the_last_model_are_saved(tmp_path):
    module, sparsifier = train(tmp_path, [3.0, 1.0, 2.0, 0.5, 0.7])
    best, last = tmp_path / "sparse" / "best", tmp_path / "sparse" / "last"
    assert names(tmp_path / "sparse") == ["best", "last"]
    assert equal(load_state_dict(best), module.seen[3])
    assert equal(load_state_dict(last), module.state_dict())
    assert equal(load_masks(last), sparsifier.masks)
    assert (inspect(best).metadata, inspect(last).metadata["global_step"]) == ({"epoch": 3, "global_step": 16}, 20)
    assert inspect(last).arguments["step"] == sparsifier.step == 20
    assert inspect(best).sparsity == pytest.approx(sparsifier.sparsity)
    assert not equal(load_state_dict(best), module.state_dict())


def test_best_follows_the_mode_of_the_monitor(tmp_path):
    saver = ModelCheckpoint(tmp_path / "dense", monitor="score", mode="max", save_top_k=2, save_last=True)
    module, _ = train(tmp_path, [1.0, 3.0, 2.0, 0.0], saver=saver)  # the third is among the best two, not the best
    assert equal(load_state_dict(tmp_path / "sparse" / "best"), module.seen[1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_resumed_run_keeps_the_best_of_before(tmp_path):
    module, _ = train(tmp_path, [0.1, 2.0], saver=(saver := ModelCheckpoint(tmp_path, "{epoch}", monitor="score")))
    path = saver.best_model_path
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", save_top_k=-1)
    again, _ = train(tmp_path, [9.0, 2.0, 3.0], saver=saver, ckpt_path=path)
    assert len(again.seen) == 2  # epochs 1 and 2
    assert equal(load_state_dict(tmp_path / "sparse" / "best"), module.seen[0])
    assert equal(load_state_dict(tmp_path / "sparse" / "last"), again.state_dict())


def test_without_a_monitor_only_the_last_is_saved(tmp_path):
    train(tmp_path, [1.0, 0.5], saver=ModelCheckpoint(tmp_path / "dense"))
    assert names(tmp_path / "sparse") == ["last"]


@pytest.mark.filterwarnings("ignore:.*fast_dev_run.*")
def test_a_trial_run_writes_nothing(tmp_path):
    train(tmp_path, [1.0], fast_dev_run=True)
    assert names(tmp_path) == []


METHODS = {
    "ste": (methods.ste(Unstructured()), 0.7),
    "sr_ste": (methods.sr_ste(NM(2, 4)), None),
    "s_ste": (methods.s_ste(), None),
    "pretrain_24": (methods.pretrain_24(steps=100), None),
    "top_kast": (methods.top_kast(exploration=0.1), 0.7),
    "gmp": (methods.gmp(stop=15, every=3), 0.7),
    "srigl": (methods.srigl(stop=15, every=3), 0.7),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_sparse_checkpoint_holds_the_weights_of_the_forward_pass(tmp_path, name):
    method, sparsity = METHODS[name]
    module, sparsifier = train(tmp_path, [3.0, 1.0, 2.0], method, sparsity=sparsity)
    last = load_state_dict(tmp_path / "sparse" / "last")
    assert equal(load_state_dict(tmp_path / "sparse" / "best"), module.seen[1])
    assert equal(last, module.state_dict())
    masks = load_masks(tmp_path / "sparse" / "last")
    assert equal(masks, sparsifier.masks)
    assert not any(bool(last[name][~mask].any()) for name, mask in masks.items())


def test_with_an_average_the_average_is_saved(tmp_path):
    module, sparsifier = train(tmp_path, [3.0, 1.0, 2.0], others=[EMAWeightAveraging(decay=0.5)])
    assert equal(load_state_dict(tmp_path / "sparse" / "best"), module.seen[1])
    assert equal(load_state_dict(tmp_path / "sparse" / "last"), module.state_dict())
    assert equal(load_masks(tmp_path / "sparse" / "last"), sparsifier.masks)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_method_that_is_not_yet_sparse_gives_a_warning_and_no_file(tmp_path):
    with pytest.warns(UserWarning, match=r"`.*best` was not written: the model still uses weights outside"):
        train(tmp_path, [3.0, 2.0, 1.0], methods.mdgf(NM(2, 4), stop=12), sparsity=None)
    assert names(tmp_path / "sparse") == ["best", "last"]
    assert inspect(tmp_path / "sparse" / "best").metadata["global_step"] == 12


def test_a_place_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "last").touch()
    with pytest.raises(SparsityError, match="must be the folder of a checkpoint, new or old; it is a file"):
        train(tmp_path, [1.0], saver=ModelCheckpoint(tmp_path / "dense"))


def test_a_checkpoint_of_the_trainer_written_after_the_fit_is_no_best(tmp_path):
    callback = SparsityCallback(METHOD, sparsity=0.7, save=tmp_path / "sparse")
    trainer = trainer_of([callback], tmp_path)
    trainer.fit(Net(), loader(batches(4)))
    trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert names(tmp_path / "sparse") == ["last"]
    assert isinstance(trainer, pl.Trainer)
    assert torch.load(tmp_path / "by_hand.ckpt", weights_only=False)["global_step"] == 4
