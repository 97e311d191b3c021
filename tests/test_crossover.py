"""The table of what is faster: kept on disk, asked by layers, measured by a command (with a clock of our own here)."""

import json
from itertools import product

import pytest
import torch
from torch import nn

from sparselearn import SparsityError
from sparselearn.kernels import crossover, crossover_measure
from sparselearn.kernels.condensed import triton as condensed
from sparselearn.kernels.crossover import Case, Table, cases_of
from sparselearn.kernels.crossover_measure import measured_seconds
from sparselearn.modules import GroupedFanInLinear


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELEARN_CACHE", str(tmp_path))
    monkeypatch.setattr(crossover, "_tables", {})
    return tmp_path


CASE = Case(64, 128, 16, 12, "bfloat16", False, 256)


def test_what_was_not_measured_as_faster_is_dense(folder):
    assert crossover.choose(*CASE) == "dense"
    table = crossover.table()
    table.seconds[CASE] = {"dense": 3.0, "sparse": 2.0, "collected": 4.0}
    table.seconds[CASE._replace(tokens=16)] = {"dense": 1.0, "sparse": 2.0}
    assert crossover.choose(*CASE) == "sparse"
    assert crossover.choose(*CASE._replace(tokens=16)) == "dense"
    for other in ({"training": True}, {"dtype": "float16"}, {"fan_in": 13}, {"group": 8}, {"tokens": 1}):
        assert crossover.choose(*CASE._replace(**other)) == "dense"


def test_a_graph_has_times_of_its_own(folder, monkeypatch):
    """A way of many kernels may win where they are replayed, and lose where the host starts them."""
    table = crossover.table()
    table.seconds[CASE] = {"dense": 2.0, "sparse": 3.0}
    table.seconds[CASE._replace(graph=True)] = {"dense": 2.0, "sparse": 1.0}
    assert crossover.choose(*CASE) == "dense"
    with crossover.graphs():
        assert crossover.choose(*CASE) == "sparse"
        assert torch.compile(lambda: crossover.choose(*CASE), backend="eager")() == "sparse"
    assert crossover.choose(*CASE) == "dense"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert crossover.choose(*CASE) == "sparse"


