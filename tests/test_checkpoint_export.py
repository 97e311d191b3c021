"""Dense exports: bits kept, Hugging Face folders that from_pretrained reads, ONNX files that onnxruntime runs."""

import json
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from sparselearn import SparsityError
from sparselearn.checkpoint.export import export_dense, export_onnx

safetensors = pytest.importorskip("safetensors.torch", reason="checkpoints need safetensors")


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def prune(model, sparsity=0.9):
    """Magnitude, every matrix and filter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                threshold = parameter.abs().flatten().kthvalue(int(sparsity * parameter.numel())).values
                parameter.masked_fill_(parameter.abs() <= threshold, 0)
    return model


# ---- plain safetensors -----------------------------------------------------------------------------------------------


def test_every_dtype_keeps_its_bits_and_views_are_whole(tmp_path):
    raw = torch.randint(0, 256, (64,), dtype=torch.uint8)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    state = OrderedDict((str(dtype), (raw % 2 if dtype == torch.bool else raw).view(dtype)) for dtype in dtypes)
    big = torch.randn(6, 8)
    state |= {"row": big[1], "column": big[:, 2], "transposed": big.T, "tied": big, "again": big}
    state |= {"scalar": torch.tensor(-0.0), "empty": torch.empty(0, 3), "parameter": nn.Parameter(torch.ones(2))}
    export_dense(state, tmp_path / "out.safetensors")
    read = safetensors.load_file(tmp_path / "out.safetensors")
    assert list(sorted(read)) == sorted(state)
    assert all(same(read[name], tensor.detach()) for name, tensor in state.items())
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out.safetensors"
    export_dense({"w": torch.ones(3)}, out)
    with pytest.raises(SparsityError, match=r"`w` must be an ordinary \(strided\) tensor.*`.to_dense\(\)`"):
        export_dense({"a": torch.zeros(3), "w": torch.eye(3).to_sparse()}, out)
    assert same(safetensors.load_file(out)["w"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    export_dense({"w": torch.zeros(3)}, out)
    assert same(safetensors.load_file(out)["w"], torch.zeros(3))


def test_a_killed_export_leaves_the_old_file(tmp_path):
    out = tmp_path / "out.safetensors"
    export_dense({"w": torch.ones(3)}, out)
    code = (
        "import os, sys, torch, safetensors.torch as s\nfrom sparselearn.checkpoint.export import export_dense\n"
        "real = s.save_file\ns.save_file = lambda *a, **k: (real(*a, **k), os._exit(7))\n"
        "export_dense({'w': torch.zeros(3)}, sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)]).returncode == 7
    assert same(safetensors.load_file(out)["w"], torch.ones(3))


def test_where_to_write(tmp_path):
    with pytest.raises(SparsityError, match="must be the name of a file; it is a folder"):
        export_dense({}, tmp_path)
    with pytest.raises(SparsityError, match="there is no folder"):
        export_dense({}, tmp_path / "no" / "out.safetensors")
    with pytest.raises(SparsityError, match="`format` must be 'safetensors' or 'huggingface'; got 'gguf'"):
        export_dense({}, tmp_path / "out", format="gguf")
    with pytest.raises(SparsityError, match="needs it and no other format takes it"):
        export_dense({}, tmp_path / "out", format="huggingface")
    with pytest.raises(SparsityError, match="needs it and no other format takes it"):
        export_dense({}, tmp_path / "out", base=tmp_path)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="Hugging Face exports are read back with transformers")


def tiny_bert(transformers, folder, cls="BertForMaskedLM"):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = getattr(transformers, cls)(config).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\nword\n")
    return model


IDS = torch.arange(12).view(2, 6)


def test_from_pretrained_gives_equal_outputs(tmp_path, transformers):
    base, out = tmp_path / "base", tmp_path / "out"
    model = prune(tiny_bert(transformers, base))
    export_dense(model.state_dict(), out, format="huggingface", base=base)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    loaded, report = transformers.BertForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
    weight = loaded.bert.encoder.layer[0].attention.self.query.weight
    assert (weight == 0).float().mean() == pytest.approx(0.9, abs=0.01)


def test_tied_weights_are_written_once_and_tied_again(tmp_path, transformers):
    base, out = tmp_path / "base", tmp_path / "out"
    model = prune(tiny_bert(transformers, base))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    export_dense(model.state_dict(), out, format="huggingface", base=base)
    names = set(safetensors.load_file(out / "model.safetensors"))
    assert "bert.embeddings.word_embeddings.weight" in names
    assert "cls.predictions.decoder.weight" not in names
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(out)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    ("dtype", "extra", "expected"),
    [
        (torch.bfloat16, {"dtype": "float32"}, "bfloat16"),
        (torch.float32, {"torch_dtype": "bfloat16"}, "float32"),  # would round if the config's were kept
        (torch.float16, {}, "float16"),
    ],
)
def test_the_dtype_is_that_of_the_weights(tmp_path, transformers, dtype, extra, expected):
    base, out = tmp_path / "base", tmp_path / "out"
    model = prune(tiny_bert(transformers, base, "BertModel")).to(dtype)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config | extra))
    export_dense(model.state_dict(), out, format="huggingface", base=base)
    loaded = transformers.AutoModel.from_pretrained(out)
    assert str(loaded.dtype) == f"torch.{expected}"
    assert all(same(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_settings_that_other_loaders_reject_are_left_out(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    settings = {"quantization_config": {"sparsity_config": {}}, "sparsity_config": {}, "compression_config": {}}
    config = {"model_type": "x", "text_config": {"hidden_size": 4, **settings}, "hidden_size": 8, **settings}
    (base / "config.json").write_text(json.dumps(config))
    copied = ["tokenizer.json", "generation_config.json", "merges.txt", "tokenizer.model", "LICENSE", "README.md"]
    left = ["quantize_config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
    left += ["sparselearn.json", "hf_quant_config.json", "training_args.bin"]
    for name in copied + left:
        (base / name).write_text("{}")
    (base / "folder").mkdir()
    export_dense({"w": torch.ones(2, dtype=torch.float16)}, out, format="huggingface", base=base)
    assert {path.name for path in out.iterdir()} == {*copied, "config.json", "model.safetensors"}
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "x",
        "hidden_size": 8,
        "text_config": {"hidden_size": 4},
        "torch_dtype": "float16",
    }


def test_hugging_face_refusals_leave_nothing(tmp_path):
    base = tmp_path / "base"
    base.mkdir()

    def refused(match, state, out=tmp_path / "out"):
        with pytest.raises(SparsityError, match=match):
            export_dense(state, out, format="huggingface", base=base)
        assert not (tmp_path / "out").exists()

    refused(r"config.json` must be the config of a Hugging Face model.*snapshot_download", {"w": torch.ones(1)})
    (base / "config.json").write_text("[]")
    refused("must hold a JSON object; it holds a list", {"w": torch.ones(1)})
    (base / "config.json").write_text("{}")
    refused("float8_e4m3fn. Convert the state to torch.bfloat16", {"w": torch.ones(1).to(torch.float8_e4m3fn)})
    refused("must be a new or an empty folder", {"w": torch.ones(1)}, base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    return pytest.importorskip("onnx", reason="ONNX export needs onnx")


def run(path, **inputs):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX files are checked in onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(output)


class Net(nn.Module):
    """A convolution, a Gemm, a MatMul (no bias) and a Gather."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.embedding = nn.Embedding(10, 32)
        self.first = nn.Linear(8 * 36, 32)
        self.second = nn.Linear(32, 16, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, index):
        hidden = self.first(self.conv(x).relu().flatten(1)) + self.embedding(index)
        return self.second(self.dropout(hidden))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, onnx):
    """The model, its inputs, and both files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("onnx")
    model, inputs = prune(Net()), {"x": torch.randn(2, 3, 8, 8), "index": torch.tensor([1, 7])}
    model.conv.eval()
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}, "index": {0: torch.export.Dim.DYNAMIC}}
    for name, sparse in (("dense", False), ("sparse", True)):
        export_onnx(
            model, tuple(inputs.values()), folder / f"{name}.onnx", sparse_initializers=sparse, dynamic_shapes=shapes
        )
    assert [module.training for module in (model, model.conv, model.dropout)] == [True, False, True]
    return model.eval(), inputs, folder


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_onnxruntime_gives_the_same_outputs(exported, name):
    model, inputs, folder = exported
    torch.testing.assert_close(run(folder / f"{name}.onnx", **inputs), model(**inputs))
    inputs = {"x": torch.randn(5, 3, 8, 8), "index": torch.arange(5)}
    torch.testing.assert_close(run(folder / f"{name}.onnx", **inputs), model(**inputs))


def test_dense_initializers_are_the_masked_weights(exported, onnx):
    model, _, folder = exported
    graph = onnx.load(folder / "dense.onnx").graph
    arrays = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = [model.conv.weight, model.embedding.weight, model.first.weight]
    assert all(any(same(array, weight.detach()) for array in arrays.values()) for weight in weights)
    assert not graph.sparse_initializer


def test_sparse_initializers_hold_ascending_positions_and_every_bit(exported, onnx):
    model, _, folder = exported
    graph = onnx.load(folder / "sparse.onnx").graph
    assert len(graph.sparse_initializer) == 4
    weights = {tuple(p.shape): p.detach() for p in model.parameters() if p.ndim > 1}
    weights[(32, 16)] = model.second.weight.detach().T.contiguous()  # MatMul reads it transposed
    for sparse in graph.sparse_initializer:
        positions = onnx.numpy_helper.to_array(sparse.indices)
        assert sparse.indices.dims == [len(positions)]
        assert (positions[1:] > positions[:-1]).all()
        dense = torch.zeros(*sparse.dims)
        dense.view(-1)[torch.from_numpy(positions.copy())] = torch.from_numpy(
            onnx.numpy_helper.to_array(sparse.values).copy()
        )
        assert same(dense, weights[tuple(sparse.dims)])
    assert {t.name for t in graph.initializer}.isdisjoint(s.values.name for s in graph.sparse_initializer)
    sizes = {name: (folder / f"{name}.onnx").stat().st_size for name in ("dense", "sparse")}
    weight_bytes = 4 * sum(p.numel() for p in weights.values() if p.shape != (16, 32))
    assert sizes["dense"] - sizes["sparse"] == pytest.approx(0.7 * weight_bytes, rel=0.05)  # 10 % at 12 of 4 bytes


def graph_of(onnx, tensors, nodes=(), inputs=(), outputs=()):
    named = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    return onnx.helper.make_graph(list(nodes), "g", list(inputs), list(outputs), named)


def test_only_what_is_legal_and_smaller_becomes_sparse(onnx):
    from sparselearn.checkpoint.export import _make_sparse

    helper, numpy = onnx.helper, pytest.importorskip("numpy")
    one = numpy.zeros(64, "float32")
    one[3] = -0.0
    half = numpy.zeros(64, "float32")
    half[:22] = 1  # 22 x 12 bytes > 64 x 4 bytes
    inner = graph_of(onnx, {}, [helper.make_node("Relu", ["in_branch"], ["y"])])
    node = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    value = helper.make_tensor_value_info
    graph = graph_of(
        onnx,
        {"sparse": one, "half": half, "integers": one.astype("int64"), "an_input": one, "an_output": one,
         "in_branch": one, "wide": one.astype("float64")},
        [node],
        [value("an_input", 1, [64])],
        [value("an_output", 1, [64])],
    )  # fmt: skip
    _make_sparse(onnx, graph)
    assert [sparse.values.name for sparse in graph.sparse_initializer] == ["sparse", "wide"]
    assert [tensor.name for tensor in graph.initializer] == ["half", "integers", "an_input", "an_output", "in_branch"]
    values = onnx.numpy_helper.to_array(graph.sparse_initializer[0].values)
    assert values.tobytes() == one[3].tobytes()  # -0.0 has a bit set: kept


def test_half_precision_and_an_empty_layer(tmp_path, onnx):
    for dtype in (torch.float16, torch.float64):
        model = prune(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))).to(dtype)
        model[1].weight.data.zero_()
        x = torch.randn(3, 32, dtype=dtype)
        export_onnx(model, (x,), tmp_path / "m.onnx", sparse_initializers=True)
        assert len(onnx.load(tmp_path / "m.onnx").graph.sparse_initializer) == 2
        torch.testing.assert_close(run(tmp_path / "m.onnx", input=x), model(x))


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SparsityError, match=r"needs the package `onnx`, which is not installed. Run `pip install"):
        export_onnx(nn.Linear(2, 2), (torch.ones(1, 2),), tmp_path / "m.onnx")


def test_a_model_past_the_limit_of_one_file(tmp_path, onnx, monkeypatch):
    monkeypatch.setattr("sparselearn.checkpoint.export.PROTOBUF_LIMIT", 1000)
    with pytest.raises(SparsityError, match=r"at most 2 GiB; this model has 0.00 GiB.*external_data=True"):
        export_onnx(nn.Linear(20, 20), (torch.ones(1, 20),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
