"""Right under real training: every optimizer, precision and habit of a training loop keeps the masks exact."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import sparselearn as sl

METHODS = {
    "static": lambda: sl.static(),
    "set": lambda: sl.set_(stop=12, every=3),
    "rigl": lambda: sl.rigl(stop=12, every=3),
    "rigl-stepping": lambda: sl.rigl(stop=12, every=3, skip_step=False),
    "gmp": lambda: sl.gmp(stop=11, every=2),
    "gmp-global": lambda: sl.gmp(stop=11, every=2, scope="global"),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}
FP32, BF16 = torch.float32, torch.bfloat16


def admission_cases() -> Iterator[tuple[str, str, torch.dtype, str]]:
    """All methods with all optimizers once; what may interact with a method's step with three kinds of state."""
    for method in METHODS:
        for name in OPTIMIZERS:
            yield method, name, FP32, "plain"
        for name in ("momentum", "adamw-fused", "rmsprop"):
            yield method, name, BF16, "plain"
            for style in ("closure", "accumulation", "autocast"):
                yield method, name, FP32, style
    yield "rigl", "adagrad", BF16, "accumulation"
    yield "rigl", "adamw-foreach", BF16, "closure"


def mlp(dtype: torch.dtype = FP32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4)).to(dtype)


def batch(step: int, dtype: torch.dtype = FP32, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(n, 12, generator=generator).to(dtype), torch.randint(4, (n,), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).to(torch.promote_types(x.dtype, FP32)), y)


def build(method: str = "rigl", optimizer: str = "momentum", **options: object):
    model = mlp()
    sparsifier = sl.Sparsifier(model, METHODS[method](), sparsity=0.7, **options)
    return model, sparsifier, sl.SparseOptimizer(OPTIMIZERS[optimizer](model.parameters()), sparsifier)


def train(model: nn.Module, optimizer: sl.SparseOptimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, *batch(step)).backward()
        optimizer.step()


def masks_of(sparsifier: sl.Sparsifier) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in sparsifier.masks.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_exact(model: nn.Module, sparsifier: sl.Sparsifier, optimizer: torch.optim.Optimizer) -> int:
    """Counts, weights and optimizer state; returns how many weight-shaped state tensors were seen."""
    parameters, seen = dict(model.named_parameters()), 0
    for name, mask in sparsifier.masks.items():
        assert int(mask.sum()) == sparsifier.state.layers[name].nnz
        assert torch.count_nonzero(parameters[name][~mask]) == 0
        for value in optimizer.state.get(parameters[name], {}).values():
            if torch.is_tensor(value) and value.shape == mask.shape:
                assert torch.count_nonzero(value[~mask]) == 0
                seen += 1
    return seen


# ---- every method, optimizer, precision and habit ------------------------------------------------------


@pytest.mark.parametrize(("method", "name", "dtype", "style"), list(admission_cases()), ids=str)
def test_exact_after_every_step(method: str, name: str, dtype: torch.dtype, style: str) -> None:
    model = mlp(dtype)
    value = METHODS[method]()
    sparsifier = sl.Sparsifier(model, value, sparsity=0.7)
    optimizer = sl.SparseOptimizer(OPTIMIZERS[name](model.parameters()), sparsifier)
    sizes = {n: m.numel() for n, m in sparsifier.masks.items()}
    budget = {n: int(m.sum()) for n, m in sparsifier.masks.items()}
    moves = 0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, *batch(step, dtype))
        loss.backward()
        return loss

    for step in range(14):
        before, weights = masks_of(sparsifier), values_of(model)
        optimizer.zero_grad()
        if style == "closure":
            assert optimizer.step(closure).isfinite()
        else:
            for part in range(2 if style == "accumulation" else 1):
                with torch.autocast("cpu", BF16, enabled=style == "autocast"):
                    loss = loss_of(model, *batch(100 * part + step, dtype))
                loss.backward()
            optimizer.step()
        seen = check_exact(model, sparsifier, optimizer)
        changed = not equal(before, sparsifier.masks)
        moves += changed
        assert not changed or value.due(step)
        skipped = value.due(step) and value.skip_step
        assert equal(weights, values_of(model)) == (skipped and not changed)
        assert name == "sgd" or seen >= len(sizes)
        if "gmp" not in method:
            assert budget == {n: int(m.sum()) for n, m in sparsifier.masks.items()}
    assert sparsifier.step == 14
    assert moves == {"static": 0, "set": 3, "rigl": 3, "rigl-stepping": 3}.get(method, 5)
    if "gmp" in method:
        assert sparsifier.nnz == sum(sl.Sparsifier(mlp(), sl.static(), sparsity=0.7).state.layers[n].nnz for n in sizes)