def test_both_are_measured_and_blocks_are_tuned_in_the_graph(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(crossover_measure, "measured_seconds", lambda case: seen.append(case) or {"dense": 1.0})
    crossover_measure.ensure(CASE)
    crossover_measure.ensure(CASE._replace(graph=True))
    assert seen == [CASE._replace(graph=True), CASE]
    monkeypatch.undo()
    clocks = []
    for name in ("graph_seconds", "event_seconds"):
        monkeypatch.setattr(crossover_measure, name, lambda calls, name=name: clocks.append(name) or 1.0)
    for case in seen:
        measured_seconds(case, device="cpu")
    assert clocks == ["graph_seconds"] * 2 + ["event_seconds"] * 2


def test_a_file_of_an_earlier_version_holds_times_of_graphs(folder):
    path = folder / "table.json"
    old = CASE._asdict()
    del old["graph"]
    path.write_text(json.dumps({"cases": [{"case": old, "seconds": {"dense": 1.0}}], "blocks": []}))
    assert set(Table(path).seconds) == {CASE._replace(graph=True)}


def test_tf32_is_measured_and_asked_for_by_itself(folder):
    layer = nn.Linear(128, 64)
    mask = torch.zeros(64, 128, dtype=torch.bool)
    mask[:, :12] = True
    layer.weight.data.masked_fill_(~mask, 0)
    layer = GroupedFanInLinear.from_dense(layer, mask, 16)
    before = torch.backends.cuda.matmul.fp32_precision  # tests of commands may have left any
    with crossover.products_of("float32"):
        crossover.table().seconds[layer._case(torch.float32, False, 256)] = {"dense": 3.0, "sparse": 2.0}
        assert crossover.choose(*layer._case(torch.float32, False, 256)) == "sparse"
    with crossover.products_of("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert crossover.dtype_name(torch.float32) == "tf32"
        assert crossover.torch_dtype("tf32") == torch.float32
        assert crossover.dtype_name(torch.bfloat16) == "bfloat16"
        assert layer._case(torch.float32, False, 256).dtype == "tf32"
        assert crossover.choose(*layer._case(torch.float32, False, 256)) == "dense"
        with crossover.products_of("float32"):
            assert crossover.dtype_name(torch.float32) == "float32"
        seen = measured_seconds(
            CASE._replace(dtype="float32"), lambda calls: float(crossover.dtype_name(torch.float32) == "tf32"), "cpu"
        )
        assert set(seen.values()) == {0.0}
    assert torch.backends.cuda.matmul.fp32_precision == before
    seen = measured_seconds(
        CASE._replace(dtype="tf32"), lambda calls: float(crossover.dtype_name(torch.float32) == "tf32"), "cpu"
    )
    assert set(seen.values()) == {1.0}


def test_a_file_keeps_the_table_and_writers_merge(folder):
    path = folder / "table.json"
    first, second = Table(path), Table(path)
    first.seconds[CASE] = {"dense": 3.0, "sparse": 2.0}
    first.blocks["forward", 4, 16, 12, "bfloat16", 8] = (128, 64, 4, 3, True)
    first.save()
    other = CASE._replace(tokens=1)
    second.seconds[other] = {"dense": 1.0, "sparse": 2.0}
    second.save()
    again = Table(path)
    assert again.seconds == {CASE: {"dense": 3.0, "sparse": 2.0}, other: {"dense": 1.0, "sparse": 2.0}}
    assert again.blocks == first.blocks
    assert [p.name for p in folder.iterdir()] == ["table.json"]
    assert again.best(CASE) == "sparse"


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    path = folder / "table.json"
    table = Table(path)
    table.seconds[CASE] = {"dense": 1.0}
    table.save()
    before = path.read_text()
    table.seconds[CASE._replace(tokens=1)] = {"dense": object()}  # cannot be written
    with pytest.raises(TypeError):
        table.save()
    assert path.read_text() == before
    assert [p.name for p in folder.iterdir()] == ["table.json"]


@pytest.mark.parametrize("text", ["", "{", '{"cases": [{"case": {"x": 1}, "seconds": {}}], "blocks": []}'])
def test_a_damaged_file_counts_as_empty(folder, text):
    path = folder / "table.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="cannot be read .* counts as empty"):
        assert Table(path).seconds == {}


def test_tables_are_apart_for_gpus_and_versions(monkeypatch):
    assert crossover.gpu_key("NVIDIA H100 80GB HBM3").startswith("nvidia-h100-80gb-hbm3-torch-")
    before = crossover.gpu_key("H100")
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert crossover.gpu_key("H100") != before != crossover.gpu_key("A100")


def test_the_command_measures_saves_and_prints(folder, capsys):
    seen = []

    def measured(case):
        seen.append(case)
        return {"dense": 30e-6, "sparse": 10e-6 if case.group == 32 else 40e-6}

    crossover.main(["--layers", "64x128", "--groups", "1", "32", "--tokens", "3", "300"], measured)
    shown = capsys.readouterr().out
    assert seen == [
        Case(64, 128, group, 13, "bfloat16", training, tokens, graph=graph)
        for group, training in [(1, False), (32, False), (32, True)]
        for tokens in (4, 512)
        for graph in (True, False)
    ]
    line = next(line for line in shown.splitlines() if "V=32" in line and "forward 512 " in line)
    assert line.split() == ["64x128", "V=32", "89.84%", "bfloat16", "forward", "512", "30.0", "10.0", "3.00x", "sparse"]
    assert "1.00x  dense" in shown
    crossover._tables.clear()  # as in another process
    crossover.main(["--show"])
    assert capsys.readouterr().out == shown
    saved = json.loads(next(folder.iterdir()).read_text())
    assert len(saved["cases"]) == 12


def test_the_command_stops_in_time(folder, capsys):
    crossover.main(["--layers", "64x128", "--groups", "32", "--seconds", "-1"], lambda case: {"dense": 1.0})
    assert "16 cases were not measured: the time of -1 s was up." in capsys.readouterr().out


def test_mistakes_in_the_command_are_named(folder):
    for arguments, message in [
        (["--layers", "64"], "like 3072x768; got '64'"),
        (["--layers", "60x64", "--groups", "16"], r"60 neurons \(layer 60x64\) cannot be split into groups of 16"),
        (["--dtypes", "int8"], "must be of bf16, fp16, fp32, tf32; got 'int8'"),
    ]:
        with pytest.raises(SparsityError, match=message):
            crossover.main(arguments, lambda case: {"dense": 1.0})
    if not torch.cuda.is_available():
        with pytest.raises(SparsityError, match="needs a CUDA device"):
            crossover.main([])


@pytest.mark.parametrize("training", [False, True])
def test_every_way_that_is_timed_computes_the_same(training):
    """The clock's work itself, on the CPU, with a clock that looks at the results."""
    for case in cases_of(["32x24"], [1, 8], [0.75], ["fp32"], [4], [training]):
        shapes = []

        def timer(calls, shapes=shapes):
            results = [call() for call in calls[:2]]
            shapes.append([tuple(t.shape for t in (r if isinstance(r, tuple) else (r,))) for r in results])
            return 1.0

        seconds = measured_seconds(case, timer, "cpu")
        assert set(seconds) == {"dense", "sparse"} | ({"collected"} if training else set())
        assert all(result[0] == ((4, 24) if training else (4, 32)) for results in shapes for result in results)


def test_a_layer_asks_for_its_own_case(folder):
    layer, mask = nn.Linear(24, 32), torch.eye(2, 24).bool().repeat_interleave(16, 0)
    layer.weight.data.masked_fill_(~mask, 0)
    module = GroupedFanInLinear.from_dense(layer, mask)
    assert module._case(torch.bfloat16, True, 100) == Case(32, 24, 16, 1, "bfloat16", True, 128)


def test_few_tokens_condensed_is_the_formula_with_gradients():
    g = torch.Generator().manual_seed(0)
    indices = torch.rand(6, 9, generator=g).argsort(1)[:, :4]
    x, values, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 9), (6, 4), (6,)))
    assert torch.autograd.gradcheck(lambda x, v, b: condensed.linear(x, v, indices, b), (x, values, bias))
    weight = condensed.dense(values, indices, 9)
    torch.testing.assert_close(condensed.linear(x, values, indices, bias), nn.functional.linear(x, weight, bias))
    torch.library.opcheck(torch.ops.sparselearn.condensed_linear.default, (x.detach(), values.detach(), indices, None))
    with pytest.raises(SparsityError, match="0 < T <= 16"):
        condensed.linear(torch.randn(17, 9), values, indices)


