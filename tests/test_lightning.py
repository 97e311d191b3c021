"""SparsityCallback: the same training as by hand, and everything Lightning does around it."""

import copy
import csv
import gc
import weakref

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn

from sparselearn import SparseOptimizer, Sparsifier, SparsityError, rigl, scaling, set_, static
from sparselearn.lightning import SparsityCallback

METHOD = rigl(stop=25, every=4, drop_fraction=0.5)
WITH_STEP = rigl(stop=25, every=4, drop_fraction=0.5, skip_step=False)
STEPS = 30


def batches(n=STEPS, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 10, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(n)]


def loss_of(module, batch):
    return nn.functional.cross_entropy(module.net(batch[0]), batch[1])


class Net(pl.LightningModule):
    """A module that knows nothing of sparsity. `batch_idx` counts on after a resume, so it picks the data."""

    def __init__(self, optimizer="adamw", manual_clip=None, schedule=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
        self.optimizer, self.manual_clip, self.schedule = optimizer, manual_clip, schedule
        self.rates = []

    def training_step(self, batch, index):
        return loss_of(self, batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.rates.append([g["lr"] for g in self.trainer.optimizers[0].param_groups])

    def configure_optimizers(self):
        optimizer = make_optimizer(self, self.optimizer)
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def make_optimizer(model, kind):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=kind == "fused")


def trainer_of(callbacks=(), tmp_path=None, **options):
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path, "log_every_n_steps": 1,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def loader(data):
    return torch.utils.data.DataLoader(data, batch_size=None)


def fit(module, method=METHOD, data=None, others=(), sparse=None, trainer=None, ckpt_path=None, **options):
    sparse = {} if sparse is None else sparse
    callback = SparsityCallback(method, **{"sparsity": 0.7, **sparse})
    trainer = trainer_of([callback, *others], **options)
    trainer.fit(module, loader(batches() if data is None else data), ckpt_path=ckpt_path)
    return callback


def clip_grads(optimizer, clip):
    """As Lightning does: in the order of the groups, which decides how the sum of squares is rounded."""
    if isinstance(optimizer, SparseOptimizer) and optimizer.sparsifier.density_scaling:  # split at `step` only
        densities, named = optimizer.sparsifier.densities, optimizer.sparsifier._weights
        rates = {named[name].parameter: scaling.rate_multiplier(d) for name, d in densities.items()}
        groups = scaling.scaled_groups(optimizer.base, rates)
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
        return
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)


def by_hand(method=METHOD, data=None, kind="adamw", clip=None, wrapper=False, **options):
    """before_step, clip, step, after_step; or the optimizer wrapper."""
    module = Net()
    sparsifier = Sparsifier(module, method, **{"sparsity": 0.7, **options})
    optimizer = make_optimizer(module, kind)
    if wrapper:
        optimizer = SparseOptimizer(optimizer, sparsifier)
    for batch in batches() if data is None else data:
        optimizer.zero_grad()
        loss_of(module, batch).backward()
        if wrapper and clip:
            optimizer.before_step()
        elif not wrapper:
            sparsifier.before_step(optimizer)
        if clip:
            clip_grads(optimizer, clip)
        optimizer.step()
        if not wrapper:
            sparsifier.after_step(optimizer)
    return module, sparsifier


def same(module, sparsifier, other, other_sparsifier):
    for name, mask in other_sparsifier.masks.items():
        assert torch.equal(sparsifier.masks[name], mask), name
    assert sparsifier.step == other_sparsifier.step
    for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def exact(module, sparsifier):
    for name, mask in sparsifier.masks.items():
        assert int(mask.sum()) == sparsifier.state.layers[name].nnz
        assert not module.get_parameter(name)[~mask].any()


def moved(sparsifier, method=METHOD, **options):
    start = Sparsifier(Net(), method, **{"sparsity": 0.7, **options}).masks
    return any(not torch.equal(mask, start[name]) for name, mask in sparsifier.masks.items())