def test_dense_gradients_would_fill_the_optimizer_state() -> None:
    """The admission test's check can fail: the same steps without the sparsifier leave no zeros."""
    model, sparsifier, optimizer = build("static")
    loss_of(model, *batch(0)).backward()
    optimizer.base.step()
    with pytest.raises(AssertionError):
        check_exact(model, sparsifier, optimizer)


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "adamw-fused", "rmsprop"])
def test_grown_weights_start_with_an_empty_state(name: str) -> None:
    model, sparsifier, optimizer = build("rigl", name)
    train(model, optimizer, 0, 3)
    before = masks_of(sparsifier)
    train(model, optimizer, 3, 4)
    parameters, grown_total = dict(model.named_parameters()), 0
    for key, mask in sparsifier.masks.items():
        grown, stayed = mask & ~before[key], mask & before[key]
        grown_total += int(grown.sum())
        assert not parameters[key][grown].any()
        for value in optimizer.state[parameters[key]].values():
            if value.shape == mask.shape:
                assert not value[grown].any()
                assert value[stayed].any()
    assert grown_total > 0


# ---- accumulation, closures, clipping ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["set", "rigl", "rigl-stepping", "gmp-global"])
def test_four_micro_batches_are_one_batch(method: str) -> None:
    results = []
    for parts in (1, 4):
        model = mlp(torch.float64)
        sparsifier = sl.Sparsifier(model, METHODS[method](), sparsity=0.7)
        optimizer = sl.SparseOptimizer(OPTIMIZERS["momentum"](model.parameters()), sparsifier)
        for step in range(12):
            optimizer.zero_grad()
            x, y = batch(step, torch.float64)
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_of(model, part_x, part_y) / parts).backward()
            optimizer.step()
        results.append((values_of(model), masks_of(sparsifier)))
    assert equal(results[0][1], results[1][1])
    for key, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][key])


@pytest.mark.parametrize("method", ["rigl", "rigl-stepping"])
def test_a_closure_is_called_once_and_equals_backward_before_step(method: str) -> None:
    model, sparsifier, optimizer = build(method)
    train(model, optimizer, 0, 10)
    other, other_sparsifier, other_optimizer = build(method)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(step)
        other_optimizer.zero_grad()
        loss = loss_of(other, *batch(step))
        loss.backward()
        return loss

    for step in range(10):
        expected = loss_of(other, *batch(step)).detach()
        with torch.no_grad():
            assert torch.equal(other_optimizer.step(closure).detach(), expected)
    assert calls == list(range(10))
    assert equal(values_of(model), values_of(other))
    assert equal(sparsifier.masks, other_sparsifier.masks)


def test_clipping_sees_the_masked_gradient() -> None:
    model, sparsifier, optimizer = build("static", "sgd")
    loss_of(model, *batch(0)).backward()
    dense = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    masked = torch.stack([(p.grad * sparsifier.masks.get(n, 1)).norm() for n, p in model.named_parameters()]).norm()
    optimizer.before_step()
    limit = 0.5 * float(masked)
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    assert float(norm) == pytest.approx(float(masked))
    assert float(norm) < 0.98 * float(dense)
    before = values_of(model)
    optimizer.step()
    moved = torch.stack([(p.detach() - before[n]).norm() for n, p in model.named_parameters()]).norm()
    assert float(moved) == pytest.approx(0.1 * limit, rel=1e-4)  # the step is as long as the clip allows


