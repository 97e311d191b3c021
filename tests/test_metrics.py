"""The numbers that users compare methods by, against values worked by hand; the callback logs what the wrapper has."""

import math

import pytest
import pytorch_lightning as pl
import torch
from method_list import CLOCK, METHODS, OneLayer, batch, build, hard, network, train
from torch import nn

import sparselearn as sl
from sparselearn import statistics
from sparselearn.lightning import SparsityCallback
from sparselearn.schedules import constant
from sparselearn.state import LayerState

THIRD = constant(1 / 3)


def rigl(**options):
    return sl.rigl(stop=10**9, every=1, drop_fraction=THIRD, skip_step=False, **options)


def metrics(layer):
    return {key.removeprefix("sparsity/"): value for key, value in layer.sparsifier.metrics().items()}


def test_metrics_of_three_updates_by_hand():
    """One of three weights moves at each update; lr = 0, so that a grown weight is zero and goes first.

    step  mask before  gradient of the mask  grows  mask after  ever active  survivors of the last growth
    0     0 1 2        -                     -      0 1 2       3 of 8       -
    1     0 1 2        3, 4, 0  -> 5         3      0 1 3       4 of 8       none was grown before
    2     0 1 3        0, 0, 2  -> 2         2      0 1 2       4 of 8       3 is gone: 0 of 1
    3     0 1 2        1, 2, 2  -> 3         2      0 1 2       4 of 8       2, dropped and regrown at once: 1 of 1
    """
    layer = OneLayer([0.9, 0.5, 0.1, 0, 0, 0, 0, 0], rigl())
    layer.step([0.0] * 8)
    first = metrics(layer)
    assert first == pytest.approx(
        {"sparsity": 5 / 8, "nnz": 3, "density/weight": 3 / 8, "dead_neurons": 0, "exploration_rate": 3 / 8}
    )
    rows = [
        ([3, 4, 0, 9, 0, 0, 0, 0], [0, 1, 3], 4 / 8, 1, 5.0, None),
        ([0, 0, 9, 2, 1, 0, 0, 0], [0, 1, 2], 4 / 8, 1, 2.0, 0.0),
        ([1, 2, 2, 0, 1, 0, 0, 0], [0, 1, 2], 4 / 8, 0, 3.0, 1.0),
    ]
    for grad, mask, explored, grown, norm, survival in rows:
        assert layer.step(grad) == mask
        expected = {"exploration_rate": explored, "grown": grown, "churn": grown / 3, "gradient_norm": norm}
        now = metrics(layer)
        assert {key: now[key] for key in expected} == pytest.approx(expected)
        assert now.get("survival") == survival


def test_exploration_rate_counts_all_layers_and_only_grows():
    model, sparsifier, optimizer = build(METHODS["itop-set"])
    ever = {n: m.clone() for n, m in sparsifier.masks.items()}
    size, last = sum(m.numel() for m in ever.values()), 0.0
    for t in range(12):
        train(model, optimizer, t, t + 1)
        for name, mask in sparsifier.masks.items():
            ever[name] |= mask
        rate = sparsifier.metrics()["sparsity/exploration_rate"]
        assert rate == pytest.approx(sum(int(m.sum()) for m in ever.values()) / size)
        assert last <= rate <= 1
        last = rate
    assert last > 0.3


def test_churn_and_survival_over_layers_by_a_second_count():
    model, sparsifier, optimizer = build(hard(sl.set_(**CLOCK, drop_fraction=0.5)))
    grown = None
    for t in range(10):
        before = {n: m.clone() for n, m in sparsifier.masks.items()}
        train(model, optimizer, t, t + 1)
        if t not in (3, 6, 9):
            continue
        new = {n: m & ~before[n] for n, m in sparsifier.masks.items()}
        values = sparsifier.metrics()
        count = sum(int(m.sum()) for m in new.values())
        assert values["sparsity/grown"] == count > 0
        assert values["sparsity/churn"] == pytest.approx(count / sparsifier.nnz)
        if grown is not None:
            alive = sum(int((grown[n] & m).sum()) for n, m in sparsifier.masks.items())
            total = sum(int(m.sum()) for m in grown.values())
            assert values["sparsity/survival"] == pytest.approx(alive / total)
        grown = new


