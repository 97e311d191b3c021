"""The files of a sparse checkpoint: safetensors shards that are never changed, and the manifest that makes them valid.

A save first writes its shards under names made from their content, then replaces the manifest in one step, and only
then removes the shards that no manifest names. Killed at any moment, it leaves the old checkpoint or the new one.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselearn.checkpoint import manifest as manifests
from sparselearn.checkpoint.bits import Array
from sparselearn.checkpoint.manifest import FILE, LARGEST, SHARD_NAME, Manifest, Shard, WeightInfo, hash_of
from sparselearn.errors import SparsityError

LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit


def library() -> Any:
    """The safetensors package."""
    try:
        import safetensors.torch
    except ImportError:
        raise SparsityError(
            "Sparse checkpoints need the package `safetensors`, which is not installed. Run `pip install safetensors`."
        ) from None
    return safetensors


def bits_of(tensor: Tensor) -> Array:
    """A contiguous CPU tensor as a flat array of unsigned integers, sharing its memory."""
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    array = tensor.reshape(-1).view(signed).numpy()
    return array.view(f"u{array.itemsize}")


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Make the checkpoint's folder, whose parent must exist, and in it one for files that are being written."""
    if folder.exists() and not folder.is_dir():
        raise SparsityError(f"`{folder}` must be the folder of a checkpoint, new or old; it is a file.")
    if not folder.parent.is_dir():
        raise SparsityError(f"`{folder}` cannot be made: there is no folder `{folder.parent}`. Create it first.")
    temporary = folder / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
    temporary.mkdir(parents=True)
    try:
        _flush(folder.parent)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_shard(temporary: Path, number: int, weights: Iterable[WeightInfo], tensors: dict[str, Tensor]) -> Shard:
    """Put one shard into the checkpoint's folder, under a name that no other content has."""
    content = "".join(f"{w.name}\n{w.shape}{w.dtype}{w.layout}{w.values_hash}{w.mask_hash}\n" for w in weights)
    partial = temporary / f"weights-{number:05d}-{hash_of(content.encode())[:16]}.safetensors"
    partial.touch()
    mode = partial.stat().st_mode
    library().torch.save_file(tensors, partial, metadata={"sparselearn_format_version": str(manifests.VERSION)})
    partial.chmod(mode)  # the library lets nobody else read what it writes
    _flush(partial)
    path = temporary.parent / partial.name
    os.replace(partial, path)
    return Shard(path.name, path.stat().st_size, hash_of(_header(path)))


def commit(temporary: Path, manifest: Manifest) -> None:
    """Put the manifest in the place of the old one, and remove what only the old one needed."""
    folder, partial = temporary.parent, temporary / FILE
    partial.write_bytes(manifests.to_json(manifest))
    _flush(partial)
    _flush(folder)  # the names of the shards
    os.replace(partial, folder / FILE)
    _flush(folder)
    needed = {shard.file for shard in manifest.shards}
    for path in list(folder.iterdir()):
        if SHARD_NAME.fullmatch(path.name) and path.name not in needed:
            path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest; the sizes and the headers of the shards are checked too, their tensors are not."""
    path = folder / FILE
    try:
        if not path.is_file():
            raise SparsityError(f"there is no such file. `{folder}` must be a folder that `save` wrote")
        if (size := path.stat().st_size) > LARGEST:
            raise SparsityError(f"it has {size} bytes; more than {LARGEST} are not read")
        with path.open("rb") as file:
            found = manifests.from_json(file.read(size))
    except (OSError, SparsityError) as error:
        raise SparsityError(f"`{path}` cannot be read: {error}.") from None
    for shard in found.shards:
        _check_shard(folder / shard.file, shard)
    return found


def _check_shard(path: Path, shard: Shard) -> None:
    try:
        if not path.is_file():
            raise SparsityError("there is no such file")
        if (size := path.stat().st_size) != shard.bytes:
            raise SparsityError(f"it must have {shard.bytes} bytes; it has {size}")
        if hash_of(_header(path)) != shard.header:
            raise SparsityError("its header is not the one that was written")
    except (OSError, SparsityError) as error:
        raise SparsityError(f"`{path}` is damaged: {error}. Take another copy of the checkpoint.") from None


def _header(path: Path) -> bytes:
    """All bytes of a safetensors file before its tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        n = int.from_bytes(length, "little")
        if n > min(path.stat().st_size, LARGEST_HEADER):
            raise SparsityError(f"it claims a header of {n} bytes, which is more than the file or the format allows")
        return length + file.read(n)


class Reader:
    """The open shards of a checkpoint. Tensors are mapped, not read: nothing is allocated for them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._shards = manifest.shards
        self._open: tuple[int, Any] | None = None  # one at a time
        self._keys: list[set[str]] = [set() for _ in manifest.shards]
        for weight in manifest.weights:
            self._keys[weight.shard] |= weight.tensors.keys()

    def read(self, weight: WeightInfo) -> Mapping[str, Tensor]:
        """The weight's tensors, whose dtypes and shapes are those that the manifest calls for."""
        path = self._folder / self._shards[weight.shard].file
        try:
            found = {key: self._shard(weight.shard).get_tensor(key) for key in weight.tensors}
        except SparsityError:
            raise
        except Exception as error:  # the library has no base class for all that it raises
            raise SparsityError(f"`{path}` is damaged: `{weight.name}` cannot be read ({error}).") from None
        for key, (dtype, shape) in weight.tensors.items():
            wanted = weight.dtype if key == weight.values_key else getattr(torch, dtype.name)
            if found[key].dtype != wanted or found[key].shape != shape:
                raise SparsityError(
                    f"`{path}` is damaged: `{key}` must be {wanted} of shape {list(shape)}; it is {found[key].dtype} "
                    f"of shape {list(found[key].shape)}."
                )
        return found

    def _shard(self, number: int) -> Any:
        if self._open is None or self._open[0] != number:
            path = self._folder / self._shards[number].file
            handle = library().safe_open(path, framework="pt")
            if odd := set(handle.keys()) ^ self._keys[number]:
                raise SparsityError(f"`{path}` is damaged: {sorted(odd)[0]!r} is only in it or only in the manifest.")
            self._open = number, handle
        return self._open[1]
