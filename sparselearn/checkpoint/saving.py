"""Save sparse checkpoints: masks as masks, the kept values bit for bit, and a hash of everything."""

import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sparselearn import distributed
from sparselearn.checkpoint import bits, encodings, files
from sparselearn.checkpoint.encodings import KINDS, Dense
from sparselearn.checkpoint.manifest import Manifest, Shard, WeightInfo, hash_of, to_json
from sparselearn.checkpoint.tensors import in_order, named_tensors, tied_names
from sparselearn.errors import SparsityError, closest
from sparselearn.selection import clean_name
from sparselearn.sparsifier import Sparsifier

MAX_SHARD_BYTES = 1 << 28

T = TypeVar("T")


def save(
    model: nn.Module | Mapping[str, Tensor] | Sparsifier,
    path: str | Path,
    *,
    masks: Sparsifier | Mapping[str, Tensor] | None = None,
    encoding: str | Mapping[str, str] | None = None,
    method: str | None = None,
    recipe: Any = None,
    metadata: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a sparse checkpoint, a folder of safetensors files with a manifest `sparselearn.json`.

    An older checkpoint in the folder is replaced in one step; other files there stay. Of several processes the first
    writes; all must call where the model is sharded (FSDP2), and wait for each other before another one reads.

    Args:
        model: a sparsifier (its model, with its masks), a module, or a state dict. DDP and torch.compile may be around
            it. All parameters and buffers are stored, tied ones once, in their dtype.
        path: the folder, new or not; the one around it must exist.
        masks: with a model or state dict: its sparsifier, or weight name -> bool mask of the weight's shape, True =
            active. Weights outside of their mask must be +0; active ones may be zero. Tensors without a mask are
            stored whole.
        encoding: "dense", "bitmask", "condensed", "csr" or "packed_nm", for all weights that have a mask or by name.
            The default takes the one with the fewest bytes, weight by weight.
        method: a text; by default the sparsifier's method.
        recipe, metadata: anything that JSON can hold.
        max_shard_bytes: a file holds no more, unless a single tensor does. One is written while the next is encoded, so
            twice as much is held in memory.

    Raises:
        SparsityError: a mask that fits no weight or hides numbers, an encoding that cannot hold a mask, a tensor or a
            recipe that cannot be stored. An older checkpoint stays as it was.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save({"w": torch.tensor([[0.0, 2.0, 0.0]])}, folder, masks={"w": torch.tensor([[False, True, True]])})
    >>> from sparselearn.checkpoint import load_masks, load_state_dict
    >>> load_state_dict(folder)["w"], load_masks(folder)["w"]
    (tensor([[0., 2., 0.]]), tensor([[False,  True,  True]]))
    """
    files.library()
    if isinstance(model, Sparsifier):
        if masks is not None:
            raise SparsityError("`masks` must be left out where a sparsifier is saved: it brings its own.")
        masks, model = model, model.model
    state = {name: tensor for name, (_, tensor) in named_tensors(model).items()}
    tied = tied_names(state)
    by_name = masks.masks if isinstance(masks, Sparsifier) else masks or {}
    items = _items(state, tied, _by_first_name("masks", by_name, tied), _kinds(encoding, tied, by_name), masks)
    if distributed.active() and torch.distributed.get_rank() != 0:
        deque(items, maxlen=0)  # takes part in gathering shards
        return
    manifest = _empty_manifest(masks, method, recipe, metadata)
    to_json(manifest)  # tells what JSON cannot hold before anything is written
    with files.scratch(Path(path)) as temporary:
        with ThreadPoolExecutor(1) as pool:
            writer = _Writer(temporary, max_shard_bytes, pool)
            for info, tensors in in_order(_encode, items):
                writer.add(info, tensors)
            writer.flush()
        shards = tuple(shard.result() for shard in writer.shards)
        files.commit(temporary, replace(manifest, weights=tuple(writer.infos), shards=shards))


def _empty_manifest(
    masks: Sparsifier | Mapping[str, Tensor] | None, method: str | None, recipe: Any, metadata: Any
) -> Manifest:
    """What is known before any weight is stored."""
    import sparselearn  # here, since the package imports its parts

    arguments: dict[str, Any] = {}
    if isinstance(masks, Sparsifier):
        arguments = {"sparsity": masks.sparsity, "seed": masks.state.seed, "step": masks.step}
        method = method or re.sub(r" at 0x[0-9a-f]+", "", repr(masks.method))
    source = {"sparselearn": sparselearn.__version__, "torch": torch.__version__}
    return Manifest((), (), source, method, arguments, recipe, metadata)


def _by_first_name(what: str, values: Mapping[str, T], tied: Mapping[str, tuple[str, ...]]) -> dict[str, T]:
    """The values by the first name of the tensor that they are for."""
    owner = {name: first for first, others in tied.items() for name in (first, *others)}
    found: dict[str, T] = {}
    for name, value in values.items():
        first = owner.get(name) or owner.get(clean_name(name))
        if first is None:
            raise SparsityError(f"`{what}` names `{name}`, which the model has not. Closest: {closest(name, owner)}.")
        if first in found:
            raise SparsityError(f"`{what}` names the tied weight `{first}` twice, also as `{name}`. Name it once.")
        found[first] = value
    return found


def _kinds(
    encoding: str | Mapping[str, str] | None, tied: Mapping[str, tuple[str, ...]], masks: Mapping[str, Tensor]
) -> dict[str, str]:
    """The chosen encodings by name."""
    named = _by_first_name("encoding", encoding if isinstance(encoding, Mapping) else {}, tied)
    if isinstance(encoding, str):
        named = dict.fromkeys(_by_first_name("masks", masks, tied), encoding)
    for kind in named.values():
        if kind not in KINDS:
            raise SparsityError(f"`encoding` must be one of {', '.join(KINDS)}; got {kind!r}.")
    if unmasked := named.keys() - _by_first_name("masks", masks, tied).keys():
        raise SparsityError(f"`encoding` names `{min(unmasked)}`, which has no mask and is stored whole.")
    return named


_Item = tuple[WeightInfo, Tensor, Tensor | None, str | None]


def _items(
    state: Mapping[str, Tensor],
    tied: Mapping[str, tuple[str, ...]],
    masks: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    source: Sparsifier | Mapping[str, Tensor] | None,
) -> Iterator[_Item]:
    """What `_encode` needs for each weight; whole and on the CPU."""
    declared = str(source.method.structure) if isinstance(source, Sparsifier) else ""
    storages: set[int] = set()
    for name, aliases in tied.items():
        whole = distributed.full(state[name]).detach()
        tensor = whole.cpu().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()  # safetensors wants no shared memory
        storages.add(tensor.untyped_storage().data_ptr())
        mask = masks.get(name)
        if mask is not None:
            mask = distributed.full(mask).detach().cpu().contiguous()
            if mask.dtype != torch.bool or mask.shape != tensor.shape:
                raise SparsityError(
                    f"The mask of `{name}` must be bool of shape {list(tensor.shape)}, True = active; it is "
                    f"{mask.dtype} of shape {list(mask.shape)}."
                )
        shape = tuple(tensor.shape)
        info = WeightInfo(
            name, aliases, tensor.dtype, shape, 0, mask is not None, tensor.numel(), declared, Dense(), "", None
        )
        yield info, tensor, mask, kinds.get(name)


def _encode(item: _Item) -> tuple[WeightInfo, dict[str, Tensor]]:
    """The entry of one weight (but for its shard), and the tensors that hold it."""
    info, tensor, mask, kind = item
    numbers = files.bits_of(tensor)
    if mask is None:
        return replace(info, structure="dense", values_hash=hash_of(numbers)), {info.name: tensor}
    flat = mask.numpy().reshape(-1)
    nnz = int(np.count_nonzero(flat))
    kept = numbers if nnz == info.size else bits.gather(numbers, flat, nnz)
    if hidden := int(np.count_nonzero(numbers)) - int(np.count_nonzero(kept)):
        raise SparsityError(
            f"`{info.name}` has {hidden} weights outside of its mask that are not +0 and would be lost. Zero them "
            "first with `sparsifier.apply_masks()` or `weight.data.masked_fill_(~mask, 0)`."
        )
    try:
        layout = encodings.choose(flat, info.shape, nnz, info.dtype.itemsize, kind)
    except SparsityError as error:
        raise SparsityError(f"`{info.name}` cannot be stored as asked: {error}. Choose another `encoding`.") from None
    info = replace(
        info,
        nnz=nnz,
        structure="dense" if nnz == info.size else info.structure or layout.structure,
        layout=layout,
        values_hash=hash_of(kept),
        mask_hash=hash_of(bits.pack(flat)),
    )
    values = tensor if layout == Dense() else torch.from_numpy(kept).view(info.dtype)
    parts = {info.key(part): torch.from_numpy(array) for part, array in layout.encode(flat, info.shape).items()}
    return info, {info.values_key: values.view(layout.values_shape(info.shape, nnz))} | parts


class _Writer:
    """Collects weights into shards, which are written one after another beside the work of the caller."""

    def __init__(self, temporary: Path, limit: int, pool: ThreadPoolExecutor) -> None:
        self._temporary, self._limit, self._pool = temporary, limit, pool
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self.infos: list[WeightInfo] = []
        self.shards: list[Future[Shard]] = []

    def add(self, info: WeightInfo, tensors: dict[str, Tensor]) -> None:
        if self._bytes + info.stored_bytes > self._limit:
            self.flush()
        self._bytes += info.stored_bytes
        self.infos.append(replace(info, shard=len(self.shards)))
        if repeated := self._tensors.keys() & tensors.keys():
            raise SparsityError(f"Two tensors would be stored as `{min(repeated)}`. Rename one of their weights.")
        self._tensors |= tensors

    def flush(self) -> None:
        """Begin to write what is collected, once the last shard is written."""
        if self._tensors:
            if self.shards:
                self.shards[-1].result()
            number = len(self.shards)
            weights = [info for info in self.infos if info.shard == number]
            self.shards.append(self._pool.submit(files.write_shard, self._temporary, number, weights, self._tensors))
        self._tensors, self._bytes = {}, 0