@pytest.mark.parametrize("method", ["rigl", "rigl-stepping"])
def test_growth_looks_at_unclipped_gradients(method: str) -> None:
    """`before_step` then clipping: masks at an update step equal those of a loop without clipping."""
    masks = []
    for clip in (False, True):
        model, sparsifier, optimizer = build(method)
        train(model, optimizer, 0, 3)
        optimizer.zero_grad()
        loss_of(model, *batch(3)).backward()
        optimizer.before_step()
        optimizer.before_step()  # harmless
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
        optimizer.step()
        masks.append(masks_of(sparsifier))
        if method == "rigl":
            continue
        check_exact(model, sparsifier, optimizer)
    assert method != "rigl" or equal(*masks)
    if method == "rigl-stepping":  # the step itself differs, growth does not: with no step at all only growth is left
        grown = [{k: m & ~masks[0][k] for k, m in ms.items()} for ms in masks]
        assert sum(int(m.sum()) for m in grown[1].values()) <= sum(int(m.sum()) for m in masks[0].values()) // 4


# ---- mixed precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [False, True], ids=["", "density-scaling"])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
@pytest.mark.parametrize("explicit", [False, True], ids=["", "before_step"])
@pytest.mark.parametrize("method", ["rigl", "rigl-stepping", "gmp"])
def test_a_step_that_grad_scaler_skips_never_happened(
    method: str, explicit: bool, set_to_none: bool, scaling: bool
) -> None:
    """Overflow on an ordinary step and on update steps. The run equals, to the bit, one without these batches."""
    overflows = (1, 4, 5, 8)  # 4: the update step after batches 0, 2, 3 was skipped, and again at 5

    def run(skip: bool):
        model, sparsifier, optimizer = build(method, density_scaling=scaling)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(14):
            if step in overflows and not skip:
                scaler.update(scaler.get_scale() / 2)
                schedule.step()
                continue
            model.zero_grad(set_to_none=set_to_none)  # not the wrapper's, which could notice
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, *batch(step))
            scaler.scale(loss * (float("inf") if step in overflows else 1.0)).backward()
            before = values_of(model), masks_of(sparsifier), sparsifier.step
            if explicit:
                scaler.unscale_(optimizer)
                optimizer.before_step()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            if step in overflows:
                assert equal(before[0], values_of(model))
                assert equal(before[1], sparsifier.masks)
                assert sparsifier.step == before[2]
            assert len(optimizer.param_groups) == len(optimizer.state_dict()["param_groups"]) == 1
            check_exact(model, sparsifier, optimizer)
            schedule.step()
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9 ** (step + 1))
        return values_of(model), masks_of(sparsifier), sparsifier.step, scaler.get_scale()

    seen, expected = run(skip=True), run(skip=False)
    assert seen[2:] == expected[2:] == (10, 64.0)
    assert equal(seen[1], expected[1])
    assert equal(seen[0], expected[0])


# ---- non-finite gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("method", ["rigl", "rigl-stepping"])
def test_a_non_finite_gradient_defers_the_update(method: str, bad: float) -> None:
    model, sparsifier, optimizer = build(method)
    train(model, optimizer, 0, 3)
    before = masks_of(sparsifier)
    for step in (3, 4):  # due at 3; not finite at 3 and 4
        optimizer.zero_grad()
        loss_of(model, *batch(step)).backward()
        inactive = (~sparsifier.masks["2.weight"]).nonzero()[0]
        model[2].weight.grad[tuple(inactive)] = bad
        optimizer.step()
        assert equal(before, sparsifier.masks)
        assert all(p.isfinite().all() for p in model.parameters())
        check_exact(model, sparsifier, optimizer)
    train(model, optimizer, 5, 6)
    assert not equal(before, sparsifier.masks)
    assert sparsifier.last_update["step"] == 5
    after = masks_of(sparsifier)
    train(model, optimizer, 6, 7)  # the schedule goes on as it was: due at 6
    assert not equal(after, sparsifier.masks)


