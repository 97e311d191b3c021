"""`SparseOptimizer(..., fused=True)` is `SparseOptimizer(...)`: through the formulas, on the CPU."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import sparselearn as sl
from sparselearn import SparsityError, criteria
from sparselearn.kernels import masked_optimizer
from sparselearn.methods.straight_through import masked_decay

Make = Callable[[nn.Module], torch.optim.Optimizer]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups with other numbers; the biases are not sparse."""
    first, *_, last = model.children()
    rest = [p for p in model.parameters() if not any(p is q for q in (first.weight, *last.parameters()))]
    return [{"params": [first.weight, *rest]}, {"params": list(last.parameters()), "lr": 0.03, "weight_decay": 0.2}]


OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda m: torch.optim.AdamW(groups(m), lr=0.01, weight_decay=0.1),
    "Adam maximize": lambda m: torch.optim.Adam(groups(m), lr=0.01, weight_decay=0.1, maximize=True),
    "SGD": lambda m: torch.optim.SGD(groups(m), lr=0.01, weight_decay=0.01),
    "Nesterov": lambda m: torch.optim.SGD(groups(m), lr=torch.tensor(0.01), momentum=0.9, nesterov=True),
}
MASKED: dict[str, Callable[[], Any]] = {
    "rigl": lambda: sl.rigl(stop=16, every=5),
    "rigl with a step": lambda: sl.rigl(stop=16, every=5, skip_step=False),
    "set": lambda: sl.set_(stop=16, every=5),
    "static": sl.static,
    "srigl": lambda: sl.srigl(stop=16, every=5),
}
STRAIGHT: dict[str, Callable[[], Any]] = {
    "sr_ste": lambda: sl.sr_ste(sl.NM(2, 4), decay=0.02),
    "sr_ste with a schedule": lambda: sl.StraightThrough(
        sl.NM(2, 4), every=3, penalty=masked_decay(lambda step: 1e-3 * step), penalty_after_clip=True
    ),
    "ste": lambda: sl.ste(sl.NM(1, 4)),
    "mdgf": lambda: sl.mdgf(sl.NM(2, 4), stop=12),
}


class Run:
    """A model in training; two of the same seed see the same batches."""

    def __init__(self, method: Any, make: Make, fused: bool, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
        if isinstance(method, sl.DropGrow):
            options = {"sparsity": 0.7} | options
        self.sparsifier = sl.Sparsifier(self.model, method, **options)
        self.optimizer = sl.SparseOptimizer(make(self.model), self.sparsifier, fused=fused)

    def backward(self, number: int) -> torch.Tensor:
        x = torch.randn(6, 20, generator=torch.Generator().manual_seed(number))
        loss = self.model(x).square().mean()
        loss.backward()
        return loss

    def steps(self, start: int, stop: int) -> None:
        for number in range(start, stop):
            self.optimizer.zero_grad()
            self.backward(number)
            self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that training has changed."""
        found = {name: p.detach() for name, p in self.model.named_parameters()}
        found |= {f"{name} mask": mask for name, mask in self.sparsifier.masks.items()}
        found |= {f"{name} dense": layer.dense for name, layer in self.sparsifier.state.layers.items()}
        for name, p in self.model.named_parameters():
            slots = self.optimizer.state[p]
            found |= {f"{name} {key}": value for key, value in slots.items() if torch.is_tensor(value)}
        return found


def assert_equal(a: Run, b: Run) -> None:
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    assert a.sparsifier.state_dict()["layers"].keys() == b.sparsifier.state_dict()["layers"].keys()
    assert a.sparsifier.step == b.sparsifier.step


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each fused step has taken."""
    counts: list[int] = []
    real = masked_optimizer.step

    def step(optimizer: torch.optim.Optimizer, targets: Any) -> None:
        counts.append(len(targets))
        real(optimizer, targets)

    monkeypatch.setattr(masked_optimizer, "step", step)
    return counts


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MASKED)
def test_fused_training_is_unfused_training(name: str, optimizer: str, taken: list[int]) -> None:
    runs = [Run(MASKED[name](), OPTIMIZERS[optimizer], fused) for fused in (False, True)]
    for start in range(0, 24, 6):
        for run in runs:
            run.steps(start, start + 6)
        assert_equal(*runs)
        for weight, layer in runs[1].sparsifier.layers_of(runs[1].optimizer).values():
            assert not weight.parameter[~layer.mask].any()
            for slot in runs[1].optimizer.state[weight.parameter].values():
                assert not torch.is_tensor(slot) or slot.shape != layer.mask.shape or not slot[~layer.mask].any()
    assert len(taken) >= 18  # all but the first, on which torch makes its state, and the updates
    assert set(taken) == {3}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STRAIGHT)
