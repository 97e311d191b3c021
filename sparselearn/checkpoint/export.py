"""Dense exports that other programs read: a plain safetensors file, a Hugging Face folder, an ONNX file.

All of them hold ordinary tensors in which pruned weights are zeros, and nothing that names this library. A Hugging
Face folder carries no `sparsity_config`: current loaders reject or misread one (vLLM from 0.19, compressed-tensors
from 0.15).
"""

import importlib
import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparselearn.checkpoint.api import inspect, iterate
from sparselearn.checkpoint.legacy import read_legacy
from sparselearn.checkpoint.manifest import FILE
from sparselearn.checkpoint.plain import (
    copy_model_files,
    model_config,
    read_tensors,
    replacing,
    write_safetensors,
)
from sparselearn.checkpoint.tensors import tied_names
from sparselearn.errors import SparsityError

DenseFormat = Literal["safetensors", "huggingface"]
FORMATS = ("safetensors", "huggingface")
PROTOBUF_LIMIT = 2**31 - 1


def export_dense(
    path_or_state: str | Path | Mapping[str, Tensor],
    out: str | Path,
    *,
    format: DenseFormat = "safetensors",
    base: str | Path | None = None,
) -> None:
    """Write the weights as ordinary dense tensors that load without this library.

    Values keep their dtype and every bit. Written atomically: `out` appears whole or not at all.

    Args:
        path_or_state: a sparse or a legacy checkpoint, or a state dict whose pruned weights are zeros.
        out: the file to write, for "safetensors" (an existing one is replaced); the new folder, for "huggingface".
        format: "safetensors": one file with every name, tied weights under each of theirs, for
            `model.load_state_dict(safetensors.torch.load_file(out))`. "huggingface": a folder for
            `from_pretrained(out)`, tied weights under their first name only. The names must be those of the Hugging
            Face model's own `state_dict()`.
        base: "huggingface" only: the folder of the model that was pruned. Its config, tokenizer and other text files
            are copied, but for quantization and sparsity settings; the dtype in the config becomes that of the weights.

    Raises:
        SparsityError: an unknown format, a base without `config.json`, a folder `out` that holds files, a tensor that
            has no dense layout, float8 weights for Hugging Face (it loads these with a quantization config only).

    >>> import tempfile, pathlib, safetensors.torch
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "dense.safetensors"
    >>> export_dense({"weight": torch.tensor([[0.0, 2.0]])}, file)
    >>> safetensors.torch.load_file(file)
    {'weight': tensor([[0., 2.]])}
    """
    if format not in FORMATS:
        raise SparsityError(f"`format` must be 'safetensors' or 'huggingface'; got {format!r}.")
    if (format == "huggingface") != (base is not None):
        raise SparsityError(
            "`base` is the folder of the model that was pruned (config.json, tokenizer): format='huggingface' needs "
            f"it and no other format takes it; got format={format!r} and base={base!r}."
        )
    state, _ = read_any(path_or_state)
    if base is None:
        with replacing(Path(out)) as temporary:
            write_safetensors(state, temporary)
        return
    state = {name: state[name] for name in tied_names(state)}
    config = model_config(Path(base))
    if dtype := _dtype_of(state):
        config.pop("dtype", None)  # the new name of the same; `torch_dtype` is read by old and new versions
        config["torch_dtype"] = dtype
    with replacing(Path(out), folder=True) as temporary:
        copy_model_files(Path(base), temporary)
        write_safetensors(state, temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_any(source: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The dense state and the masks (bool) of any checkpoint, both by name.

    The source is a sparse checkpoint or a legacy one; or, without masks, a Hugging Face folder, a safetensors file, or
    a state dict.
    """
    if isinstance(source, Mapping):
        return dict(source), {}
    path = Path(source)
    if (path / FILE).exists():
        return _read_sparse(path)
    tensors = read_tensors(path)
    return read_legacy(path) if any(name.endswith(".bitmask") for name in tensors) else (tensors, {})


def _read_sparse(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    aliases = {info.name: info.aliases for info in inspect(path).weights}
    state: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for first, tensor, mask in iterate(path):
        state |= dict.fromkeys((first, *aliases[first]), tensor)
        if mask is not None:
            masks[first] = mask
    return state, masks


def _dtype_of(state: Mapping[str, Tensor]) -> str | None:
    """The narrowest dtype that holds all weights, so that `from_pretrained` rounds none."""
    dtypes = sorted({tensor.dtype for tensor in state.values() if tensor.is_floating_point()}, key=str)
    if narrow := [dtype for dtype in dtypes if dtype.itemsize < 2]:
        raise SparsityError(
            f"A Hugging Face folder without a quantization config must hold 16-bit or wider weights; got {narrow[0]}. "
            "Convert the state to torch.bfloat16 first, which holds every float8 value."
        )
    if not dtypes:
        return None
    return str(reduce(torch.promote_types, dtypes)).removeprefix("torch.")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SparsityError(
            f"`export_onnx` needs the package `{name}`, which is not installed. Run `pip install onnx onnxscript`."
        ) from None


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    out: str | Path,
    *,
    sparse_initializers: bool = False,
    dynamic_shapes: Any = None,
) -> None:
    """Write the model in evaluation mode as an ONNX file, by `torch.onnx.export(..., dynamo=True)`.

    Pruned weights are zeros of dense initializers, which every runtime reads. The written file passes onnx's checker.
    The model's training flags are left as they were.

    Args:
        model: its weights must be masked, as they are between optimizer steps.
        args: example inputs; their shapes are fixed in the file but for those in `dynamic_shapes`.
        out: the file to write, replaced atomically.
        sparse_initializers: store weights as `SparseTensorProto` (values and int64 positions, 8 + itemsize bytes per
            nonzero) where that is smaller and legal: floating point of 16 bits or more, neither an input nor an
            output of the graph, not read by a nested graph. Saves disk only; ONNX Runtime makes them dense on loading.
        dynamic_shapes: as of `torch.export.export`.

    Raises:
        SparsityError: onnx or onnxscript are missing, or the model passes the 2 GiB that one ONNX file may have.
    """
    onnx = _module("onnx")
    _module("onnxscript")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        program = torch.onnx.export(model, args, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes)
    finally:
        for module in training:
            module.training = True
    assert program is not None  # it is None only with dynamo=False
    proto = program.model_proto
    if sparse_initializers:
        _make_sparse(onnx, proto.graph)
    if (size := proto.ByteSize()) > PROTOBUF_LIMIT:
        raise SparsityError(
            f"One ONNX file holds at most 2 GiB; this model has {size / 2**30:.2f} GiB. Call `torch.onnx.export(model, "
            "args, out, external_data=True)`, which writes the weights beside it."
        )
    onnx.checker.check_model(proto)
    with replacing(Path(out)) as temporary:
        temporary.write_bytes(proto.SerializeToString())


def _make_sparse(onnx: Any, graph: Any) -> None:
    """Move every initializer that is legal and smaller as a SparseTensorProto to `sparse_initializer`, bit for bit."""
    types = onnx.TensorProto
    floating = (types.FLOAT, types.FLOAT16, types.BFLOAT16, types.DOUBLE)
    taken = {value.name for value in (*graph.input, *graph.output)} | _read_by_nested(onnx, graph)
    dense = []
    for initializer in graph.initializer:
        array = onnx.numpy_helper.to_array(initializer).reshape(-1)
        kept = array.view(f"u{array.itemsize}").nonzero()[0]  # by bits: -0.0 is kept
        smaller = len(kept) * (array.itemsize + 8) < array.nbytes
        if initializer.data_type not in floating or initializer.name in taken or not smaller:
            dense.append(initializer)
            continue
        values = types(name=initializer.name, data_type=initializer.data_type, dims=[len(kept)])
        values.raw_data = array[kept].tobytes()
        positions = onnx.numpy_helper.from_array(kept.astype("int64"), f"{initializer.name}_positions")
        graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, positions, list(initializer.dims)))
    del graph.initializer[:]
    graph.initializer.extend(dense)


def _read_by_nested(onnx: Any, graph: Any) -> set[str]:
    """Names read inside the branches and loop bodies of the graph."""
    names: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            for nested in (attribute.g, *attribute.graphs):
                names |= {name for inner in nested.node for name in inner.input} | _read_by_nested(onnx, nested)
    return names
