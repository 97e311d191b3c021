"""Load, inspect and verify sparse checkpoints."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from sparselearn import distributed
from sparselearn.checkpoint import encodings, files
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
class _Checked:
    """One weight as stored, after all checks."""

    info: WeightInfo
    stored: Tensor
    kept: encodings.Array
    flat: encodings.Mask | None

    def dense(self) -> tuple[WeightInfo, Tensor, Tensor | None]:
        """Entry, dense tensor and mask."""
        info, flat = self.info, self.flat
        if flat is None or info.encoding == "dense":
            tensor = self.stored
        else:
            tensor = _tensor(encodings.scatter(self.kept, flat), info.dtype, info.shape)
        return info, tensor, None if flat is None else _tensor(flat, torch.bool, info.shape)


def _read(path: Path, want: Callable[[WeightInfo], bool], then: Callable[[_Checked], T]) -> Iterator[T]:
    """What `then` makes of the wanted weights, every byte of which has been checked."""
    manifest = files.read_manifest(path)
    reader = files.Reader(path, manifest)

    def check(item: tuple[WeightInfo, Mapping[str, Tensor]]) -> T:
        info, tensors = item
        try:
            checked = _check(info, tensors)
        except SparsityError as error:
            raise SparsityError(
                f"`{info.name}` of `{path}` is damaged: {error}. Take another copy of the checkpoint."
            ) from None
        return then(checked)

    yield from in_order(check, ((info, reader.read(info)) for info in manifest.weights if want(info)))


def _check(info: WeightInfo, tensors: Mapping[str, Tensor]) -> _Checked:
    arrays = {key: files.bits_of(tensor).reshape(tensor.shape) for key, tensor in tensors.items()}
    values = arrays[info.values_key].reshape(-1)
    if info.dtype == torch.bool and bool((values > 1).any()):
        raise SparsityError("its bools must be 0 or 1; some are not")
    mask = None
    kept = values
    if info.masked:
        parts = {part: arrays[info.key(part)] for part in info.layout.parts(info.shape, info.nnz)}
        mask = info.layout.decode(parts, info.shape, info.nnz)
        if (nnz := int(np.count_nonzero(mask))) != info.nnz:
            raise SparsityError(f"its mask must have {info.nnz} active weights; it has {nnz}")
        if hash_of(encodings.pack(mask)) != info.mask_hash:
            raise SparsityError("its mask is not the one that was saved")
        if info.encoding == "dense" and info.nnz < info.size:
            kept = encodings.gather(values, mask, info.nnz)
            if np.count_nonzero(values) != np.count_nonzero(kept):
                raise SparsityError("it has weights outside of its mask that are not +0")
    if hash_of(kept) != info.values_hash:
        raise SparsityError("its values are not those that were saved")
    return _Checked(info, tensors[info.values_key], kept, mask)


def _tensor(array: encodings.Array | encodings.Mask, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not array.size:  # torch gives empty arrays a stride of 0, and then refuses to view them
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(array).view(dtype).view(shape)


def iterate(path: str | Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, dense tensor and mask (None where there is none) of one weight at a time, in the model's order.

    Only a few are in memory at once. Every byte of them is checked before they are handed out. Tied weights come once,
    under their first name.

    Raises:
        SparsityError: no checkpoint, or a damaged one.
    """
    return ((info.name, tensor, mask) for info, tensor, mask in _read(Path(path), _all, _Checked.dense))


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Ordinary dense tensors by name, for `model.load_state_dict`; tied weights are one tensor under all their names.

    Raises:
        SparsityError: no checkpoint, or a damaged one.
    """
    return {
        name: tensor
        for info, tensor, _ in _read(Path(path), _all, _Checked.dense)
        for name in (info.name, *info.aliases)
    }


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """The masks (bool, True = active) by weight name, of the weights that were saved with one; tied ones once.

    Raises:
        SparsityError: no checkpoint, or one whose masks or masked weights are damaged.
    """
    masked = _read(Path(path), lambda info: info.masked, lambda checked: (checked.info, checked.flat))
    return {info.name: _tensor(flat, torch.bool, info.shape) for info, flat in masked if flat is not None}


def verify(path: str | Path) -> None:
    """Check every byte: the manifest, the headers, all hashes and counts.

    Raises:
        SparsityError: no checkpoint, or a damaged one; names the first damaged tensor.
    """
    deque(_read(Path(path), _all, lambda checked: None), maxlen=0)


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
    tensors: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for info, tensor, mask in _read(Path(path), _all, _Checked.dense):
        for name in (info.name, *info.aliases):
            key, target = state[name]
            tensors[key] = distributed.place_like(tensor, target) if type(target) is not Tensor else tensor
        if mask is not None and as_ != "dense":
            masks[info.name] = mask
    if sparsifier is not None:
        if missing := sparsifier.masks.keys() - masks.keys():
            raise SparsityError(f"`{min(missing)}` is sparse in the sparsifier and has no mask in `{path}`.")
        sparsifier.set_masks(masks)
    with sparsifier.dense_weights() if sparsifier is not None else nullcontext():
        model.load_state_dict(tensors)
    if as_ in ("condensed", "semi_structured"):
        from sparselearn.modules import SemiStructuredLinear, convert

        convert(model, masks, force=True, candidates=None if as_ == "condensed" else [SemiStructuredLinear])
    return masks


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
