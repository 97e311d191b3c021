"""Drop and grow for all layers at once: in the engine through the formulas, in the interpreter, compiled for GPUs."""

import os
import subprocess
import sys

import pytest
import torch
from interpreted import interpret
from select_runs import METHODS, OPTIMIZERS, Run, assert_equal
from torch.utils._python_dispatch import TorchDispatchMode

import sparselearn as sl
from sparselearn import SparsityError
from sparselearn.kernels import select
from sparselearn.kernels.select import bench, reference


@pytest.fixture
def taken(monkeypatch):
    """The formulas in the kernels' place on this CPU; how many layers each call took."""
    calls = []

    def at_once(items, exclude_dropped, reinit):
        calls.append(len(items))
        return reference.update(items, exclude_dropped=exclude_dropped, reinit=reinit)

    monkeypatch.setattr(select, "fits", lambda item: True)
    monkeypatch.setattr(select, "_at_once", at_once)
    return calls


def both(monkeypatch, method, optimizer, steps=30, **options):
    """A run with and one without the formulas, compared after every step."""
    ours, theirs = (Run(METHODS[method](), OPTIMIZERS[optimizer], **options) for _ in range(2))
    for _ in range(steps):
        with monkeypatch.context() as patch:
            patch.setattr(select, "fits", lambda item: False)
            theirs.step()
        ours.step()
        assert_equal(ours, theirs)
    return ours


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_layer_by_layer_and_at_once(method, optimizer, taken, monkeypatch):
    both(monkeypatch, method, optimizer)
    assert taken == [Run.layers] * 5


@pytest.mark.parametrize("options", [{"channels_last": True}, {"dtype": torch.bfloat16}, {"density_scaling": True}],
                         ids=str)  # fmt: skip
def test_other_layouts_and_dtypes_are_the_same_at_once(options, taken, monkeypatch):
    both(monkeypatch, "rigl", "AdamW", **options)
    assert taken == [Run.layers] * 5