def test_densities_of_layers_over_time():
    model, sparsifier, optimizer = build(METHODS["gmp-global"])
    seen = []
    for t in range(12):
        train(model, optimizer, t, t + 1)
        values = sparsifier.metrics()
        sizes = {n: m.numel() for n, m in sparsifier.masks.items()}
        for name, mask in sparsifier.masks.items():
            assert values[f"sparsity/density/{name}"] == pytest.approx(int(mask.sum()) / sizes[name])
        total = sum(int(m.sum()) for m in sparsifier.masks.values())
        assert values["sparsity/nnz"] == total
        assert values["sparsity/sparsity"] == pytest.approx(1 - total / sum(sizes.values()))
        seen.append(total)
    assert len(set(seen)) == 3  # dense, then two prunings


def test_dead_neurons_are_rows_and_filters_without_an_active_weight():
    linear = torch.tensor([[1, 0], [0, 0], [0, 1], [0, 0]]).bool()
    filters = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    filters[1, 1, 0, 1] = True
    assert statistics.dead_neurons(linear) == 2
    assert statistics.dead_neurons(filters) == 2
    layers = {"a": LayerState(linear, 2), "b": LayerState(filters, 1)}
    values = statistics.of_masks(layers)
    assert values["dead_neurons"] == 4
    assert values["density/a"] == 2 / 8
    assert values["density/b"] == 1 / 24
    assert values["sparsity"] == pytest.approx(1 - 3 / 32)
    assert "exploration_rate" not in values


def test_gradient_norm_is_of_active_weights_alone_and_of_all_layers():
    layers = {
        "a": LayerState(torch.tensor([[1, 0, 1]]).bool(), 2),
        "b": LayerState(torch.tensor([[0, 1]]).bool(), 1),
    }
    grads = {"a": torch.tensor([[3.0, 100.0, 4.0]]), "b": torch.tensor([[100.0, 12.0]])}
    assert statistics.gradient_norm(grads, layers) == pytest.approx(13.0)
    assert statistics.gradient_norm({n: g.bfloat16() for n, g in grads.items()}, layers) == pytest.approx(13.0)


def test_gradient_noise_and_flips_of_straight_through_methods():
    """STE on 2:4: forward uses .3 and .4; |g| = 3 on these two, 4 on the others: noise 4√2/5√2."""
    layer = OneLayer([0.1, 0.2, 0.3, 0.4], sl.ste(sl.NM(2, 4)), sparsity=None, lr=0.1)
    layer.step([4.0, -4.0, 3.0, -3.0])  # dense becomes -.3 .6 0 .7: now the second and the fourth
    assert metrics(layer)["gradient_noise"] == pytest.approx(0.8)
    # masks are compared on every 50th step
    zeros = [0.0] * 4
    for _ in range(48):
        layer.step(zeros)
    layer.step([0.0, 0.0, -20.0, 0.0])  # the third is 2 now, the second .6 leaves
    values = metrics(layer)
    assert values["sad"] == 2
    assert values["flip_rate"] == pytest.approx(2 / 4)
    assert values["groups_changed"] == 1.0


# ---- callback and wrapper ---------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, data, index):
        return nn.functional.cross_entropy(self.net(data[0]), data[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Memory(pl.loggers.logger.DummyLogger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update({k: v for k, v in metrics.items() if k.startswith("sparsity/")})


@pytest.mark.parametrize("name", ["rigl-stepping", "set", "snfs", "granet", "acdc", "dst-ee"])
def test_the_callback_logs_what_the_wrapper_has(name):
    case, logger = METHODS[name], Memory()
    callback = SparsityCallback(case.method, sparsity=case.sparsity)
    trainer = pl.Trainer(
        max_steps=12, accelerator="cpu", logger=logger, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([batch(t) for t in range(12)], batch_size=None)
    trainer.fit(Module(), loader)

    module = Module()
    sparsifier = sl.Sparsifier(module, case.method, sparsity=case.sparsity)
    optimizer = sl.SparseOptimizer(module.configure_optimizers(), sparsifier)
    expected = {}
    for t in range(12):
        optimizer.zero_grad()
        module.training_step(batch(t), t).backward()
        optimizer.step()
        if case.method.due(t) or t == 11:  # the callback logs at every update, and at the end
            expected[t + 1] = sparsifier.metrics()
    logged = {step: row for step, row in logger.rows.items() if "sparsity/churn" in row}
    assert logged.keys() == expected.keys()
    for step, row in expected.items():
        assert logged[step] == pytest.approx(row)
        assert math.isfinite(row["sparsity/gradient_norm"])
        assert {"sparsity/exploration_rate", "sparsity/dead_neurons", "sparsity/density/net.3.weight"} <= row.keys()