def test_fused_straight_through_training_is_unfused_training(name: str, optimizer: str, taken: list[int]) -> None:
    runs = [Run(STRAIGHT[name](), OPTIMIZERS[optimizer], fused) for fused in (False, True)]
    for run in runs:
        run.steps(0, 55)  # over a sampled step
    assert_equal(*runs)
    assert runs[0].sparsifier.metrics() == runs[1].sparsifier.metrics()
    assert taken == [3] * 53


@pytest.mark.parametrize("make", [
    lambda m: torch.optim.AdamW(groups(m), lr=0.01, fused=True),
    lambda m: torch.optim.AdamW(groups(m), lr=0.01, foreach=True),
    lambda m: torch.optim.SGD(groups(m), lr=0.01, momentum=0.9, dampening=0.1, fused=True),
])  # fmt: skip
def test_other_implementations_of_torch_differ_by_roundings(make: Make, taken: list[int]) -> None:
    runs = [Run(sl.static(), make, fused) for fused in (False, True)]
    for run in runs:
        run.steps(0, 8)
    for name, tensor in runs[0].tensors().items():
        torch.testing.assert_close(runs[1].tensors()[name], tensor, rtol=1e-5, atol=1e-6)
    assert taken == [3] * 7 or taken == [3] * 8


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True)])
@pytest.mark.parametrize("name", ["rigl", "sr_ste"])
def test_checkpoints_are_those_of_unfused_training(name: str, first: bool, then: bool, taken: list[int]) -> None:
    method = (MASKED | STRAIGHT)[name]
    whole = Run(method(), OPTIMIZERS["AdamW"], False)
    whole.steps(0, 16)
    half = Run(method(), OPTIMIZERS["AdamW"], first)
    half.steps(0, 8)
    with half.sparsifier.dense_weights():
        saved = copy.deepcopy((half.model.state_dict(), half.optimizer.state_dict()))
    resumed = Run(method(), OPTIMIZERS["AdamW"], then)
    with resumed.sparsifier.dense_weights():
        resumed.model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    assert saved[1].keys() == whole.optimizer.state_dict().keys()
    resumed.steps(8, 16)
    assert_equal(whole, resumed)
    assert taken


def test_nan_outside_the_masks_reaches_nothing(taken: list[int]) -> None:
    runs = [Run(sl.static(), OPTIMIZERS["AdamW"], fused) for fused in (False, True)]
    for run in runs:
        run.steps(0, 2)
        for number in range(2, 5):
            run.optimizer.zero_grad()
            run.backward(number)
            for weight, layer in run.sparsifier.layers_of(run.optimizer).values():
                assert weight.parameter.grad is not None
                weight.parameter.grad[~layer.mask] = torch.nan
            run.optimizer.step()
    assert_equal(*runs)
    assert all(torch.isfinite(t).all() for t in runs[1].tensors().values())
    assert len(taken) == 4


def test_gradients_are_there_again_after_a_step_and_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(sl.static(), OPTIMIZERS["AdamW"], True)
    run.steps(0, 1)
    for broken in (False, True):
        run.optimizer.zero_grad()
        run.backward(1)
        before = {p: p.grad.clone() for p in run.model.parameters() if p.grad is not None}
        weights = [p.detach().clone() for p in run.model.parameters()]
        if broken:
            monkeypatch.setattr(masked_optimizer, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
            with pytest.raises(RuntimeError, match="broken"):
                run.optimizer.step()
            sparse = [(p, w) for p, w in zip(run.model.parameters(), weights, strict=True) if p.ndim == 2]
            assert all(torch.equal(p, w) for p, w in sparse)
            assert run.sparsifier.step == 2
        else:
            run.optimizer.step()
        assert all(p.grad is not None and torch.equal(p.grad, grad) for p, grad in before.items())
    assert not run.sparsifier.in_step(run.optimizer.base)


@pytest.mark.parametrize("name", ["rigl", "sr_ste"])
def test_clipping_scheduling_closures_and_accumulation_go_on_as_before(name: str, taken: list[int]) -> None:
    runs = [Run((MASKED | STRAIGHT)[name](), OPTIMIZERS["AdamW"], fused) for fused in (False, True)]
    for run in runs:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 20)
        for number in range(12):
            run.optimizer.zero_grad()
            run.backward(number)
            run.backward(100 + number)
            if number % 3 == 0:
                run.optimizer.before_step()
                nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
            if number % 3 == 1:
                loss = run.optimizer.step(lambda run=run, number=number: run.backward(number))
                assert loss > 0
            else:
                run.optimizer.step()
            schedule.step()
    assert_equal(*runs)
    assert taken


