"""Ordinary safetensors files and Hugging Face folders: atomic writing, and reading with one kind of error."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselearn.checkpoint import files
from sparselearn.checkpoint.manifest import FILE
from sparselearn.errors import SparsityError

COMPRESSION_KEYS = ("quantization_config", "sparsity_config", "compression_config")
COPIED_SUFFIXES = (".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt")


@contextmanager
def replacing(out: Path, *, folder: bool = False) -> Iterator[Path]:
    """A temporary path beside `out` to write to; it takes the place of `out` when the block ends without an error."""
    if folder and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SparsityError(f"`{out}` must be a new or an empty folder; it exists. Remove it or choose another name.")
    if not folder and out.is_dir():
        raise SparsityError(f"`{out}` must be the name of a file; it is a folder. Add a file name.")
    if not out.parent.is_dir():
        raise SparsityError(f"`{out}` cannot be written: there is no folder `{out.parent}`. Create it first.")
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    temporary = scratch / out.name
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary) if folder else (temporary,):
            _flush(path)
        os.replace(temporary, out)
        _flush(out.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file with the metadata that Hugging Face loaders ask for."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if tensor.layout != torch.strided:
            raise SparsityError(
                f"`{name}` must be an ordinary (strided) tensor; its layout is {tensor.layout}. Call `.to_dense()`."
            )
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != plain.nbytes:
            plain = plain.clone()  # the file format has no shared memory
        storages.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    path.touch()
    mode = path.stat().st_mode
    files.library().torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library lets nobody else read what it writes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a folder with `model.safetensors` or with shards and their index."""
    if not path.is_dir():
        return read_safetensors(path)
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(path / "model.safetensors")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise SparsityError(f"`{index}` must have a `weight_map` from names to files; it has not.")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file or "\\" in file:
            raise SparsityError(f"`{index}` must name files of its own folder; it names {file!r}.")
        shard = read_safetensors(path / file)
        if odd := [name for name in shard if names.get(name) != file]:
            raise SparsityError(f"`{path / file}` holds `{odd[0]}`, which the index does not place there.")
        tensors |= shard
    if lost := [name for name in names if name not in tensors]:
        raise SparsityError(f"`{index}` names `{lost[0]}`, which its shard `{names[lost[0]]}` does not hold.")
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file."""
    safetensors = files.library()
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise SparsityError(f"`{path}` must be a whole safetensors file; it cannot be read ({error}).") from None
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where it holds another value."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SparsityError(f"`{path}` must be a JSON file; it cannot be read ({error}).") from None
    return content if isinstance(content, dict) else {}


def model_config(base: Path) -> dict[str, Any]:
    """The base's config.json without its quantization and sparsity settings, nested ones included."""
    path = base / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SparsityError(
            f"`{path}` must be the config of a Hugging Face model; it cannot be read ({error}). Pass the folder of the "
            "model that was pruned as `base`; `huggingface_hub.snapshot_download(name)` returns a model's folder."
        ) from None
    if not isinstance(config, dict):
        raise SparsityError(f"`{path}` must hold a JSON object; it holds a {type(config).__name__}.")
    return {key: _stripped(value) for key, value in config.items() if key not in COMPRESSION_KEYS}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(inner) for key, inner in value.items() if key not in COMPRESSION_KEYS}
    return value


def copy_model_files(base: Path, folder: Path) -> None:
    """Copy the tokenizer and the other text files that lie beside the base's weights; config.json is not copied."""
    for path in sorted(base.iterdir()):
        weights = path.name.endswith(".index.json")
        settings = path.name in ("config.json", FILE) or "quant" in path.name
        named = path.suffix in COPIED_SUFFIXES or path.name.startswith("LICENSE")
        if path.is_file() and named and not weights and not settings:
            shutil.copyfile(path, folder / path.name)