class Watch(pl.Callback):
    """Looks at the module at chosen moments. It stands after the SparsityCallback."""

    def __init__(self, callback=None):
        self.seen, self.callback = [], callback

    def sparsifier(self, trainer):
        return next(c for c in trainer.callbacks if isinstance(c, SparsityCallback)).sparsifier

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        exact(pl_module, self.sparsifier(trainer))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        sparsifier = self.sparsifier(trainer)
        exact(pl_module, sparsifier)
        self.seen.append((trainer.sanity_checking, {n: pl_module.get_parameter(n).clone() for n in sparsifier.masks}))


# ---- three ways in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("adamw", METHOD), ("sgd", WITH_STEP), ("fused", METHOD), ("sgd", set_(stop=25, every=4)), ("sgd", static())],
    ids=["adamw-rigl", "sgd-rigl-with-step", "fused-rigl", "sgd-set", "sgd-static"],
)
def test_callback_wrapper_and_hand_written_loop_are_bit_identical(kind, method, scaling, clip):
    module = Net(kind)
    callback = fit(module, method, sparse={"density_scaling": scaling}, gradient_clip_val=clip)
    hand = by_hand(method, kind=kind, clip=clip, density_scaling=scaling)
    wrapped = by_hand(method, kind=kind, clip=clip, density_scaling=scaling, wrapper=True)
    same(module, callback.sparsifier, *hand)
    same(module, callback.sparsifier, *wrapped)
    assert callback.sparsifier.step == STEPS
    assert moved(callback.sparsifier, method) == (method.updates is not None)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_manual_optimization(clip):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss_of(self, batch))
            if clip:
                callback = next(c for c in self.trainer.callbacks if isinstance(c, SparsityCallback))
                callback.sparsifier.before_step(optimizer.optimizer)
                self.clip_gradients(optimizer, gradient_clip_val=clip)
            optimizer.step()

    module = Manual()
    callback = fit(module, sparse={"density_scaling": True})
    same(module, callback.sparsifier, *by_hand(clip=clip, density_scaling=True))


def test_manual_clipping_with_the_wrapped_optimizer_lightning_returns():
    """`self.optimizers()` gives a LightningOptimizer; before_step takes it as it is."""

    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss_of(self, batch))
            callback = next(c for c in self.trainer.callbacks if isinstance(c, SparsityCallback))
            callback.sparsifier.before_step(optimizer)
            self.clip_gradients(optimizer, gradient_clip_val=0.3)
            optimizer.step()

    module = Manual()
    callback = fit(module, sparse={"density_scaling": True})
    same(module, callback.sparsifier, *by_hand(clip=0.3, density_scaling=True))


def test_manual_optimization_with_several_steps_in_a_batch():
    class Twice(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(loss_of(self, batch))
                optimizer.step()

    module = Twice()
    callback = fit(module, data=batches(15))
    same(module, callback.sparsifier, *by_hand(data=[b for b in batches(15) for _ in range(2)]))


def test_several_optimizers_keep_their_own_clocks():
    class Gan(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.g = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10))
            self.d = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 1))

        def training_step(self, batch, index):
            self.run(batch[0], index, *self.optimizers())

        def run(self, real, index, g, d, step=lambda optimizer: optimizer.step()):
            fake = self.g(real[:, :6])
            d.zero_grad()
            (self.d(fake.detach()).mean() - self.d(real).mean()).backward()
            step(d)
            if index % 3 == 2:  # the generator trains on every third batch
                g.zero_grad()
                (-self.d(fake).mean()).backward()
                step(g)

        def configure_optimizers(self):
            return [torch.optim.Adam(m.parameters(), lr=0.01) for m in (self.g, self.d)]

    method = rigl(stop=8, every=3, drop_fraction=0.5)
    module = Gan()
    callback = fit(module, method)
    steps = {name: layer.step for name, layer in callback.sparsifier.state.layers.items()}
    assert steps == {"g.0.weight": 10, "g.2.weight": 10, "d.0.weight": 30, "d.2.weight": 30}

    hand = Gan()
    sparsifier = Sparsifier(hand, method, sparsity=0.7)
    g, d = hand.configure_optimizers()

    def step(optimizer):
        sparsifier.before_step(optimizer)
        optimizer.step()
        sparsifier.after_step(optimizer)

    for index, batch in enumerate(batches()):
        hand.run(batch[0], index, g, d, step)
    same(module, callback.sparsifier, hand, sparsifier)


