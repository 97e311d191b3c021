"""Load, inspect and verify sparse checkpoints."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from sparselearn import distributed
from sparselearn.checkpoint import bits, files
from sparselearn.checkpoint.bits import Array
from sparselearn.checkpoint.manifest import Manifest, WeightInfo, hash_of
from sparselearn.checkpoint.saving import save
from sparselearn.checkpoint.tensors import in_order, named_tensors, plain_model
from sparselearn.errors import SparsityError, closest
from sparselearn.sparsifier import Sparsifier

__all__ = ["Form", "Manifest", "WeightInfo", "inspect", "iterate", "load", "load_masks", "load_state_dict", "save",
           "verify"]  # fmt: skip

Form = Literal["dense", "masked", "condensed", "semi_structured"]


def inspect(path: str | Path) -> Manifest:
    """What the checkpoint holds, from its manifest; sizes and headers of the files are checked, tensors are not read.

    Raises:
        SparsityError: no checkpoint, or a damaged one.
    """
    return files.read_manifest(Path(path))


T = TypeVar("T")


def _all(info: WeightInfo) -> bool:
    return True


@dataclass(frozen=True)
class _Stored:
    """One weight as it lies in the file."""

    info: WeightInfo
    tensors: Mapping[str, Tensor]  # mapped, not read

    def array(self, key: str) -> Array:
        tensor = self.tensors[key]
        return files.bits_of(tensor).reshape(tensor.shape)

    @property
    def values(self) -> Array:
        return self.array(self.info.values_key).reshape(-1)

    def mask_bits(self) -> Array | None:
        """The mask, packed."""
        info = self.info
        if not info.masked:
            return None
        parts = {part: self.array(info.key(part)) for part in info.layout.parts(info.shape, info.nnz)}
        return info.layout.decode_bits(parts, info.shape, info.nnz)

    def mask(self, packed: Array | None) -> Tensor | None:
        """From `mask_bits`, as a user sees it."""
        if packed is None:
            return None
        if not self.info.size:  # torch gives empty arrays a stride of 0, and then refuses to view them
            return torch.empty(self.info.shape, dtype=torch.bool)
        return torch.from_numpy(bits.unpack(packed, self.info.size)).view(self.info.shape)

    def write(self, packed: Array | None, out: Tensor) -> None:
        """The dense weight into a contiguous CPU tensor."""
        info = self.info
        if packed is None or info.encoding == "dense":
            files.bits_of(out)[:] = self.values
        else:
            bits.scatter(self.values, packed, files.bits_of(out), info.layout.per_byte(info.shape))


Then = Callable[[_Stored, Array | None], T]  # the mask comes packed


def _read(path: Path, want: Callable[[WeightInfo], bool], then: Then[T]) -> Iterator[T]:
    """What `then` makes of the wanted weights and their masks, every byte of which has been checked."""
    manifest = files.read_manifest(path)
    reader = files.Reader(path, manifest)

    def check(stored: _Stored) -> T:
        try:
            packed = _checked_mask(stored)
        except SparsityError as error:
            raise SparsityError(
                f"`{stored.info.name}` of `{path}` is damaged: {error}. Take another copy of the checkpoint."
            ) from None
        return then(stored, packed)

    yield from in_order(check, (_Stored(info, reader.read(info)) for info in manifest.weights if want(info)))


def _checked_mask(stored: _Stored) -> Array | None:
    """The mask, packed, of a weight all of whose bytes are right."""
    info, values = stored.info, stored.values
    if info.dtype == torch.bool and bool((values > 1).any()):
        raise SparsityError("its bools must be 0 or 1; some are not")
    packed = stored.mask_bits()
    kept = values
    if packed is not None:
        if (nnz := bits.count(packed)) != info.nnz:
            raise SparsityError(f"its mask must have {info.nnz} active weights; it has {nnz}")
        if hash_of(packed) != info.mask_hash:
            raise SparsityError("its mask is not the one that was saved")
        if info.encoding == "dense" and info.nnz < info.size:
            kept = bits.gather(values, bits.unpack(packed, info.size), info.nnz)
            if np.count_nonzero(values) != np.count_nonzero(kept):
                raise SparsityError("it has weights outside of its mask that are not +0")
    if hash_of(kept) != info.values_hash:
        raise SparsityError("its values are not those that were saved")
    return packed


def _dense(stored: _Stored, packed: Array | None) -> tuple[WeightInfo, Tensor, Tensor | None]:
    """Entry, dense tensor and mask."""
    return stored.info, _dense_tensor(stored, packed), stored.mask(packed)


def _dense_tensor(stored: _Stored, packed: Array | None) -> Tensor:
    info = stored.info
    if packed is None or info.encoding == "dense":
        return stored.tensors[info.values_key]
    tensor = torch.empty(info.shape, dtype=info.dtype)
    stored.write(packed, tensor)
    return tensor


def iterate(path: str | Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, dense tensor and mask (None where there is none) of one weight at a time, in the model's order.

    Only a few are in memory at once. Every byte of them is checked before they are handed out. Tied weights come once,
    under their first name.

    Raises:
        SparsityError: no checkpoint, or a damaged one.
    """
    return ((info.name, tensor, mask) for info, tensor, mask in _read(Path(path), _all, _dense))


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Ordinary dense tensors by name, for `model.load_state_dict`; tied weights are one tensor under all their names.

    Raises:
        SparsityError: no checkpoint, or a damaged one.
    """
    found = _read(Path(path), _all, lambda stored, packed: (stored.info, _dense_tensor(stored, packed)))
    return {name: tensor for info, tensor in found for name in (info.name, *info.aliases)}


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """The masks (bool, True = active) by weight name, of the weights that were saved with one; tied ones once.

    Raises:
        SparsityError: no checkpoint, or one whose masks or masked weights are damaged.
    """
    masked = _read(Path(path), lambda info: info.masked, lambda stored, packed: (stored.info, stored.mask(packed)))
    return {info.name: mask for info, mask in masked if mask is not None}


def verify(path: str | Path) -> None:
    """Check every byte: the manifest, the headers, all hashes and counts.

    Raises:
        SparsityError: no checkpoint, or a damaged one; names the first damaged tensor.
    """
    deque(_read(Path(path), _all, lambda stored, packed: None), maxlen=0)


def load(
    path: str | Path, into: nn.Module, as_: Form = "dense", *, sparsifier: Sparsifier | None = None
) -> dict[str, Tensor]:
    """Put the weights of a checkpoint into a model. It is changed only after every byte has been checked.

    Args:
        path: the folder that `save` wrote.
        into: a model with the same names, shapes and dtypes. DDP, torch.compile and FSDP2 may be around it.
        as_: "dense": ordinary tensors, pruned weights are zeros. "masked": the same, and the masks are returned; with
            `sparsifier`, also imposed on it, so that training goes on. "condensed": layers are swapped for sparse
            modules, see `sparselearn.modules.convert`. "semi_structured": linear layers whose masks are n:m become
            `sparselearn.modules.SemiStructuredLinear`; others stay as they are.
        sparsifier: of this model, with "masked" only. Its clock and the optimizer's state are not in a sparse
            checkpoint; an exact resumption needs theirs.

    Returns:
        The masks by weight name, empty for "dense".

    Raises:
        SparsityError: no checkpoint, or a damaged one; a model that it does not fit.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> from sparselearn import Sparsifier, static
    >>> model, copy = nn.Linear(64, 32), nn.Linear(64, 32)
    >>> save(Sparsifier(model, static(), sparsity=0.9), folder)
    >>> sparsifier = Sparsifier(copy, static(), sparsity=0.9, seed=1)
    >>> masks = load(folder, copy, "masked", sparsifier=sparsifier)
    >>> torch.equal(copy.weight, model.weight), torch.equal(sparsifier.masks["weight"], masks["weight"])
    (True, True)
    """
    if as_ not in get_args(Form):
        raise SparsityError(f"`as_` must be one of {', '.join(get_args(Form))}; got {as_!r}.")
    if sparsifier is not None and as_ != "masked":
        raise SparsityError(f"`sparsifier` goes with `as_='masked'`; got {as_!r}.")
    model, state = plain_model(into), named_tensors(into)
    _check_fit(Path(path), {name: tensor for name, (_, tensor) in state.items()})
    checked = list(_read(Path(path), _all, lambda stored, packed: (stored, packed)))
    tensors: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    targets = (
        _own_memory({name: tensor for name, (_, tensor) in state.items()}) if sparsifier is None else {}
    )  # the sparsifier has dense weights besides
    for info, tensor, mask in in_order(partial(_placed, targets, as_ != "dense"), checked):
        for name in (info.name, *info.aliases):
            key, target = state[name]
            tensors[key] = distributed.place_like(tensor, target) if type(target) is not Tensor else tensor
        if mask is not None:
            masks[info.name] = mask
    if sparsifier is not None:
        if missing := sparsifier.masks.keys() - masks.keys():
            raise SparsityError(f"`{min(missing)}` is sparse in the sparsifier and has no mask in `{path}`.")
        sparsifier.set_masks(masks)
    with sparsifier.dense_weights() if sparsifier is not None else nullcontext():
        model.load_state_dict(tensors)  # torch copies nothing where a tensor is the model's own
    if as_ in ("condensed", "semi_structured"):
        from sparselearn.modules import SemiStructuredLinear, convert

        convert(model, masks, force=True, candidates=None if as_ == "condensed" else [SemiStructuredLinear])
    return masks


def _own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that may be written to directly: ordinary memory that no other tensor uses."""
    plain = {name: tensor for name, tensor in state.items() if type(tensor) is Tensor and tensor.is_cpu}
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in plain.values())
    return {
        name: tensor
        for name, tensor in plain.items()
        if users[tensor.untyped_storage().data_ptr()] == 1 and tensor.is_contiguous() and not tensor.is_conj()
    }