@pytest.mark.parametrize("name", ["rigl", "sr_ste"])
def test_steps_that_a_scaler_skips_change_nothing(name: str, taken: list[int]) -> None:
    runs = [Run((MASKED | STRAIGHT)[name](), OPTIMIZERS["AdamW"], fused) for fused in (False, True)]
    for run in runs:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for number in range(12):
            run.optimizer.zero_grad()
            x = torch.randn(6, 20, generator=torch.Generator().manual_seed(number))
            scaler.scale(run.model(x).square().mean()).backward()
            if number % 4 == 2:
                grad = next(run.model.parameters()).grad
                assert grad is not None
                grad[0, 0] = torch.inf
            scaler.step(run.optimizer)
            scaler.update()
        assert run.sparsifier.step == 9
    assert_equal(*runs)
    assert 0 < len(taken) < 9


def test_density_scaling_reaches_the_fused_step(taken: list[int]) -> None:
    runs = [Run(sl.static(), OPTIMIZERS["AdamW"], fused, density_scaling=True) for fused in (False, True)]
    for run in runs:
        run.steps(0, 6)
    assert_equal(*runs)
    assert taken == [3] * 5


def test_a_weight_that_does_not_fit_goes_torch_s_way_alone(taken: list[int]) -> None:
    runs = [Run(sl.static(), OPTIMIZERS["AdamW"], fused) for fused in (False, True)]
    for run in runs:
        for number in range(4):
            run.optimizer.zero_grad()
            run.backward(number)
            weight = run.model[0].weight
            assert isinstance(weight, nn.Parameter)
            assert weight.grad is not None
            weight.grad = weight.grad.t().contiguous().t()
            run.optimizer.step()
    assert_equal(*runs)
    assert taken == [2] * 3


@dataclass(frozen=True)
class gradient_of_the_step(criteria.tracker):
    """Remembers what the optimizer was given."""

    key: str = "given"

    def after_step(self, layer: sl.Layer, value: torch.Tensor) -> torch.Tensor:
        return value if layer.grad is None else layer.grad.clone()


@dataclass(frozen=True)
class by_given_gradient:
    trackers = (gradient_of_the_step(),)

    def __call__(self, layer: sl.Layer) -> torch.Tensor:
        return layer.memory["given"].abs()


DECLINED: dict[str, tuple[Callable[[], Any], Make]] = {
    "RMSprop": (sl.static, lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01)),
    "AMSGrad": (sl.static, lambda m: torch.optim.Adam(m.parameters(), amsgrad=True)),
    "state of inactive weights": (lambda: replace(sl.static(), optimizer_state="keep"), OPTIMIZERS["AdamW"]),
    "gradients are followed": (
        lambda: replace(sl.rigl(stop=16, every=5), grow=criteria.average_gradient()), OPTIMIZERS["AdamW"],
    ),
    "gradients are shown": (
        lambda: replace(sl.rigl(stop=16, every=5), grow=by_given_gradient()), OPTIMIZERS["AdamW"],
    ),
    "chain": (lambda: sl.mdgf(sl.NM(2, 4), stop=12, gradient="chain"), OPTIMIZERS["AdamW"]),
    "top_kast": (lambda: sl.top_kast(exploration=0.1), OPTIMIZERS["AdamW"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_what_it_does_not_compute_goes_the_usual_way(name: str, taken: list[int]) -> None:
    method, make = DECLINED[name]
    options = {"sparsity": 0.7} if name == "top_kast" else {}
    runs = [Run(method(), make, fused, **options) for fused in (False, True)]
    for run in runs:
        run.steps(0, 12)
    assert_equal(*runs)
    for name_, layer in runs[0].sparsifier.state.layers.items():
        other = runs[1].sparsifier.state.layers[name_].memory
        assert all(torch.equal(value, other[key]) for key, value in layer.memory.items())
    assert not taken


def test_hooks_of_the_base_optimizer_see_the_usual_step(taken: list[int]) -> None:
    runs = [Run(sl.static(), OPTIMIZERS["AdamW"], fused) for fused in (False, True)]
    for run in runs:

        def halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad.mul_(0.5)

        run.optimizer.base.register_step_pre_hook(halve)
        run.steps(0, 4)
    assert_equal(*runs)
    assert not taken


def test_weights_that_were_changed_between_steps_are_masked_again(taken: list[int]) -> None:
    runs = [Run(sl.static(), OPTIMIZERS["AdamW"], fused) for fused in (False, True)]
    for run in runs:
        run.steps(0, 2)
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(0.1)
        run.steps(2, 3)
    assert_equal(*runs)
    assert taken == [3, 3]


def test_fused_steps_and_released_gradients_exclude_each_other() -> None:
    model = nn.Linear(20, 10)
    sparsifier = sl.Sparsifier(model, sl.static(), sparsity=0.5)
    with pytest.raises(SparsityError) as error:
        sl.SparseOptimizer(torch.optim.SGD(model.parameters()), sparsifier, fused=True, release_gradients=True)
    assert str(error.value) == (
        "`fused` reads the dense gradients of sparse weights, which `release_gradients` frees. Leave one of the two "
        "out."
    )