def test_an_optimizer_without_sparse_weights_beside_one_with():
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss_of(self, batch))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self):
            groups = {p.ndim: [q for q in self.parameters() if q.ndim == p.ndim] for p in self.parameters()}
            return [torch.optim.Adam(groups[2]), torch.optim.SGD(groups[1])]

    module = Two()
    callback = fit(module)
    exact(module, callback.sparsifier)
    assert callback.sparsifier.step == STEPS


def test_accumulated_gradients():
    module = Net()
    callback = fit(module, accumulate_grad_batches=3, data=batches(60))
    assert callback.sparsifier.step == 20

    hand = Net()
    sparsifier = Sparsifier(hand, METHOD, sparsity=0.7)
    optimizer = make_optimizer(hand, "adamw")
    for index, batch in enumerate(batches(60)):
        if index % 3 == 0:
            optimizer.zero_grad()
        (loss_of(hand, batch) / 3).backward()
        if index % 3 == 2:
            sparsifier.before_step(optimizer)
            optimizer.step()
            sparsifier.after_step(optimizer)
    same(module, callback.sparsifier, hand, sparsifier)


# ---- precision -----------------------------------------------------------------------------------------------


def half(init_scale, growth_interval=2000):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


def scaled_by_hand(method, kind, init_scale, clip=None, **options):
    module = Net()
    sparsifier = Sparsifier(module, method, sparsity=0.7, **options)
    optimizer = make_optimizer(module, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    skipped = []
    for index, batch in enumerate(batches()):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.half, cache_enabled=False):
            loss = loss_of(module, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        sparsifier.before_step(optimizer)
        if clip:
            clip_grads(optimizer, clip)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        sparsifier.after_step(optimizer, stepped=scaler.get_scale() >= scale)
        if scaler.get_scale() < scale:
            skipped.append(index)
    return module, sparsifier, skipped


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("method", [METHOD, WITH_STEP], ids=["rigl", "with-step"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_16_mixed_with_skipped_steps(method, scaling, clip):
    module = Net()
    callback = fit(
        module, method, plugins=[half(2.0**34)], gradient_clip_val=clip, sparse={"density_scaling": scaling},
        others=[Watch()],
    )  # fmt: skip
    hand, sparsifier, skipped = scaled_by_hand(method, "adamw", 2.0**34, clip, density_scaling=scaling)
    assert len(skipped) >= 5
    assert callback.sparsifier.step == STEPS - len(skipped)
    same(module, callback.sparsifier, hand, sparsifier)
    assert moved(callback.sparsifier, method)


def test_16_mixed_skips_at_an_update_step_and_the_update_waits():
    class Spike(Net):
        def training_step(self, batch, index):
            return super().training_step(batch, index) * (torch.inf if index in (4, 5) else 1)

    clocks = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sparsifier = Watch().sparsifier(trainer)
            clocks.append((sparsifier.step, sparsifier.last_update.get("step")))

    module = Spike()
    fit(module, plugins=[half(2.0**8)], others=[Watch(), Clock()], data=batches(9))
    assert clocks == [(1, None), (2, None), (3, None), (4, None), (4, None), (4, None), (5, 4), (6, 4), (7, 4)]


def test_a_fused_optimizer_under_16_mixed_refuses_updates_in_place_of_steps():
    text = (
        "A fused optimizer under 16-mixed needs a gradient on every step, but this method's updates take the place of "
        "the step. Pass fused=False to the optimizer or skip_step=False to the method, or use bf16-mixed."
    )
    with pytest.raises(SparsityError) as error:
        fit(Net("fused"), plugins=[half(2.0**8)])
    assert str(error.value) == text


@pytest.mark.parametrize("scaling", [False, True])
def test_a_fused_optimizer_under_16_mixed_with_steps(scaling):
    module = Net("fused")
    plugin = half(2.0**34)
    callback = fit(module, WITH_STEP, plugins=[plugin], others=[Watch()], sparse={"density_scaling": scaling})
    skipped = STEPS - callback.sparsifier.step
    assert skipped >= 5
    assert plugin.scaler.get_scale() == 2.0 ** (34 - skipped)
    exact(module, callback.sparsifier)
    assert moved(callback.sparsifier, WITH_STEP)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_bf16_mixed():
    module = Net()
    callback = fit(module, precision="bf16-mixed", others=[Watch()])
    assert callback.sparsifier.step == STEPS
    assert moved(callback.sparsifier)


# ---- clipping, rates, metrics ----------------------------------------------------------------------------------


def test_masked_gradients_are_what_is_clipped():
    norms = []

    class Norm(Net):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            masks = Watch().sparsifier(self.trainer).masks
            for name, mask in masks.items():
                assert not self.get_parameter(name).grad[~mask].any()
            norms.append(torch.stack([p.grad.norm() for p in self.parameters()]).norm().item())

    fit(Norm(), static(), gradient_clip_val=1e-3)
    assert norms == pytest.approx([1e-3] * STEPS, rel=1e-3)


def test_learning_rates_are_those_without_the_callback():
    module, plain = Net(schedule=True), Net(schedule=True)
    fit(module, sparse={"density_scaling": True})
    trainer_of().fit(plain, loader(batches()))
    assert module.rates == plain.rates
    assert len({rate for (rate,) in module.rates}) > 10


def test_metrics_reach_the_logger(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    callback = fit(Net(), logger=logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    nnz = float(callback.sparsifier.nnz)
    assert {float(r["sparsity/nnz"]) for r in rows} == {nnz}
    assert {float(r["sparsity/sparsity"]) for r in rows} == {callback.sparsifier.sparsity}
    updates = list(range(4, 25, 4))
    logged = [int(r["step"]) for r in rows]
    assert logged[0] == 0
    assert rows[0]["sparsity/grown"] == ""
    assert {step + 1 for step in updates} <= set(logged)
    assert all(float(r["sparsity/grown"]) >= 0 for r in rows[1:])
    assert float(rows[1]["sparsity/churn"]) > 0


def test_the_sanity_check_sees_the_sparse_model():
    class Checked(Net):
        def validation_step(self, batch, index):
            for name, layer in Watch().sparsifier(self.trainer).state.layers.items():
                assert int((self.get_parameter(name) != 0).sum()) == layer.nnz
            self.checked = self.trainer.sanity_checking

    module = Checked()
    callback = SparsityCallback(static(), sparsity=0.7)
    trainer = trainer_of([callback], num_sanity_val_steps=1)

    class Stop(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert module.checked
            trainer.should_stop = True

    trainer.callbacks.append(Stop())
    trainer.fit(module, loader(batches(3)), loader(batches(1)))
    assert hasattr(module, "checked")


# ---- checkpoints -----------------------------------------------------------------------------------------------


AVERAGES = {
    "none": lambda: [],
    "ema": lambda: [EMAWeightAveraging(decay=0.8)],
    "swa": lambda: [WeightAveraging()],
}


class LateRestore(SingleDeviceStrategy):
    """Restores after `on_fit_start`, as strategies that shard the model do."""

    def __init__(self):
        super().__init__(torch.device("cpu"))

    @property
    def restore_checkpoint_after_setup(self):
        return True


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*", "ignore:The dirpath has changed.*")
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(("kind", "method"), [("adamw", METHOD), ("sgd", WITH_STEP)], ids=["adamw", "sgd-with-step"])
@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("strategy", ["auto", LateRestore])
def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path, kind, method, scaling, average, strategy):
    """Saved before, on and after an update; epochs of 3 steps, so that some saves are within an epoch."""

    class ByStep(Net):
        def training_step(self, batch, index):
            return loss_of(self, batches()[self.trainer.global_step])

    def run(folder, ckpt_path=None):
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        module = ByStep(kind, schedule=True)
        callback = fit(
            module, method, data=[0] * 3, max_epochs=-1, max_steps=14, sparse={"density_scaling": scaling},
            others=[*AVERAGES[average](), saver], enable_checkpointing=True, ckpt_path=ckpt_path,
            strategy=strategy if isinstance(strategy, str) else strategy(),
        )  # fmt: skip
        return module, callback

    module, callback = run(tmp_path / "whole")
    for step in (3, 4, 5, 8, 9):
        resumed, again = run(tmp_path / f"resumed{step}", tmp_path / "whole" / f"step={step}.ckpt")
        same(resumed, again.sparsifier, module, callback.sparsifier)
        assert resumed.rates == module.rates[step:]


def test_a_checkpoint_is_loaded_for_testing_and_does_not_reach_the_next_model(tmp_path):
    class Tested(Net):
        def test_step(self, batch, index):
            return loss_of(self, batch)

    saver = ModelCheckpoint(tmp_path, "last", every_n_train_steps=6)
    callback = SparsityCallback(METHOD, sparsity=0.7)
    trainer = trainer_of([callback, saver], enable_checkpointing=True)
    module = Tested()
    trainer.fit(module, loader(batches(8)))
    trainer.test(module, loader(batches(2)), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    exact(module, callback.sparsifier)  # weights of the checkpoint, so its masks
    assert callback.sparsifier.step == 6
    other = Net()
    trainer_of([callback]).fit(other, loader(batches()))
    same(other, callback.sparsifier, *by_hand())


def test_training_goes_on_with_the_masks_of_a_checkpoint_that_was_tested(tmp_path):
    class Tested(Net):
        def test_step(self, batch, index):
            return loss_of(self, batch)

    saver = ModelCheckpoint(tmp_path, "last", every_n_train_steps=6)
    callback = SparsityCallback(METHOD, sparsity=0.7)
    trainer = trainer_of([callback, saver], enable_checkpointing=True)
    module = Tested()
    trainer.fit(module, loader(batches(10)))  # two updates; the checkpoint has seen one
    trainer.test(module, loader(batches(2)), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    before = {n: (p.clone(), callback.sparsifier.masks[n]) for n, p in module.named_parameters() if p.ndim > 1}
    trainer_of([callback]).fit(module, loader(batches(1)))
    assert callback.sparsifier.step == 7
    for name, (weight, mask) in before.items():
        assert torch.equal(callback.sparsifier.masks[name], mask)
        assert not weight[~mask].any()


# ---- averages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["callback", "average"])
@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=3, update_starting_at_step=7),
        lambda: WeightAveraging(),
    ],
    ids=["ema", "late-ema", "swa"],
)
def test_an_average_has_the_zeros_of_the_mask_at_every_validation_and_at_the_end(average, first):
    class Validated(Net):
        def validation_step(self, batch, index):
            return loss_of(self, batch)

    average, watch, module = average(), Watch(), Validated()
    callback = SparsityCallback(METHOD, sparsity=0.7, density_scaling=True)
    pair = [callback, average] if first == "callback" else [average, callback]
    trainer = trainer_of([*pair, watch], num_sanity_val_steps=1, val_check_interval=1)
    trainer.fit(module, loader(batches()), loader(batches(1)))
    assert [sanity for sanity, _ in watch.seen] == [True] + [False] * STEPS
    start = Validated()
    sparsifier = Sparsifier(start, METHOD, sparsity=0.7, density_scaling=True)
    for name in sparsifier.masks:
        assert torch.equal(watch.seen[0][1][name], start.get_parameter(name))
    exact(module, callback.sparsifier)
    for name, layer in callback.sparsifier.state.layers.items():
        assert 0.8 * layer.nnz < int((module.get_parameter(name) != 0).sum()) <= layer.nnz
    hand, _ = by_hand(density_scaling=True)  # the end is the average, not the model
    assert not torch.equal(module.net[0].weight, hand.net[0].weight)


# ---- life ------------------------------------------------------------------------------------------------------


def test_the_callback_serves_another_model_with_another_trainer():
    callback = SparsityCallback(METHOD, sparsity=0.7)
    trainer_of([callback]).fit(Net(), loader(batches(9)))
    first, module = callback.sparsifier, Net()
    trainer_of([callback]).fit(module, loader(batches()))
    assert callback.sparsifier is not first
    same(module, callback.sparsifier, *by_hand())


def test_the_callback_can_be_copied_and_its_copy_used():
    callback = SparsityCallback(METHOD, sparsity=0.7)
    module = Net()
    trainer_of([copy.deepcopy(callback)]).fit(module, loader(batches(5)))
    assert callback.sparsifier is None


def test_fit_with_the_same_module_goes_on():
    callback, module = SparsityCallback(METHOD, sparsity=0.7), Net("sgd")
    trainer_of([callback]).fit(module, loader(batches()[:10]))
    sparsifier = callback.sparsifier
    masks = {n: m.clone() for n, m in sparsifier.masks.items()}
    trainer_of([callback]).fit(module, loader(batches()[10:11]))
    assert callback.sparsifier is sparsifier
    assert sparsifier.step == 11
    for name, mask in masks.items():
        assert torch.equal(sparsifier.masks[name], mask)
    trainer_of([callback]).fit(module, loader(batches()[11:]))
    assert sparsifier.step == STEPS
    exact(module, sparsifier)


def test_detach_lets_go_of_the_model():
    callback = SparsityCallback(METHOD, sparsity=0.7)

    def train():
        module = Net()
        trainer_of([callback, EMAWeightAveraging()], gradient_clip_val=1.0).fit(module, loader(batches(6)))
        return weakref.ref(module), weakref.ref(callback.sparsifier)

    model, sparsifier = train()
    gc.collect()
    assert sparsifier() is not None
    callback.detach()
    gc.collect()
    assert model() is None
    assert sparsifier() is None
    assert callback.sparsifier is None
    trainer_of([callback]).fit(Net(), loader(batches(2)))


def hooks_of(trainer):
    return [h for o in trainer.optimizers for h in (*o._optimizer_step_post_hooks, *o._optimizer_step_pre_hooks)]


def test_no_hooks_are_left_on_the_optimizers():
    seen = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(len(hooks_of(trainer)))

    class Keep(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            self.optimizers = list(trainer.optimizers)

    keep, callback = Keep(), SparsityCallback(METHOD, sparsity=0.7)
    trainer = trainer_of([callback, Count(), keep])
    trainer.fit(Net(), loader(batches(5)))
    assert seen == [1] * 5
    assert hooks_of(keep) == []
    assert keep.optimizers


def test_an_exception_leaves_the_optimizer_as_it_was():
    class Breaks(Net):
        broken = True

        def on_before_optimizer_step(self, optimizer):
            if self.broken and self.trainer.global_step == 6:
                assert len(optimizer.param_groups) > 1  # the scaled groups
                self.held = optimizer
                raise RuntimeError("out of luck")

    module, callback = Breaks(), SparsityCallback(METHOD, sparsity=0.7, density_scaling=True)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer_of([callback]).fit(module, loader(batches()))
    assert len(module.held.param_groups) == 1
    assert module.held.param_groups[0]["lr"] == 0.01
    assert hooks_of(type("T", (), {"optimizers": [module.held]})) == []
    assert callback.sparsifier.step == 6
    module.broken = False
    trainer_of([callback]).fit(module, loader(batches(3)))
    assert callback.sparsifier.step == 9
    exact(module, callback.sparsifier)


def test_a_sparse_optimizer_beside_the_callback_is_refused():
    class Twice(Net):
        def configure_optimizers(self):
            return SparseOptimizer(super().configure_optimizers(), Sparsifier(self, METHOD, sparsity=0.7))

    with pytest.raises(SparsityError, match="returned a SparseOptimizer and the trainer has a SparsityCallback"):
        fit(Twice())


def test_an_optimizer_without_sparse_weights_is_refused():
    class Biases(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.ndim == 1], lr=0.1)

    with pytest.raises(SparsityError, match="No optimizer of the module trains a sparse weight"):
        fit(Biases())


def test_test_without_fit():
    class Tested(Net):
        def test_step(self, batch, index):
            self.tested = True

    module, callback = Tested(), SparsityCallback(METHOD, sparsity=0.7)
    trainer_of([callback]).test(module, loader(batches(2)), verbose=False)
    assert module.tested
    assert callback.sparsifier is None
    assert all((p != 0).all() for p in module.parameters())


def test_barebones():
    module, callback = Net(), SparsityCallback(METHOD, sparsity=0.7)
    trainer = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[callback])
    trainer.fit(module, loader(batches()))
    same(module, callback.sparsifier, *by_hand())
