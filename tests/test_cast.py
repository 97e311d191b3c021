"""CAST's side parts: a teacher that is the model itself, and learned factors of the outputs."""

import copy
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from sparselearn import SparseOptimizer, Sparsifier, SparsityError
from sparselearn.lightning import SparsityCallback
from sparselearn.methods import cast
from sparselearn.modules.scaled import ScaledLinear, fold_scales, scale_outputs
from sparselearn.structures import NM
from sparselearn.wrappers import SelfDistillation
from sparselearn.wrappers.distillation import divergence


def test_divergence_by_hand():
    student, teacher = torch.zeros(2, 2), torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(divergence(student, teacher), torch.tensor(one / 2))
    root = math.sqrt(3)  # at temperature 2 the teacher's odds are √3 : 1
    a, b = root / (1 + root), 1 / (1 + root)
    soft = a * math.log(2 * a) + b * math.log(2 * b)
    torch.testing.assert_close(divergence(student[:1], teacher[:1], 2.0), torch.tensor(4 * soft))
    torch.testing.assert_close(divergence(student.view(1, 2, 2), teacher.view(1, 2, 2)), torch.tensor(one / 2))
    assert divergence(teacher, student) != divergence(student, teacher)


class Net(SelfDistillation, pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        self.keep_teacher(self.net)

    def training_step(self, batch, index):
        x, y = batch
        logits = self.net(x)
        return self.distilled(F.cross_entropy(logits, y), logits, x)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_loss_is_the_weighted_sum_and_the_teacher_learns_nothing():
    net = Net()
    before = copy.deepcopy(net.__dict__["_teacher"].state_dict())
    x, y = torch.randn(6, 8), torch.randint(4, (6,))
    logits = torch.randn(6, 4, requires_grad=True)
    task = F.cross_entropy(logits, y)
    loss = net.distilled(task, logits, x, weight=0.25, temperature=3.0)
    wanted = net.net[2](net.net[0](x))  # evaluation: no dropout
    torch.testing.assert_close(loss, 0.75 * task + 0.25 * divergence(logits, wanted, 3.0))
    assert not any("teacher" in name for name in net.state_dict())
    assert len(list(net.parameters())) == 4
    data = [(torch.randn(6, 8), torch.randint(4, (6,))) for _ in range(12)]
    method = cast(NM(2, 4), decay=0.1, stop=8, every=2)
    trainer = pl.Trainer(
        max_steps=12, callbacks=[SparsityCallback(method)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=None))
    teacher = net.__dict__["_teacher"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert not torch.equal(net.net[0].weight, before["0.weight"])
    assert ((net.net[0].weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()


def test_scales_learn_fold_and_leave_outputs_as_they_are():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    expected = net(x)
    net = scale_outputs(net)
    assert torch.equal(net(x), expected)
    sparsifier = Sparsifier(net, cast(NM(2, 4), decay=0.1, stop=5, every=1))
    optimizer = SparseOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), sparsifier)
    for _ in range(8):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(net[0].scale, torch.ones(16))
    expected, masks = net(x), sparsifier.masks
    fold_scales(net)
    torch.testing.assert_close(net(x), expected)
    assert type(net[0]) is nn.Linear
    assert (net[0].weight[~masks["0.weight"]] == 0).all()
    assert isinstance(scale_outputs(net)[0], ScaledLinear)
    with pytest.raises(SparsityError, match="has none"):
        scale_outputs(nn.ReLU())
