"""Grouped and condensed kernels on a CUDA device: `pytest -m gpu tests/test_grouped_fan_in_gpu.py`.

Needs torch, triton and numpy only. Everything is compared with float64.
"""

import contextlib
import copy
import csv
import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselearn as sl
from sparselearn.kernels import crossover, crossover_measure
from sparselearn.kernels.condensed import reference as condensed_reference
from sparselearn.kernels.condensed import triton as condensed
from sparselearn.kernels.grouped_fan_in import by_feature, by_input, dense, is_by_feature, linear, reference, scores
from sparselearn.kernels.grouped_fan_in.layout import activations
from sparselearn.kernels.timing import graph_seconds
from sparselearn.modules import CondensedLinear, GroupedFanInLinear, captured, convert, rewire, update_condensed
from sparselearn.structures import ConstantFanIn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.timeout(600),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELEARN_CACHE", str(tmp_path))
    monkeypatch.setattr(crossover, "_tables", {})


@pytest.fixture
def _poison(monkeypatch):
    """Fresh memory is full of NaN, so that a number that a kernel forgets is seen."""

    def poisoned(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def case(tokens, inputs, groups, group, fan_in, dtype, index_dtype=torch.int16):
    g = torch.Generator().manual_seed(tokens + 7 * group + fan_in)
    indices = torch.rand(groups, inputs, generator=g).topk(fan_in, 1).indices.sort(1).values
    x = torch.randn(tokens, inputs, generator=g)
    values = torch.randn(groups, group, fan_in, generator=g) * fan_in**-0.5
    bias, grad = torch.randn(groups * group, generator=g), torch.randn(tokens, groups * group, generator=g)
    return *(t.to("cuda", dtype) for t in (x, values, bias, grad)), indices.to("cuda", index_dtype)


def near(actual, expected, dtype, what=""):
    scale = expected.double().abs().max().clamp(min=1e-30)
    error = float((actual.double() - expected.double()).abs().max() / scale)
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    assert error <= LIMITS[dtype], f"{what}: error {error:.2e}"


def laid_out(x, by_feature):
    return activations(x, x.shape[1], True).copy_(x) if by_feature else x.clone()


def check(
    shape, dtype, *, x_by_feature=False, y_by_feature=False, transposed=False, bias=True, index_dtype=torch.int16
):
    x, values, b, grad, indices = case(*shape, dtype, index_dtype)
    b = b if bias else None
    wide = [t.double().requires_grad_() for t in (x, values) + ((b,) if bias else ())]
    expected = reference.linear(wide[0], wide[1], indices, wide[2] if bias else None)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    x_ = laid_out(x, x_by_feature).requires_grad_()
    leaves = [x_, values.requires_grad_(), *([b.requires_grad_()] if bias else [])]
    options = {"transposed": by_input(indices, shape[1])} if transposed else {}
    y = linear(x_, values, indices, b, by_feature=y_by_feature, **options)
    where = f"{shape} {dtype} {x_by_feature} {y_by_feature} {transposed}"
    near(y, expected, dtype, f"y {where}")
    got = torch.autograd.grad(y, leaves, laid_out(grad, y_by_feature))
    for name, a, e in zip(("grad x", "grad values", "grad bias"), got, wanted, strict=False):
        assert a.dtype == dtype
        near(a, e, dtype, f"{name} {where}")


# ---- products ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [8, 16, 32, 64, 128])
def test_products_and_gradients_of_odd_sizes(group, dtype):
    for tokens in (1, 7, 16, 17, 33, 64, 130, 1000):
        for fan_in in (1, 16, 37, 96):
            check((tokens, 150, 3, group, fan_in), dtype, transposed=fan_in % 2 == 0)


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("x_by_feature", [False, True])
@pytest.mark.parametrize("y_by_feature", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout(x_by_feature, y_by_feature, transposed):
    for dtype in DTYPES:
        for tokens in (5, 96, 999):
            shape = (tokens, 200, 4, 32, 40)
            check(shape, dtype, x_by_feature=x_by_feature, y_by_feature=y_by_feature, transposed=transposed)
            check(shape, dtype, x_by_feature=x_by_feature, transposed=transposed, bias=False, index_dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [16, 32, 64])
def test_a_layer_of_real_size(group, dtype):
    for transposed in (False, True):
        check((2048, 4096, 4096 // group, group, 410), dtype, transposed=transposed)


def test_an_empty_batch():
    for across in (False, True):
        x, values, bias, _, indices = case(0, 50, 2, 16, 8, torch.bfloat16)
        values.requires_grad_()
        y = linear(x, values, indices, bias, by_feature=across)
        assert y.shape == (0, 32)
        y.sum().backward()
        assert values.grad.abs().sum() == 0


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations_inside_and_outside_of_the_kernel(activation):
    x, values, bias, _, indices = case(100, 200, 2, 32, 40, torch.float32)
    expected = getattr(F, activation)(reference.linear(x.double(), values.double(), indices, bias.double()))
    near(linear(x, values, indices, bias, activation=activation), expected, torch.float32)
    near(linear(x, values.requires_grad_(), indices, bias, activation=activation), expected, torch.float32)


def test_tf32_where_torch_is_allowed_to_use_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    x, values, bias, _, indices = case(512, 800, 4, 32, 320, torch.float32)
    expected = reference.linear(x.double(), values.double(), indices, bias.double())
    y = linear(x, values, indices, bias)
    error = float((y.double() - expected).abs().max() / expected.abs().max())
    assert 1e-6 < error < 2e-3  # coarser than float32, as asked for


def test_scores_of_groups():
    for dtype in DTYPES:
        for group, groups in ((8, 2), (8, 33), (16, 3), (32, 2), (64, 3), (128, 2)):
            x, _, _, grad, _ = case(333, 150, groups, group, 3, dtype)
            expected = reference.scores(grad.double(), x.double(), group)
            near(scores(grad, x, group), expected, dtype)
            near(scores(laid_out(grad, True), laid_out(x, True), group), expected, dtype)


@pytest.mark.parametrize("group", [16, 64])
def test_scores_of_a_layer_of_real_size(group):
    x, _, _, grad, _ = case(2048, 4096, 4096 // group, group, 3, torch.bfloat16)
    expected = reference.scores(grad.double(), x.double(), group)
    near(scores(grad, x, group), expected, torch.float16)  # sums in float32, never rounded to bfloat16


@pytest.mark.usefixtures("_poison")
def test_layers_share_one_copy_of_their_input():
    for dtype in DTYPES:
        for shape in ((4, 40, 200), (3, 11, 208)):
            _, values, _, grad, indices = case(shape[0] * shape[1], shape[2], 4, 32, 40, dtype)
            _, values2, _, _, indices2 = case(5, shape[2], 4, 32, 48, dtype)
            x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
            copy = by_feature(x)
            assert torch.equal(copy, x)
            assert is_by_feature(copy.flatten(0, 1))
            y = [linear(copy.flatten(0, 1), v, i) for v, i in ((values, indices), (values2, indices2))]
            (found,) = torch.autograd.grad(y, x, [grad, grad])
            assert found.is_contiguous()
            wide = [t.double() for t in (grad, values, values2)]
            expected = reference.grad_input(wide[0], wide[1], indices, shape[2])
            expected += reference.grad_input(wide[0], wide[2], indices2, shape[2])
            near(found.flatten(0, 1), expected, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_weight_written_out(dtype):
    for inputs, groups, group, fan_in in [(40, 3, 8, 7), (4096, 64, 64, 410), (5, 2, 128, 5), (70, 3, 24, 9)]:
        if group == 24 and dtype != torch.float64:
            continue  # no group of the kernels
        g = torch.Generator().manual_seed(group)
        indices = torch.rand(groups, inputs, generator=g).topk(fan_in, 1).indices.sort(1).values.cuda().short()
        values = torch.randn(groups, group, fan_in, generator=g).to("cuda", dtype).requires_grad_()
        weight, expected = dense(values, indices, inputs), reference.dense(values, indices, inputs)
        assert torch.equal(weight, expected)
        grad = torch.randn(weight.shape, device="cuda", dtype=dtype)
        assert torch.equal(*(torch.autograd.grad(w, values, grad)[0] for w in (weight, expected)))


@pytest.mark.parametrize("group", [16, 64])
def test_collected_gradients_of_inputs_that_few_and_that_many_groups_read(group):
    """Inputs that no group, one, some (also no multiple of four) and every group reads; several portions of tokens."""
    from sparselearn.kernels.grouped_fan_in import launch

    tokens, inputs, groups, fan_in = 900, 80, 30, 24
    _, values, _, grad, indices = case(tokens, inputs, groups, group, fan_in, torch.bfloat16)
    chance = torch.linspace(0, 1, inputs - 20)
    g = torch.Generator().manual_seed(0)
    picked = (torch.rand(groups, inputs - 20, generator=g) * chance).topk(fan_in - 1, 1).indices.sort(1).values
    indices[:, :-1], indices[:, -1] = picked.cuda(), inputs - 1
    expected = reference.grad_input(grad.double(), values.double(), indices, inputs)
    kept = launch.PARTIAL_BYTES
    for portion in (0, kept, 600 * groups * fan_in * 2):  # 128 tokens, all, 512 and a rest
        launch.PARTIAL_BYTES = portion
        try:
            for across in (False, True):
                out = activations(grad, inputs, across)
                near(launch.grad_input_collected(grad, values, *by_input(indices, inputs), out), expected, grad.dtype)
        finally:
            launch.PARTIAL_BYTES = kept


def test_every_copy_and_the_way_back_are_exact():
    from sparselearn.kernels.grouped_fan_in import launch

    for tokens, inputs in [(1, 1), (300, 500), (4096, 1024)]:
        for dtype in DTYPES:
            x = torch.randn(tokens, inputs, device="cuda", dtype=dtype)
            for blocks in (None, *launch.COPY):
                copy = launch.feature_major(x, blocks)
                assert torch.equal(copy, x)
                assert is_by_feature(copy)
            back = launch.token_major(copy)
            assert back.is_contiguous()
            assert torch.equal(back, x)


def test_candidates_are_compiled_in_other_processes_and_all_timed():
    from sparselearn.kernels.grouped_fan_in import launch

    case_ = crossover.Case(256, 512, 32, 64, "bfloat16", True, 256)
    crossover_measure.compile_ahead([case_], 2)
    x, values, _, grad, indices = case(256, 512, 8, 32, 64, torch.bfloat16)
    timer = functools.partial(graph_seconds, rounds=1, least=1e-5)
    sets = [(values, indices, *by_input(indices, 512))]
    found = crossover_measure.tune(case_, sets, x, grad, timer, crossover.table(), everything=True)
    assert len(found["forward"]) > 20
    assert list(found["forward"].values()) == sorted(found["forward"].values())
    assert tuple(next(iter(found["grad_values"]))) in crossover.table().blocks.values()
    assert set(crossover_measure.tune_copy(x, timer, crossover.table())) == set(launch.COPY)


@pytest.mark.parametrize("section", ["candidates", "forward", "training", "vit", "peers", "dtypes"])
def test_sections_of_the_benchmark_run(section, monkeypatch, tmp_path):
    """On a small layer: every row is checked, written and has a time."""
    from sparselearn.kernels.grouped_fan_in import bench

    monkeypatch.setattr(bench, "LARGE", ((512, 1024),))
    monkeypatch.setattr(bench, "VIT", ((512, 1024),))
    monkeypatch.setattr(bench, "compile_ahead", lambda cases: None)
    small = functools.partial(graph_seconds, rounds=1, least=1e-5)
    monkeypatch.setattr(bench, "graph_seconds", small)
    monkeypatch.setattr(bench, "quick", small)
    run = bench.Run(tmp_path / "rows.csv", 100)
    run.take(section, itertools.islice(bench.works(section), 1), 100)
    run.file.close()
    assert not run.failures
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert len(rows) > 1
    assert all(float(row["us"]) > 0 for row in rows)
    if section == "vit":
        assert rows[-1]["method"] == "as dispatched"
        assert float(rows[-1]["speedup"]) >= 1


def test_a_small_step_is_compared(monkeypatch):
    from sparselearn.kernels.grouped_fan_in import bench_step

    small = bench_step.Size(256, 2, 4, 64, 4, 128)
    works = bench_step.works_step(0.9, (small,))
    monkeypatch.setattr(bench_step, "choose", lambda *case: "collected" if case[0] > case[1] else "sparse")
    rows = [row for work in itertools.islice(works, 2) for row in work()]
    names = [f"{of}, {how}" for how in ("compiled", "CUDA graph") for of in ("dense", "sparse")]
    assert [row.method for row in rows] == ["dense, compiled", "dense, CUDA graph", *names]
    assert "peak" in rows[3].detail
    assert rows[3].detail.endswith("; qkv=collected out=sparse up=collected down=sparse")
    for row in (rows[1], rows[5]):
        kinds = dict(re.findall(r"(\w+) (\d+\.\d+)(?:,| ms)", row.detail))
        assert kinds.keys() == {"products", "layouts", "optimizer", "attention", "other"}
        assert row.seconds > 0


@contextlib.contextmanager
def allowed_to_be_too_large():
    """Tuning passes over blocks that need more shared memory than there is."""
    try:
        yield
    except Exception as error:
        if "resource" not in repr(error).lower():
            raise


@pytest.mark.parametrize("group", [8, 16, 32, 64, 128])
def test_every_candidate_for_tuning_is_right(group):
    from sparselearn.kernels.grouped_fan_in import launch

    x, values, bias, grad, indices = case(300, 500, 2, group, 200, torch.bfloat16)
    x = launch.feature_major(x)
    expected = reference.linear(x.double(), values.double(), indices, bias.double())
    fitting = 0
    for blocks in launch.FORWARD:
        with allowed_to_be_too_large():
            y = launch.forward(x, values, indices, bias, torch.empty_like(grad), "none", blocks)
            near(y, expected, x.dtype, str(blocks))
            fitting += 1
    expected = reference.grad_values(grad.double(), x.double(), indices)
    for blocks in launch.GRAD_VALUES:
        with allowed_to_be_too_large():
            near(launch.grad_values(grad, x, values, indices, blocks), expected, x.dtype, str(blocks))
            fitting += 1
    assert fitting >= len(launch.FORWARD) + len(launch.GRAD_VALUES) - (1 if group == 128 else 0)


@pytest.mark.parametrize("group", [8, 16, 32, 64, 128])
def test_every_candidate_of_few_float32_tokens_is_right(group):
    """With five stages the default for V = 32 stopped with a misaligned address."""
    from sparselearn.kernels.grouped_fan_in import launch

    x, values, bias, _, indices = case(5, 200, 4, group, 37, torch.float32)
    expected = reference.linear(x.double(), values.double(), indices, bias.double())
    few = crossover.Case(4 * group, 200, group, 37, "float32", False, 5)
    for blocks in (launch.forward_blocks(values, 5), *crossover_measure.candidates(few, "forward")):
        near(launch.forward(x, values, indices, bias, torch.empty_like(expected, dtype=x.dtype), blocks=blocks),
             expected, x.dtype, str(blocks))  # fmt: skip


def test_a_nan_or_infinity_stays_in_its_token():
    x, values, _, _, indices = case(40, 50, 2, 16, 5, torch.float32, torch.int32)
    indices[:] = torch.arange(1, 6)
    x[3], x[:, 0] = torch.inf, torch.nan
    y = linear(x, values, indices)
    others = [t for t in range(40) if t != 3]
    assert torch.isfinite(y[others]).all()
    assert not torch.isfinite(y[3]).any()


def test_results_are_the_same_bits_every_time():
    x, values, bias, grad, indices = case(1024, 1000, 8, 32, 100, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    for transposed in (None, by_input(indices, 1000)):
        runs = []
        for _ in range(5):
            y = linear(*leaves[:2], indices, leaves[2], transposed=transposed)
            runs.append([y, *torch.autograd.grad(y, leaves, grad)])
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_places_beyond_31_bits():
    tokens, inputs = 2**19 + 16, 4096
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    x = torch.randn(inputs, tokens, device="cuda", dtype=torch.bfloat16).mT
    _, values, _, _, indices = case(1, inputs, 1, 16, 40, torch.bfloat16)
    indices[0, -1] = inputs - 1
    y = linear(x, values.requires_grad_(), indices)
    expected = reference.linear(x[-50:].double(), values.double(), indices)
    near(y[-50:], expected, x.dtype)
    grad = torch.zeros_like(y)
    grad[-50:] = torch.randn_like(grad[-50:])
    (got,) = torch.autograd.grad(y, values, grad)
    near(got, reference.grad_values(grad[-50:].double(), x[-50:].double(), indices), x.dtype)


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 16])
def test_condensed_products_of_few_tokens(tokens, dtype):
    for neurons, inputs, fan_in in [(1, 1, 1), (9, 70, 37), (100, 300, 300), (333, 4096, 410), (64, 40_000, 17)]:
        index_dtype = torch.int16 if inputs < 2**15 else torch.int32
        x, values, _, grad, indices = case(tokens, inputs, neurons, 1, fan_in, dtype, index_dtype)
        values, b = values[:, 0].contiguous(), torch.randn(neurons, device="cuda", dtype=dtype)
        leaves = [t.requires_grad_() for t in (x, values, b)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        expected = condensed_reference.linear(wide[0], wide[1], indices, wide[2])
        y = condensed.linear(x, values, indices, b)
        near(y, expected, dtype)
        wanted = torch.autograd.grad(expected, wide, grad.double())
        for a, e in zip(torch.autograd.grad(y, leaves, grad), wanted, strict=True):
            near(a, e, dtype)


def test_the_interpreters_cases_run_natively():
    script = Path(__file__).with_name("triton_interpreted.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), "--device", "cuda"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all equal"


# ---- modules -------------------------------------------------------------------------------------------------


def grouped(n, i, k, group, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(i, n, dtype=dtype)
    mask = ConstantFanIn(group).topk(torch.rand(n, i), k * n)
    layer.weight.data.masked_fill_(~mask, 0)
    return layer.cuda(), mask.cuda()


@pytest.mark.parametrize("way", ["dense", "sparse", "collected"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_module_is_its_dense_layer(way, dtype):
    layer, mask = grouped(128, 200, 24, 32, dtype)
    module = GroupedFanInLinear.from_dense(layer, mask, 32)
    module.way = way
    x = torch.randn(3, 50, 200, device="cuda", dtype=dtype, requires_grad=True)
    y = module(x)
    expected = layer.double()(x.double())
    near(y, expected, dtype if dtype in LIMITS else torch.float32)
    y.sum().backward()
    assert module.values.grad.shape == (4, 32, 24)


def test_autocast_trains_float32_values_in_bfloat16():
    layer, mask = grouped(128, 200, 24, 32)
    module = GroupedFanInLinear.from_dense(layer, mask, 32)
    module.way = "sparse"
    x = torch.randn(64, 200, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    near(y, layer.double()(x.double()), torch.bfloat16)
    y.float().square().sum().backward()
    assert module.values.grad.dtype == torch.float32


class Mlp(nn.Module):
    def __init__(self, width=256, hidden=512):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def sparse_mlp(way, dtype=torch.float32):
    torch.manual_seed(0)
    dense = Mlp().to("cuda", dtype)
    sparsifier = sl.Sparsifier(dense, sl.static(structure=ConstantFanIn(32)), sparsity=0.875)
    model = copy.deepcopy(dense)
    convert(model, sparsifier, force=True, candidates=[GroupedFanInLinear])
    model.up.by_feature = True
    model.up.way = model.down.way = way
    return dense, model


@pytest.mark.parametrize("way", ["sparse", "collected", "dense"])
def test_compiled_graphs_agree(way):
    dense, model = sparse_mlp(way)
    x = torch.randn(256, 256, device="cuda", requires_grad=True)
    compiled = torch.compile(model, fullgraph=True)
    y, expected = compiled(x), dense(x)
    near(y, expected, torch.float16)
    near(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], torch.float16)


def test_a_compiled_layer_takes_the_way_of_the_products_that_torch_forms(monkeypatch):
    """float32 and TF32 have entries of their own in the table, and other kernels."""
    from sparselearn.kernels.grouped_fan_in import launch

    dense, model = sparse_mlp(None, torch.float32)
    x = torch.randn(256, 256, device="cuda")
    with crossover.products_of("tf32"):
        for layer in (model.up, model.down):
            crossover.table().seconds[layer._case(torch.float32, True, 256)] = {"dense": 3.0, "sparse": 2.0}
    seen = []
    real = launch.forward
    monkeypatch.setattr(launch, "forward", lambda *args, **kwargs: seen.append(1) or real(*args, **kwargs))
    for name, calls, least, most in (("float32", 0, 0, 1e-5), ("tf32", 2, 1e-5, 5e-3)):
        torch._dynamo.reset()
        seen.clear()
        with crossover.products_of("float32"):
            expected = dense.double()(x.double())
            dense.float()
        with crossover.products_of(name):
            y = torch.compile(model, fullgraph=True)(x)
        error = float((y.double() - expected).abs().max() / expected.abs().max())
        assert least <= error < most
        assert len(seen) == calls


def test_hidden_activations_stay_by_feature():
    _, model = sparse_mlp("sparse", torch.bfloat16)
    seen = []
    model.down.register_forward_pre_hook(lambda _, args: seen.append(is_by_feature(args[0])))
    model(torch.randn(256, 256, device="cuda", dtype=torch.bfloat16))
    assert seen == [True]


@pytest.mark.parametrize("way", ["sparse", "collected", "dense"])
def test_a_cuda_graph_of_a_training_step_goes_on_after_a_mask_update(way):
    _, model = sparse_mlp(way)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, capturable=True)
    x = torch.randn(128, 256, device="cuda")

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    mask = ConstantFanIn(32).topk(torch.rand(512, 256, device="cuda"), model.up.nnz)
    grads = {name: p.grad for name, p in model.named_parameters()}
    rewire(model.up, mask, optimizer)
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name]
    weights = [model.up.to_dense()[0], model.down.to_dense()[0]]
    graph.replay()
    expected = weights[1](F.gelu(weights[0](x))).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(model.up.mask, mask)


@pytest.mark.parametrize("way", ["sparse", "collected", "dense"])
def test_grouped_training_is_masked_dense_training(way):
    """Weights after every step and the masks of every update, in float32."""
    method = sl.srigl(stop=40, every=8, gamma=0.0, group=32)
    torch.manual_seed(0)
    dense = Mlp().cuda()
    sparsifier = sl.Sparsifier(dense, method, sparsity=0.875, distribution=sl.distributions.uniform)
    model = copy.deepcopy(dense)
    convert(model, sparsifier, force=True, candidates=[GroupedFanInLinear])
    model.up.way = model.down.way = way
    budgets = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    dense_optimizer = sl.SparseOptimizer(torch.optim.AdamW(dense.parameters(), 1e-3), sparsifier)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(30):
        x, y = torch.randn(128, 256, device="cuda"), torch.randn(128, 256, device="cuda")
        with captured(model) as traffic:
            for net in (dense, model):
                net.zero_grad()
                F.mse_loss(net(x), y).backward()
        dense_optimizer.step()
        optimizer.step()
        if method.due(step):
            update_condensed(model, method, optimizer, traffic, step=step, nnz=budgets)
        for name, mask in sparsifier.masks.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(module.mask, mask), f"masks differ after step {step}"
            torch.testing.assert_close(
                module.scatter(module.values), dense.get_parameter(name).detach(), rtol=1e-2, atol=2e-4
            )


def test_a_condensed_module_takes_the_kernel_for_few_tokens_and_the_dense_product_else():
    layer, mask = grouped(100, 300, 30, 1)
    module = CondensedLinear.from_dense(layer, mask)
    module.way = "sparse"
    for tokens in (1, 5, 16, 17, 200):
        x = torch.randn(tokens, 300, device="cuda")
        near(module(x), layer(x), torch.float16)


def test_ways_are_measured_kept_and_used(tmp_path):
    layer, mask = grouped(256, 512, 48, 32, torch.bfloat16)
    module = GroupedFanInLinear.from_dense(layer, mask, 32)
    module.measure(64)
    module.measure(64, training=True)
    known = crossover.table().seconds
    assert {frozenset(s) for s in known.values()} == {
        frozenset({"dense", "sparse"}),
        frozenset({"dense", "sparse", "collected"}),
    }
    assert list(tmp_path.glob("crossover-*.json"))
    condensed_module = CondensedLinear.from_dense(*grouped(256, 512, 48, 1, torch.bfloat16))
    condensed_module.measure(1)
    assert len(known) == 6  # each in a graph and called from the host
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert module._way(x, module.values) == crossover.table().best(module._case(x.dtype, False, 64))
        with crossover.graphs():
            assert module._way(x, module.values) == crossover.table().best(
                module._case(x.dtype, False, 64)._replace(graph=True)
            )
    report = convert(
        nn.Sequential(layer), {"0.weight": mask}, torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    )
    assert "GroupedFanInLinear" in str(report)