# ---- parameters that come, go and freeze ---------------------------------------------------------------


def test_a_parameter_group_added_late() -> None:
    model = mlp()
    sparsifier = sl.Sparsifier(model, METHODS["rigl"](), sparsity=0.7)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model[4].parameters(), lr=0.1, momentum=0.9), sparsifier)
    first = masks_of(sparsifier)
    train(model, optimizer, 0, 5)
    assert torch.equal(first["0.weight"], sparsifier.masks["0.weight"])  # not trained: left alone
    assert not torch.equal(first["4.weight"], sparsifier.masks["4.weight"])
    optimizer.add_param_group({"params": [*model[0].parameters(), *model[2].parameters()], "lr": 0.05})
    assert len(optimizer.base.param_groups) == 2
    optimizer.zero_grad()
    for step in range(5, 8):  # due at 6
        train(model, optimizer, step, step + 1)
        assert {layer.step for layer in sparsifier.state.layers.values()} == {step + 1}
        check_exact(model, sparsifier, optimizer)
        assert torch.equal(first["0.weight"], sparsifier.masks["0.weight"]) == (step < 6)


@pytest.mark.parametrize("method", ["set", "rigl", "rigl-stepping"])
def test_frozen_weights_keep_mask_and_value_until_unfrozen(method: str) -> None:
    model, sparsifier, optimizer = build(method)
    train(model, optimizer, 0, 2)
    model[2].requires_grad_(False)
    optimizer.zero_grad()
    frozen, weight = masks_of(sparsifier), model[2].weight.detach().clone()
    for step in range(2, 8):  # updates at 3 and 6
        train(model, optimizer, step, step + 1)
        check_exact(model, sparsifier, optimizer)
        assert torch.equal(model[2].weight, weight)
        assert torch.equal(frozen["2.weight"], sparsifier.masks["2.weight"])
    assert not torch.equal(frozen["0.weight"], sparsifier.masks["0.weight"])
    model[2].requires_grad_(True)
    for step in range(8, 11):  # update at 9
        train(model, optimizer, step, step + 1)
        check_exact(model, sparsifier, optimizer)
    assert not torch.equal(frozen["2.weight"], sparsifier.masks["2.weight"])


# ---- learning rates and weight decay -------------------------------------------------------------------

SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=12),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("scaling", [False, True], ids=["", "density-scaling"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_give_the_rates_of_the_base_optimizer(name: str, scaling: bool) -> None:
    def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[float, float]]:
        schedule, seen = SCHEDULERS[name](optimizer), []
        for step in range(11):
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
            optimizer.zero_grad()
            loss_of(model, *batch(step)).backward()
            optimizer.step()
            schedule.step(*([1.0] if name == "plateau" else []))
        return seen

    model, _, optimizer = build("rigl", "momentum", density_scaling=scaling)
    dense = mlp()
    expected = rates(OPTIMIZERS["momentum"](dense.parameters()), dense)
    assert rates(optimizer, model) == expected
    assert optimizer.base.param_groups is optimizer.param_groups
    assert len(set(expected)) > 2


@pytest.mark.parametrize("kind", ["coupled", "decoupled"])
def test_weight_decay_shrinks_active_weights_alone(kind: str) -> None:
    """Under zero gradients decay is all that moves; inactive weights stay, and so do not drift where they were cut."""
    model = mlp()
    sparsifier = sl.Sparsifier(model, METHODS["rigl"](), sparsity=0.7)
    base = torch.optim.SGD if kind == "coupled" else torch.optim.AdamW
    optimizer = sl.SparseOptimizer(base(model.parameters(), lr=0.1, weight_decay=0.5), sparsifier)
    for step in range(3):
        before = values_of(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with torch.no_grad():  # whatever is written outside the mask is gone after the step, not decayed
            for name, mask in sparsifier.masks.items():
                model.get_parameter(name)[~mask] = 3.0
        optimizer.step()
        check_exact(model, sparsifier, optimizer)
        for name, mask in sparsifier.masks.items():
            torch.testing.assert_close(model.get_parameter(name)[mask].detach(), before[name][mask] * 0.95)
        assert sparsifier.step == step + 1


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda b: b.__name__)
def test_weight_decay_never_moves_inactive_weights(base: type[torch.optim.Optimizer]) -> None:
    model = mlp()
    sparsifier = sl.Sparsifier(model, METHODS["rigl-stepping"](), sparsity=0.7)
    optimizer = sl.SparseOptimizer(base(model.parameters(), lr=0.05, weight_decay=0.5), sparsifier)
    for step in range(12):
        train(model, optimizer, step, step + 1)
        check_exact(model, sparsifier, optimizer)


# ---- layouts, compilers, copies ------------------------------------------------------------------------


def test_channels_last_masks_lie_like_their_weights() -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten())
        model = model.double().to(memory_format=layout)
        sparsifier = sl.Sparsifier(model, METHODS["rigl"](), sparsity=0.7)
        optimizer = sl.SparseOptimizer(OPTIMIZERS["momentum"](model.parameters()), sparsifier)
        for step in range(8):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step)).double()
            model(x.to(memory_format=layout)).square().mean().backward()
            optimizer.step()
            check_exact(model, sparsifier, optimizer)
            for name, mask in sparsifier.masks.items():
                assert mask.stride() == model.get_parameter(name).stride()
        results.append(masks_of(sparsifier))
    assert equal(*results)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_do_not_recompile_at_mask_updates(backend: str) -> None:
    torch._dynamo.reset()
    model, sparsifier, optimizer = build("rigl", "adamw")
    plain, plain_sparsifier, plain_optimizer = build("rigl", "adamw")
    compiled = torch.compile(model, backend=backend)
    first = masks_of(sparsifier)
    train(compiled, optimizer, 0, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, optimizer, 1, 12)  # updates at 3, 6, 9
        assert not equal(first, sparsifier.masks)
        with pytest.raises(torch._dynamo.exc.RecompileError):  # recompiling would have been noticed
            compiled(torch.zeros(3, 12, dtype=torch.float64).float().requires_grad_())
    train(plain, plain_optimizer, 0, 12)
    assert equal(sparsifier.masks, plain_sparsifier.masks)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["set", "rigl", "gmp"])
def test_a_deepcopy_trains_identically_and_on_its_own(method: str) -> None:
    model, sparsifier, optimizer = build(method, "adamw", density_scaling=True)
    train(model, optimizer, 0, 4)
    twin, twin_sparsifier, twin_optimizer = copy.deepcopy((model, sparsifier, optimizer))
    assert twin_optimizer.sparsifier is twin_sparsifier
    before = values_of(model), masks_of(sparsifier), sparsifier.step
    train(twin, twin_optimizer, 4, 12)
    assert equal(values_of(model), before[0])
    assert equal(sparsifier.masks, before[1])
    assert sparsifier.step == before[2]
    check_exact(twin, twin_sparsifier, twin_optimizer)
    train(model, optimizer, 4, 12)
    assert equal(values_of(model), values_of(twin))
    assert equal(sparsifier.masks, twin_sparsifier.masks)
    assert not equal(sparsifier.masks, before[1])


@pytest.mark.parametrize("masked", [True, False])
def test_weight_averages_are_exactly_sparse(masked: bool) -> None:
    model, sparsifier, optimizer = build("rigl")
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay=0.9)
    )
    if masked:
        sparsifier.on_update(lambda: sparsifier.apply_masks(average))
    outside = 0
    for step in range(12):
        train(model, optimizer, step, step + 1)
        average.update_parameters(model)
        for name, mask in sparsifier.masks.items():
            outside += int(average.module.get_parameter(name)[~mask].count_nonzero())
    assert (outside == 0) == masked  # without the masks the average keeps what was dropped


