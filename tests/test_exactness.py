"""Exact sparsity after every step under real training, and resume to the bit."""

import copy
import io

import pytest
import torch
from torch import nn

import sparselearn as sl

METHODS = {
    "static": lambda: sl.static(),
    "set": lambda: sl.set_(stop=18, every=4),
    "rigl": lambda: sl.rigl(stop=18, every=4),
    "rigl-stepping": lambda: sl.rigl(stop=18, every=4, skip_step=False),
    "rigl-initial": lambda: sl.rigl(stop=18, every=4, grow_init=sl.criteria.initial_distribution(2)),
    "gmp": lambda: sl.gmp(stop=18, every=3, start=3),
    "gmp-global": lambda: sl.gmp(stop=18, every=3, start=3, scope="global"),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def setup(method: str, optimizer: str = "sgd", dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 4))
    model = model.to(dtype)
    sparsifier = sl.Sparsifier(model, METHODS[method](), sparsity=0.7, **options)
    return model, sparsifier, sl.SparseOptimizer(OPTIMIZERS[optimizer](model.parameters()), sparsifier)


def batch(step: int, dtype: torch.dtype = torch.float32, n: int = 16):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, 2, 5, 5, generator=generator)
    return x.to(dtype), torch.randint(4, (n,), generator=generator)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x).float(), y)


def train(model, optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, *batch(step)).backward()
        optimizer.step()


def check_exact(model, sparsifier, optimizer) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in sparsifier.masks.items():
        assert int(mask.sum()) == sparsifier.state.layers[name].nnz
        assert not parameters[name][~mask].any()
        for value in optimizer.state[parameters[name]].values():
            if torch.is_tensor(value) and value.shape == mask.shape:
                assert not value[~mask].any()


@pytest.mark.parametrize(
    ("method", "optimizer_name", "style", "dtype"),
    [
        *((m, o, "plain", torch.float32) for m in METHODS for o in OPTIMIZERS),
        *((m, o, "plain", torch.bfloat16) for m in METHODS for o in ("sgd", "adamw-fused")),
        *((m, "adamw-foreach", style, torch.float32) for m in METHODS for style in ("closure", "accumulation")),
    ],
    ids=str,
)
def test_exact_after_every_step(method, optimizer_name, style, dtype) -> None:
    model, sparsifier, optimizer = setup(method, optimizer_name, dtype, density_scaling=style == "plain")
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for step in range(20):
        optimizer.zero_grad()
        if style == "closure":

            def closure(step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, *batch(step, dtype))
                loss.backward()
                return loss

            assert optimizer.step(closure).isfinite()
        else:
            for part in range(2 if style == "accumulation" else 1):
                loss_of(model, *batch(100 * part + step, dtype)).backward()
            optimizer.step()
        check_exact(model, sparsifier, optimizer)
    assert sparsifier.step == 20
    moved = any(not torch.equal(first[name], mask) for name, mask in sparsifier.masks.items())
    assert moved == (method != "static")
    if "gmp" in method:
        sizes = sum(m.numel() for m in sparsifier.masks.values())
        assert sparsifier.nnz == round(0.3 * sizes)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw-fused"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [3, 4, 5, 9])
def test_resume_is_bit_exact(method, optimizer_name, at) -> None:
    whole, whole_sparsifier, whole_optimizer = setup(method, optimizer_name, density_scaling=True)
    train(whole, whole_optimizer, 0, 22)
    model, _, optimizer = setup(method, optimizer_name, density_scaling=True)
    train(model, optimizer, 0, at)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, sparsifier, optimizer = setup(method, optimizer_name, density_scaling=True, seed=99)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, at, 22)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for name, mask in whole_sparsifier.masks.items():
        assert torch.equal(mask, sparsifier.masks[name])


def test_resume_with_the_wrong_weights_is_refused() -> None:
    model, _, optimizer = setup("rigl")
    train(model, optimizer, 0, 6)
    saved = copy.deepcopy(optimizer.state_dict())
    model, _, optimizer = setup("rigl", seed=5)  # the model's weights are not loaded
    optimizer.load_state_dict(saved)
    with pytest.raises(sl.SparsityError, match="nonzero weights inside the mask that was loaded"):
        train(model, optimizer, 6, 7)