def test_what_does_not_fit_goes_the_usual_way(taken, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(select, "fits", lambda item: item.weight.ndim == 2)
        ours = Run(METHODS["rigl"](), OPTIMIZERS["AdamW"])
        for _ in range(30):
            ours.step()
    assert taken == [2] * 5
    theirs = Run(METHODS["rigl"](), OPTIMIZERS["AdamW"])
    monkeypatch.setattr(select, "fits", lambda item: False)
    for _ in range(30):
        theirs.step()
    assert_equal(ours, theirs)


class Count(TorchDispatchMode):
    """How many operations torch is asked for."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_an_update_at_once_costs_the_host_little(monkeypatch):
    run = Run(METHODS["rigl"](), OPTIMIZERS["momentum"])
    for _ in range(4):
        run.step()
    run.backward()
    run.sparsifier.before_step(run.optimizer.base)
    layers = run.sparsifier.layers_of(run.optimizer.base)
    grads = {name: weight.parameter.grad for name, (weight, _) in layers.items()}
    same = [select.Masks(s.mask, s.inactive, s.memory["grown"], s.memory["fired"]) for _, s in layers.values()]
    done = select.Updated(same, [s.nnz for _, s in layers.values()], 0, 0, 0, 0.0)
    monkeypatch.setattr(select, "fits", lambda item: True)
    monkeypatch.setattr(select, "_at_once", lambda *arguments: done)
    with Count() as count:
        run.sparsifier._update(run.optimizer.base, layers, grads)
    assert count.number <= Run.layers  # without the kernels' own; layer by layer it is 70 for each


def test_each_kind_of_layers_is_one_call(taken, monkeypatch):
    ours = Run(METHODS["rigl"](), OPTIMIZERS["momentum"])
    for layer in (ours.model[7], ours.model[9]):
        layer.to(torch.float64)
    ours.model.insert(7, Wider())
    for _ in range(6):
        ours.step()
    assert taken == [3, 2]


class Wider(torch.nn.Module):
    def forward(self, x):
        return x.double()


@pytest.mark.parametrize(
    "make",
    [
        lambda: sl.set_(stop=28, every=5),
        lambda: sl.rigl(stop=28, every=5, grow_init=sl.criteria.random_normal(0.1)),
        lambda: sl.rigl(stop=28, every=5, structure=sl.ConstantFanIn()),
        lambda: sl.gmp(stop=28, every=5),
        lambda: sl.srigl(stop=28, every=5),
    ],
    ids=["set", "grow_init", "fan-in", "gmp", "srigl"],
)
def test_other_methods_go_the_usual_way(make, taken):
    run = Run(make(), OPTIMIZERS["momentum"], overrides=None)
    for _ in range(12):
        run.step()
    assert "step" in run.sparsifier.last_update
    assert taken == []


def test_a_support_goes_the_usual_way(taken):
    run = Run(METHODS["rigl"](), OPTIMIZERS["momentum"], support=0.6, overrides=None)
    for _ in range(12):
        run.step()
    assert taken == []


def test_nan_weights_are_refused_as_ever(taken, monkeypatch):
    messages = []
    for fits in (True, False):
        run = Run(METHODS["rigl"](), OPTIMIZERS["momentum"])
        for _ in range(5):
            run.step()
        run.backward()
        monkeypatch.setattr(select, "fits", lambda item, fits=fits: fits)
        weight, mask = run.model[2].weight, run.sparsifier.masks["2.weight"]
        weight.data.view(-1)[int(mask.view(-1).int().argmax())] = torch.nan
        with pytest.raises(SparsityError) as refused:
            run.optimizer.step()
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert "returned NaN for `2.weight` at step 5" in messages[0]
    assert taken == [Run.layers]


def test_layers_without_a_gradient_are_refused_as_ever(taken):
    run = Run(METHODS["rigl"](), OPTIMIZERS["momentum"])
    for _ in range(5):
        run.step()
    run.backward()
    run.model[9].weight.grad = None
    with pytest.raises(SparsityError, match=r"found no gradient for `9.weight` at step 5"):
        run.optimizer.step()


def test_resuming_at_an_update_is_exact(taken):
    whole, part, after = (Run(METHODS["rigl"](), OPTIMIZERS["AdamW"]) for _ in range(3))
    for _ in range(12):
        whole.step()
    for _ in range(5):
        part.step()
    after.model.load_state_dict(part.model.state_dict())
    after.optimizer.load_state_dict(part.optimizer.state_dict())
    after.steps = 5
    for _ in range(7):
        after.step()
    assert_equal(after, whole)


def test_the_shapes_of_the_benchmark_are_those_of_the_networks():
    sizes = [torch.Size(shape).numel() for shape in bench.resnet50()]
    assert (len(sizes), sum(sizes)) == (54, 25_502_912)  # 25,557,032 parameters, less batch norm and the last bias
    assert sum(torch.Size(shape).numel() for shape in bench.gpt(20, 2048)) == 1_006_632_960


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_benchmark_measures_ways_that_agree(dtype, tmp_path):
    shapes = [(8, 4, 3, 3), (16, 20), (8, 8, 1, 1)]
    row = bench.measure(shapes, reference.update, 2, "cpu", dtype, states=2, channels_last=True)
    assert row["layers"] == 3
    assert row["weights"] == 288 + 320 + 64
    assert all(row[name] > 0 for name in ("at_once", "by_layer", "topk", "sort"))
    bench.write(tmp_path / "table.csv", [row], {"hardware": "none"})
    header, line = (tmp_path / "table.csv").read_text().splitlines()
    assert header.startswith("layers,weights,rounds,at_once,at_once_spread")
    assert line.endswith(",none")

    def wrong(items):
        done = reference.update(items)
        done.masks[1].mask[0, 0] ^= True
        return done

    with pytest.raises(SparsityError, match="`by_layer` gives other masks or weights than `at_once`"):
        bench.measure(shapes, wrong, 2, "cpu", dtype)


def test_importing_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import sparselearn; import sparselearn.kernels.select"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [["--quick"], pytest.param([], marks=pytest.mark.slow)], ids=["few", "all"])
def test_the_kernels_agree_with_the_formulas_in_the_interpreter(options):
    interpret("triton_select.py", *options)


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is chosen by the environment")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernels_compile_without_spilling(target):
    tl = pytest.importorskip("triton.language", reason="triton is not installed")
    from triton_compile import compile_for, resources

    from sparselearn.kernels.select import launch, triton_lines, triton_search
    from sparselearn.kernels.select import triton_kernels as kernels

    layout = {"W": tl.float32, "LOW": 0, "STRIDED": False}
    passes = layout | {"ALIGNED": True, "BLOCK": launch.BLOCK, "STEPS": launch.STEPS, "LANES": 32 * launch.WARPS}
    pick = {"GROW": True, "EXCLUDE": False}
    tiles = pick | passes | {"GROUP": launch.GROUP, "TILE": launch.TILE}
    grows = [*["i32"] * 3, "i64", *["i32"] * 4, "fp32"]
    cases = [
        (triton_search.guess_kernel, ["i32"] * 2, pick | layout | {"SAMPLE": launch.SAMPLE}, launch.GUESS_WARPS),
        (kernels.drop_kernel, ["i32"] * 5, passes, launch.WARPS),
        (triton_search.judge_kernel, ["i32"] * 3, {"GROW": True, "LOW": 0}, 1),
        (triton_search.count_kernel, ["i32"] * 5, tiles | {"MANY": True}, launch.WARPS),
        (triton_search.count_kernel, ["i32"] * 5, tiles | {"MANY": False}, launch.WARPS),
        (triton_search.narrow_kernel, ["i32"] * 3, {"GROW": True, "LAST": True}, launch.NARROW_WARPS),
        (triton_search.ties_kernel, ["i32"] * 5, tiles, launch.WARPS),
        (kernels.grow_kernel, grows, passes | {"EXCLUDE": False}, launch.WARPS),
        (kernels.apply_kernel, [*["i32"] * 3, "i64", "i32", "i32"],
         passes | {"EXCLUDE": False, "REINIT": False, "STATES": 2, "S": tl.float32}, launch.WARPS),
    ]  # fmt: skip
    for k, m in ((2, 4), (4, 16)):
        constants = {"K": k, "M": m, "BLOCK": triton_lines.BLOCK}
        compiled = compile_for(triton_lines.lines_kernel, ["fp32", "i1"], constants, target)
        assert resources(compiled, target)[1:] == (0, 0)
    for kernel, types, constants, warps in cases:
        compiled = compile_for(kernel, ["i64", *types], constants, target, warps=warps)
        _, spilled, shared = resources(compiled, target)
        assert spilled == 0, kernel
        if kernel in (kernels.drop_kernel, kernels.grow_kernel, kernels.apply_kernel):
            assert shared <= 64, f"{kernel} moves whole tiles between threads"
        if "STRIDED" in constants:  # bfloat16, channels last, three states
            constants |= {"W": tl.bfloat16, "LOW": 16, "STRIDED": True, "ALIGNED": False}
            constants |= {"STATES": 3} if "STATES" in constants else {}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            compiled = compile_for(kernel, ["i64", *types], constants, target, warps=warps)
            assert resources(compiled, target)[1] == 0, kernel