# ---- several optimizers, refusals, the optimizer interface ---------------------------------------------


def test_two_optimizers_on_one_sparsifier_have_their_own_clocks() -> None:
    model = nn.ModuleDict({"generator": mlp(seed=1), "critic": mlp(seed=2)})
    sparsifier = sl.Sparsifier(model, METHODS["rigl"](), sparsity=0.7)
    generator = sl.SparseOptimizer(torch.optim.Adam(model["generator"].parameters(), lr=0.01), sparsifier)
    critic = sl.SparseOptimizer(torch.optim.Adam(model["critic"].parameters(), lr=0.01), sparsifier)
    for step in range(9):  # the critic steps three times as often
        before = masks_of(sparsifier)
        critic.zero_grad()
        generator.zero_grad()
        (loss_of(model["critic"], *batch(step)) + loss_of(model["generator"], *batch(step))).backward()
        critic.step()
        changed = {name for name, mask in sparsifier.masks.items() if not torch.equal(mask, before[name])}
        assert all(name.startswith("critic.") for name in changed)
        assert bool(changed) == (step in (3, 6))
        if step % 3 == 2:
            generator.step()
    clocks = {name.split(".")[0]: layer.step for name, layer in sparsifier.state.layers.items()}
    assert clocks == {"generator": 3, "critic": 9}
    before = masks_of(sparsifier)
    train(model["generator"], generator, 0, 1)  # its clock is at 3 only now
    changed = {name for name, mask in sparsifier.masks.items() if not torch.equal(mask, before[name])}
    assert changed
    assert all(name.startswith("generator.") for name in changed)
    check_exact(model, sparsifier, generator)
    check_exact(model, sparsifier, critic)


def test_lbfgs_is_refused_everywhere() -> None:
    model = mlp()
    sparsifier = sl.Sparsifier(model, sl.static(), sparsity=0.7)
    base = torch.optim.LBFGS(model.parameters())
    with pytest.raises(sl.SparsityError, match="LBFGS is not supported"):
        sl.SparseOptimizer(base, sparsifier)
    with pytest.raises(sl.SparsityError, match="LBFGS is not supported"):
        sparsifier.before_step(base)


def test_the_wrapper_is_an_optimizer() -> None:
    model, _, optimizer = build("rigl", "adamw")
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert optimizer.defaults["lr"] == 0.01
    train(model, optimizer, 0, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = values_of(model)
    train(model, optimizer, 5, 9)
    expected = values_of(model)
    other, _, other_optimizer = build("rigl", "adamw", seed=7)
    other.load_state_dict(weights)
    other_optimizer.load_state_dict(saved)
    assert other_optimizer.base.param_groups is other_optimizer.param_groups
    train(other, other_optimizer, 5, 9)
    assert equal(values_of(other), expected)
    with pytest.raises(sl.SparsityError, match="saved by a plain optimizer"):
        other_optimizer.load_state_dict(other_optimizer.base.state_dict())


def test_step_hooks_of_the_base_and_the_wrapper_run_once() -> None:
    model, _, optimizer = build("rigl")
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("wrapper"))
    optimizer.base.register_step_post_hook(lambda *_: seen.append("base"))
    train(model, optimizer, 0, 1)
    assert sorted(seen) == ["base", "wrapper"]


@pytest.mark.parametrize(
    "method",
    [
        *(make() for make in METHODS.values()),
        sl.rigl(
            stop=9, every=2, grow_init=sl.criteria.initial_distribution(2), drop_fraction=sl.schedules.constant(0.2)
        ),
    ],
    ids=[*METHODS, "rigl-options"],
)
def test_methods_are_values(method: sl.DropGrow) -> None:
    again = pickle.loads(pickle.dumps(method))
    assert again == method
    assert copy.deepcopy(method) == method
    assert hash(again) == hash(method)
    assert [again.due(t) for t in range(12)] == [method.due(t) for t in range(12)]
