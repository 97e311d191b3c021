"""Mask updates of all layers at once on a CUDA device: `pytest -m gpu tests/test_select_gpu.py`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from select_runs import METHODS, OPTIMIZERS, Run, assert_equal

from sparselearn.kernels import select

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_interpreters_cases_natively():
    script = Path(__file__).with_name("triton_select.py")
    run = subprocess.run([sys.executable, str(script), "--device", "cuda"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all equal"


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_layer_by_layer_and_at_once(method, optimizer, options, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    calls, real = [], select._at_once

    def at_once(items, *rest):
        calls.append(len(items))
        return real(items, *rest)

    monkeypatch.setattr(select, "_at_once", at_once)
    ours, theirs = (Run(METHODS[method](), OPTIMIZERS[optimizer], device="cuda", **options) for _ in range(2))
    for _ in range(30):
        with monkeypatch.context() as patch:
            patch.setattr(select, "fits", lambda item: False)
            theirs.step()
        ours.step()
        assert_equal(ours, theirs)
    assert calls == [Run.layers] * 5