def test_hand_written_loop_equals_the_wrapper() -> None:
    model, _, optimizer = setup("rigl-stepping", density_scaling=True)
    train(model, optimizer, 0, 20)
    other, sparsifier, wrapped = setup("rigl-stepping", density_scaling=True)
    for step in range(20):
        wrapped.base.zero_grad()
        loss_of(other, *batch(step)).backward()
        sparsifier.before_step(wrapped.base)
        wrapped.base.step()
        sparsifier.after_step(wrapped.base)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("skip_step", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_steps_that_grad_scaler_skips(explicit, skip_step, set_to_none) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    sparsifier = sl.Sparsifier(model, sl.rigl(stop=30, every=2, skip_step=skip_step), sparsity=0.5)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    taken = 0
    for step in range(20):
        model.zero_grad(set_to_none=set_to_none)  # not the wrapper's: it has no way to notice
        overflow = step in (2, 3, 7)  # update steps among them
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 20, generator=generator), torch.randint(4, (8,), generator=generator)
        scaler.scale(nn.functional.cross_entropy(model(x), y) * (float("inf") if overflow else 1)).backward()
        before = [p.detach().clone() for p in model.parameters()], {n: m.clone() for n, m in sparsifier.masks.items()}
        if explicit:
            scaler.unscale_(optimizer)
            optimizer.before_step()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
            assert all(torch.equal(before[1][n], m) for n, m in sparsifier.masks.items())
        taken += not overflow
        assert sparsifier.step == taken
        check_exact(model, sparsifier, optimizer)


def test_the_masked_gradient_is_clipped() -> None:
    model, sparsifier, optimizer = setup("static")
    loss_of(model, *batch(0)).backward()
    parameters = dict(model.named_parameters())
    squares = sum(float((p.grad * sparsifier.masks.get(n, 1)).square().sum()) for n, p in parameters.items())
    optimizer.before_step()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)) == pytest.approx(squares**0.5)


def test_density_scaling_equals_groups_by_hand_and_leaves_groups_alone() -> None:
    model, sparsifier, optimizer = setup("static", density_scaling=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    other, other_sparsifier, _ = setup("static", init="density")
    groups = []
    for name, parameter in other.named_parameters():
        density = other_sparsifier.densities.get(name, 1.0)
        groups.append({"params": [parameter], "lr": 0.1 / density, "weight_decay": 0.01 * density})
    by_hand = sl.SparseOptimizer(torch.optim.SGD(groups, momentum=0.9), other_sparsifier)
    other_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(by_hand, 30)
    for step in range(20):
        for net, opt, sched in ((model, optimizer, schedule), (other, by_hand, other_schedule)):
            train(net, opt, step, step + 1)
            sched.step()
        assert len(optimizer.param_groups) == 1
        assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert sparsifier.nnz == other_sparsifier.nnz


@pytest.mark.parametrize("width", [256, 512, 1024])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_activations_and_updates_do_not_depend_on_density(kind, width) -> None:
    """A coordinate check: RMS of an output layer's inputs, and of their change by one step, over density 1 to 1/32."""

    def measure(density: float, scaling: bool) -> tuple[float, float]:
        sizes, moves = [], []
        for seed in range(3):
            torch.manual_seed(seed)
            layers = [nn.Linear(width, width, bias=False) for _ in range(3)]
            for layer in layers:
                nn.init.normal_(layer.weight, std=(2 / width) ** 0.5)
            body = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
            head = nn.Linear(width, 1, bias=False)
            nn.init.normal_(head.weight, std=1 / width)
            model = nn.Sequential(body, head)
            sparsifier = sl.Sparsifier(
                model, sl.static(), sparsity=1 - density, distribution=sl.distributions.uniform, exclude=["1.weight"],
                density_scaling=scaling, seed=seed,
            )  # fmt: skip
            parameters = list(body.parameters())
            base = torch.optim.Adam(parameters, lr=1e-4) if kind == "adam" else torch.optim.SGD(parameters, lr=1.0)
            optimizer = sl.SparseOptimizer(base, sparsifier)
            x = torch.randn(16, width)
            before = body(x)
            (model(x).squeeze() * torch.randn(16)).mean().backward()
            optimizer.step()
            moves.append(float((body(x) - before).detach().square().mean().sqrt()))
            sizes.append(float(before.detach().square().mean().sqrt()))
        return sum(sizes) / 3, sum(moves) / 3

    dense = measure(1 - 1e-9, True)
    for density in (1 / 2, 1 / 8, 1 / 32):
        size, move = measure(density, True)
        assert 0.7 < size / dense[0] < 1.4
        assert 0.5 < move / dense[1] < 2.0
    plain = measure(1 / 32, False)
    assert plain[0] < 0.1 * dense[0]
    assert plain[1] < 0.1 * dense[1]
