"""Kernels start on the GPU that holds their arguments. Every function that starts one sees to it."""

import ast
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparselearn.kernels.devices import on, on_its_device

KERNELS = Path(__file__).parent.parent / "kernels"
GUARDED = {"Search"}  # called by select's `update`, within `on`


def starters() -> dict[str, ast.AST]:
    """Functions, and classes, of the top level that start a kernel: `some_kernel[grid](...)`."""
    found = {}
    for path in KERNELS.rglob("*.py"):
        for part in ast.parse(path.read_text()).body:
            calls = [n.func.value for n in ast.walk(part)
                     if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]  # fmt: skip
            if any(ast.unparse(kernel).endswith("_kernel") for kernel in calls):
                found[f"{path.relative_to(KERNELS)}: {part.name}"] = part
    return found


def test_every_start_of_a_kernel_is_on_the_gpu_of_its_arguments():
    found = starters()
    assert len(found) > 18
    for name, part in found.items():
        decorated = "on_its_device" in map(ast.unparse, part.decorator_list)
        within = any(ast.unparse(item).startswith("on(") for node in ast.walk(part)
                     if isinstance(node, ast.With) for item in node.items)  # fmt: skip
        assert decorated or within or part.name in GUARDED, name


def test_another_gpu_becomes_the_current_one_for_the_start(monkeypatch):
    log = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            log.append(f"enter {self.device}")

        def __exit__(self, *_):
            log.append("leave")

    @on_its_device
    def start(first, second, *, third):
        """Starts."""
        log.append((first.device.index, second, third))
        return "result"

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    for index in (1, 0):
        assert start(SimpleNamespace(device=torch.device("cuda", index)), 2, third=3) == "result"
    assert log == ["enter cuda:1", (1, 2, 3), "leave", (0, 2, 3)]
    assert isinstance(on(torch.device("cpu")), nullcontext)
    assert (start.__name__, start.__doc__) == ("start", "Starts.")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_and_masks_on_the_second_gpu():
    from sparselearn.kernels import select
    from sparselearn.kernels.grouped_fan_in import linear, reference

    assert torch.cuda.current_device() == 0
    x, values = torch.randn(64, 128, device="cuda:1"), torch.randn(4, 16, 32, device="cuda:1")
    indices = torch.rand(4, 128, device="cuda:1").topk(32).indices.sort(1).values.int()
    y = linear(x, values, indices)
    assert y.device.index == 1
    torch.testing.assert_close(y, reference.linear(x.double(), values.double(), indices).float(), rtol=1e-4, atol=1e-4)
    score = torch.randn(256, 64, 4, device="cuda:1")
    mask = select.highest_of_lines(score, 2)
    assert mask.sum(-1).unique().tolist() == [2]
    assert torch.equal(score.topk(2).values.sum(-1), (score * mask).sum(-1))
