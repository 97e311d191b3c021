"""The engine on a CUDA device (run by name: `pytest -m gpu tests/test_gpu.py`)."""

import pytest
import torch
from torch import nn

import sparselearn as sl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # advice of torch.compile (2.11)
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def check_exact(model: nn.Module, sparsifier: sl.Sparsifier, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in sparsifier.masks.items():
        parameter = parameters[name]
        assert mask.device == parameter.device
        assert int(mask.sum()) == sparsifier.state.layers[name].nnz
        assert not parameter[~mask].any()
        for value in optimizer.state[parameter].values():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                assert not value[~mask].any()


def test_equal_masks_on_cpu_and_gpu() -> None:
    masks = []
    for device in ("cpu", "cuda"):
        sparsifier = sl.Sparsifier(network().to(device), sl.static(), sparsity=0.9, seed=3)
        masks.append({name: mask.cpu() for name, mask in sparsifier.masks.items()})
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_sparsifier_follows_the_model_to_the_gpu() -> None:
    model = network()
    sparsifier = sl.Sparsifier(model, sl.set_(stop=20, every=3), sparsity=0.8)
    model.cuda()
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 12, 12, device="cuda")).square().mean().backward()
        optimizer.step()
        check_exact(model, sparsifier, optimizer)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("skip_step", [True, False])
def test_fp16_with_grad_scaler(options: dict[str, bool], skip_step: bool) -> None:
    model = network().cuda().to(memory_format=torch.channels_last)
    sparsifier = sl.Sparsifier(
        model, sl.rigl(stop=40, every=4, skip_step=skip_step), sparsity=0.8, density_scaling=True
    )
    optimizer = sl.SparseOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3, **options), sparsifier)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # overflows at first, so that steps are skipped
    taken = 0
    for _ in range(60):
        optimizer.zero_grad()
        x = torch.randn(16, 3, 12, 12, device="cuda").to(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(x), torch.randint(10, (16,), device="cuda"))
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        taken += scaler.get_scale() >= before
        check_exact(model, sparsifier, optimizer)
    assert 0 < taken < 60
    assert sparsifier.step == taken


def test_gpu_and_cpu_train_alike() -> None:
    weights = []
    for device in ("cpu", "cuda"):
        model = network().double().to(device)
        sparsifier = sl.Sparsifier(model, sl.rigl(stop=40, every=4), sparsity=0.8)
        optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            x = torch.randn(16, 3, 12, 12, generator=generator).double().to(device)
            y = torch.randint(10, (16,), generator=generator).to(device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        weights.append([p.detach().cpu() for p in model.parameters()])
    for cpu, gpu in zip(*weights, strict=True):
        torch.testing.assert_close(cpu, gpu, rtol=1e-6, atol=1e-8)


def test_compiled_model_does_not_recompile_at_updates() -> None:
    model = network().cuda()
    sparsifier = sl.Sparsifier(model, sl.rigl(stop=40, every=3), sparsity=0.8)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    compiled = torch.compile(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(10):
            optimizer.zero_grad()
            compiled(torch.randn(8, 3, 12, 12, device="cuda")).square().mean().backward()
            optimizer.step()
    check_exact(model, sparsifier, optimizer)


@pytest.mark.parametrize("method", [sl.rigl(stop=100, every=2), sl.sr_ste(sl.NM(2, 4))], ids=["rigl", "sr_ste"])
def test_a_model_that_was_moved_to_the_cpu_is_saved_looked_at_and_masked(method: sl.DropGrow) -> None:
    model = network().to("cuda")
    exclude = ["0.weight"] if isinstance(method, sl.StraightThrough) else []
    sparsity = None if isinstance(method, sl.StraightThrough) else 0.5
    sparsifier = sl.Sparsifier(model, method, sparsity=sparsity, exclude=exclude)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 8, 8, device="cuda")).square().mean().backward()
        optimizer.step()
    there = sparsifier.state_dict()
    model.cpu()
    here = sparsifier.state_dict()
    for name, row in there["layers"].items():
        assert row["nonzero"] == here["layers"][name]["nonzero"]
        assert torch.equal(row["mask"], here["layers"][name]["mask"])
    sparsifier.summary()
    sparsifier.apply_masks()
    with sparsifier.dense_weights():
        pass
    assert all(mask.device.type == "cpu" for mask in sparsifier.masks.values())


@pytest.mark.parametrize("variant", ["rigl", "nm"])
def test_recipes_train_alike_in_cuda_graphs(tmp_path, variant) -> None:
    from sparselearn.config import load
    from sparselearn.recipes.train import train

    weights = []
    for mode in ("default", "reduce-overhead"):
        changes = [f"variant={variant}", "max_steps=60", f"compile={mode}", *["method.every=5"] * (variant == "rigl")]
        train(load("digits", changes), tmp_path / mode, progress=False)
        weights.append(torch.load(tmp_path / mode / "model.pt", map_location="cpu", weights_only=False)["model"])
    for name, value in weights[0].items():
        assert torch.equal(value != 0, weights[1][name] != 0), name
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-5)