def test_later_cases_of_a_kind_try_the_finalists_alone(folder, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from sparselearn.kernels.grouped_fan_in.launch import Blocks

    monkeypatch.setattr(crossover_measure, "_finalists", {})
    monkeypatch.setattr(crossover_measure, "FINALISTS", 2)
    blocks = [Blocks(n, 64, 4, 3) for n in (64, 16, 32, 128)]
    table, tried = crossover.table(), []

    def timer(calls):
        tried.append(calls)
        if calls == 128:
            raise RuntimeError("OutOfResources: shared memory")
        return float(calls)

    def best(tokens, everything=False, group=32):
        tried.clear()
        key = ("forward", 4, group, 12, "bfloat16", tokens)
        found = crossover_measure._best(key, blocks, timer, table, lambda b: b.tokens, everything)
        assert table.blocks[key] == tuple(next(iter(found)))
        return [b.tokens for b in found]

    assert best(12) == [16, 32, 64]
    assert best(10) == [16, 32]
    assert tried == [32, 16] or tried == [16, 32]
    assert best(12, everything=True) == [16, 32, 64]
    assert best(7) == [16, 32, 64]  # fewer tokens are another kind
    assert best(12, group=16) == [16, 32, 64]

    def broken(calls):
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        crossover_measure._best(("forward", 4, 8, 12, "bfloat16", 12), blocks, broken, table, lambda b: b, True)


def test_candidates_fit_the_case(folder):
    pytest.importorskip("triton", reason="triton is not installed")
    for case, largest, smallest in [(CASE._replace(tokens=16), 16, 16), (CASE._replace(tokens=4096), 256, 64)]:
        sizes = {b.tokens for b in crossover_measure.candidates(case, "forward")}
        assert (max(sizes), min(sizes)) == (largest, smallest)
    wide = crossover_measure.candidates(CASE._replace(dtype="float32", tokens=4096), "forward")
    assert all(b.inputs <= 32 or b.tokens <= 64 for b in wide)
    assert any(b.ahead for b in wide)


@pytest.mark.parametrize("group", [8, 16, 32, 64, 128])
def test_float32_kernels_have_no_stages_that_triton_compiles_wrongly(folder, group):
    pytest.importorskip("triton", reason="triton is not installed")
    from sparselearn.kernels.grouped_fan_in import launch

    for tokens, dtype, kernel in product((1, 16, 64, 4096), ("float32", "tf32"), ("forward", "grad_values")):
        case = CASE._replace(dtype=dtype, group=group, tokens=tokens)
        default = launch.forward_blocks(torch.empty(2, group, 37), tokens)
        assert max(blocks.stages for blocks in [default, *crossover_measure.candidates(case, kernel)]) <= 4
    assert launch.forward_blocks(torch.empty(2, group, 37, dtype=torch.bfloat16), 16).stages == 5


def test_the_name_of_a_dtype_and_the_way_are_constants_of_a_whole_graph(folder):
    def way_of(x):
        way = crossover.choose(*CASE._replace(dtype=crossover.dtype_name(x.dtype)))
        return x * {"dense": 2, "sparse": 3}[way]

    crossover.table().seconds[CASE._replace(dtype="float16")] = {"dense": 3.0, "sparse": 2.0}
    compiled = torch.compile(way_of, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2, 2]
    assert compiled(torch.ones(2, dtype=torch.float16)).tolist() == [3, 3]