def _placed(
    targets: Mapping[str, Tensor], with_masks: bool, checked: tuple[_Stored, Array | None]
) -> tuple[WeightInfo, Tensor, Tensor | None]:
    """As `_dense`, but in the target where there is one, so that no second model is held."""
    stored, packed = checked
    info, mask = stored.info, stored.mask(packed) if with_masks else None
    if info.name not in targets:
        return info, _dense_tensor(stored, packed), mask
    stored.write(packed, targets[info.name])
    return info, targets[info.name], mask


def _check_fit(path: Path, state: Mapping[str, Tensor]) -> None:
    """The model and the checkpoint have the same tensors."""
    infos = {name: info for info in inspect(path).weights for name in (info.name, *info.aliases)}
    for name in (*infos, *state):
        if name not in state:
            raise SparsityError(f"`{path}` holds `{name}`, which the model has not. Closest: {closest(name, state)}.")
        if name not in infos:
            raise SparsityError(f"The model has `{name}`, which `{path}` has not. Closest: {closest(name, infos)}.")
        info, tensor = infos[name], state[name]
        if info.shape != tensor.shape or info.dtype != tensor.dtype:
            raise SparsityError(
                f"`{name}` is {tensor.dtype} of shape {list(tensor.shape)} in the model and {info.dtype} of shape "
                f"{list(info.shape)} in `{path}`. Make the model alike (`model.to(dtype)`), so that nothing is rounded."
            )
