"""The fused masked optimizer on a CUDA device against torch's optimizers (`pytest -m gpu`)."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparselearn as sl
from sparselearn.kernels import masked_optimizer
from sparselearn.kernels.masked_optimizer import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
SHAPES = [(64, 32), (7, 1), (1, 1), (33, 65), (16, 8, 3, 3), (4096, 16)]
OPTIMIZERS = {
    "adamw": lambda p, **k: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **k),
    "adam": lambda p, **k: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, betas=(0.3, 0.99), maximize=True, **k),
    "sgd": lambda p, **k: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, **k),
    "momentum": lambda p, **k: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, **k),
    "nesterov": lambda p, **k: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **k),
}
KINDS = [
    (torch.float32, {"fused": True}),
    (torch.float32, {"foreach": True}),
    (torch.float32, {"foreach": False}),
    (torch.bfloat16, {"fused": True}),  # the other forms round after every operation
    (torch.float16, {"fused": True}),
]


def test_the_kernel_agrees_with_the_formulas():
    script = Path(__file__).with_name("triton_masked_optimizer.py")
    done = subprocess.run([sys.executable, script, "--device", "cuda"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal" in done.stdout


def parameters(dtype):
    """Parameters that are zero outside masks, the fourth-order ones with channels last."""
    g = torch.Generator().manual_seed(0)
    made, masks = [], []
    for shape in SHAPES:
        w, mask = torch.randn(shape, generator=g).to("cuda", dtype), (torch.rand(shape, generator=g) < 0.3).cuda()
        if w.ndim == 4:
            w, mask = (t.to(memory_format=torch.channels_last) for t in (w, mask))
        made.append(nn.Parameter(w.masked_fill_(~mask, 0)))
        masks.append(mask)
    return made, masks


def gradients(made, step):
    g = torch.Generator().manual_seed(100 + step)
    return [torch.empty_like(p).copy_(torch.randn(p.shape, generator=g)) for p in made]


def slots(optimizer, parameter):
    return {k: v for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}


def first_step(optimizer, made, masks):
    for p, grad, mask in zip(made, gradients(made, 0), masks, strict=True):
        p.grad = grad.masked_fill_(~mask, 0)
    optimizer.step()
    for p, mask in zip(made, masks, strict=True):
        p.data.masked_fill_(~mask, 0)
        p.grad = None


def targets(made, masks, grads, clean=True):
    both = zip(made, masks, grads, strict=True)
    return {p: Target(p.data, grad, mask, clean=clean) for p, mask, grad in both}


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize(("dtype", "options"), KINDS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_torch_s_step_with_masking(name, dtype, options, clean):
    made, masks = parameters(dtype)
    theirs, _ = parameters(dtype)
    a, b = OPTIMIZERS[name](made, **options), OPTIMIZERS[name](theirs, **options)
    first_step(a, made, masks)
    for step in range(1, 5):
        b.load_state_dict(copy.deepcopy(a.state_dict()))  # compare single steps, not how roundings add up
        grads = gradients(made, step)
        chosen = targets(made, masks, grads, clean)
        for p, q, grad, mask in zip(made, theirs, grads, masks, strict=True):
            assert masked_optimizer.fits(a, a.param_groups[0], p, chosen[p])
            q.data.copy_(p.data)
            q.grad = grad.clone().masked_fill_(~mask, 0)  # in place: torch's fused steps want the weight's strides
        before = [grad.clone() for grad in grads]
        masked_optimizer.step(a, chosen)
        b.step()
        # torch's fused Adam rounds β2 to float32 before it takes 1 - β2; its other forms, and ours, do not.
        slack = 2**-25 / (1 - a.defaults["betas"][1]) if options == {"fused": True} and "betas" in a.defaults else 0
        for p, q, mask in zip(made, theirs, masks, strict=True):
            tensors = [(p.data, q.data), *((slots(a, p)[key], slot) for key, slot in slots(b, q).items())]
            for actual, expected in tensors:
                masked = actual.shape == mask.shape
                expected = (expected.masked_fill(~mask, 0) if masked else expected).double()
                limit = (1.01 * torch.finfo(actual.dtype).eps + slack) * expected.abs() + 2e-7 * expected.abs().max()
                limit += torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
                assert ((actual.double() - expected).abs() <= limit).all(), (name, step, p.shape)
                assert not masked or not actual[~mask].any()
        assert all(map(torch.equal, grads, before))


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_a_capturable_optimizer_steps_inside_a_cuda_graph(rate):
    made, masks = parameters(torch.float32)
    rate = rate.cuda() if torch.is_tensor(rate) else rate
    optimizer = torch.optim.AdamW(made, lr=rate, capturable=True)
    first_step(optimizer, made, masks)
    chosen = targets(made, masks, gradients(made, 1))
    masked_optimizer.step(optimizer, chosen)  # compiles
    saved = [(p.data.clone(), {k: s.clone() for k, s in slots(optimizer, p).items()}) for p in made]
    masked_optimizer.step(optimizer, chosen)
    masked_optimizer.step(optimizer, chosen)
    expected = [p.data.clone() for p in made]
    for p, (data, state) in zip(made, saved, strict=True):
        p.data.copy_(data)
        for key, slot in slots(optimizer, p).items():
            slot.copy_(state[key])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masked_optimizer.step(optimizer, chosen)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(p.data, e) for p, e in zip(made, expected, strict=True))


def test_tensors_at_odd_addresses_are_stepped_too():
    parameter = nn.Parameter(torch.randn(1001, device="cuda")[1:])
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    mask = torch.rand(1000, device="cuda") < 0.5
    expected = (parameter.detach() - 0.5).masked_fill(~mask, 0)
    masked_optimizer.step(optimizer, {parameter: Target(parameter.data, torch.ones(1000, device="cuda"), mask)})
    assert torch.equal(parameter.data, expected)


@pytest.mark.parametrize("clean", [True, False])
def test_nan_outside_the_mask_reaches_nothing(clean):
    parameter = nn.Parameter(torch.zeros(64, 64, device="cuda"))
    mask = torch.rand(64, 64, device="cuda") < 0.1
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    first_step(optimizer, [parameter], [mask])
    parameter.data[~mask] = torch.nan
    grad = torch.where(mask, 1.0, torch.nan)
    masked_optimizer.step(optimizer, {parameter: Target(parameter.data, grad, mask, clean=clean)})
    assert torch.isfinite(parameter).all()
    assert all(torch.isfinite(slot).all() for slot in slots(optimizer, parameter).values())
    assert not parameter[~mask].any()


def test_more_than_two_to_the_31_numbers():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 20 GB of device memory")
    size = 2**31 + 4096
    parameter = nn.Parameter(torch.zeros(size, device="cuda", dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    grad = torch.full((size,), -1.0, device="cuda", dtype=torch.float16)
    mask = torch.zeros(size, device="cuda", dtype=torch.bool)
    mask[-3:] = True
    masked_optimizer.step(optimizer, {parameter: Target(parameter.data, grad, mask)})
    assert float(parameter[-10:].detach().sum()) == 3
    assert float(parameter[:10].detach().sum()) == 0


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("method", [sl.rigl(stop=16, every=5), sl.sr_ste(sl.NM(2, 4))], ids=["rigl", "sr_ste"])
def test_fused_training_is_unfused_training(method, options):
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).cuda()
        budget = {"sparsity": 0.8} if isinstance(method, sl.DropGrow) else {}
        sparsifier = sl.Sparsifier(model, method, **budget)
        base = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
        optimizer = sl.SparseOptimizer(base, sparsifier, fused=fused)
        for number in range(4):  # a few steps: roundings may change later masks
            optimizer.zero_grad()
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(number)).cuda()
            model(x).square().mean().backward()
            optimizer.step()
        for weight, layer in sparsifier.layers_of(optimizer).values():
            assert not weight.parameter[~layer.mask].any()
        weights.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        close = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert close.float().mean() > 0.999  # a near-tie of 2:4 may fall to the other side
