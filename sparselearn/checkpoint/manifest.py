"""The manifest of a sparse checkpoint, `sparselearn.json`: what is stored and where. `sparselearn.checkpoint` has the
format."""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from sparselearn.checkpoint.encodings import EXPANSION, KINDS, Encoding, Parts
from sparselearn.errors import SparsityError

VERSION = 1
FILE = "sparselearn.json"
LARGEST = 1 << 28  # bytes of a manifest; about half a million tensors
SHARD_NAME = re.compile(r"weights-[0-9]{5}-[0-9a-f]{16}\.safetensors")
HASH = re.compile(r"[0-9a-f]{64}")

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex64, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    )
}  # fmt: skip


def hash_of(data: Any) -> str:
    """Of bytes or of a contiguous array."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class WeightInfo:
    """One stored tensor."""

    name: str
    aliases: tuple[str, ...]  # further names, of tied weights
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int  # position in `Manifest.shards`
    masked: bool  # whether it was saved with a mask
    nnz: int  # kept weights, those that are zero included; all, without a mask
    structure: str  # of the mask, as `NM(2, 4)`; "dense" where it is full or there is none
    layout: Encoding
    values_hash: str
    mask_hash: str | None

    @property
    def encoding(self) -> str:
        """ "dense", "bitmask", "condensed", "csr" or "packed_nm"."""
        return self.layout.name

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Of values and mask, without headers."""
        return self.layout.stored_bytes(self.shape, self.nnz, self.dtype.itemsize)

    @property
    def values_key(self) -> str:
        """The name of the values in the shard."""
        return self.name if self.encoding == "dense" else f"{self.name}#values"

    def key(self, part: str) -> str:
        """The name of a component of the mask in the shard."""
        return f"{self.name}#{part}"

    @property
    def tensors(self) -> Parts:
        """The shard's tensors for this weight: their (unsigned) dtype and shape."""
        bits = np.dtype(f"u{self.dtype.itemsize}")
        mask = self.layout.parts(self.shape, self.nnz) if self.masked else {}
        values = (bits, self.layout.values_shape(self.shape, self.nnz))
        return {self.values_key: values} | {self.key(part): spec for part, spec in mask.items()}


@dataclass(frozen=True)
class Shard:
    """One safetensors file, in the folder of the manifest."""

    file: str
    bytes: int
    header: str


@dataclass(frozen=True)
class Manifest:
    """What a sparse checkpoint holds."""

    weights: tuple[WeightInfo, ...]  # in the order of the model's state dict
    shards: tuple[Shard, ...]
    source: dict[str, str]  # versions that wrote it
    method: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    recipe: Any = None
    metadata: Any = None

    @property
    def stored_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def dense_bytes(self) -> int:
        """Of all tensors, tied ones once, without masks."""
        return sum(weight.dense_bytes for weight in self.weights)

    @property
    def sparsity(self) -> float:
        """Fraction of inactive entries over the weights that have a mask; 0 where none has."""
        size = sum(weight.size for weight in self.weights if weight.masked)
        return 1 - sum(weight.nnz for weight in self.weights if weight.masked) / size if size else 0.0


# ---- writing ---------------------------------------------------------------------------------------------------------


def to_json(manifest: Manifest) -> bytes:
    """The file; raises `SparsityError` where what the user gave is no JSON."""
    content = {
        "format": "sparselearn",
        "format_version": VERSION,
        "source": manifest.source,
        "method": manifest.method,
        "arguments": manifest.arguments,
        "recipe": manifest.recipe,
        "metadata": manifest.metadata,
        "shards": [{"file": s.file, "bytes": s.bytes, "header": s.header} for s in manifest.shards],
        "weights": [_entry(weight) for weight in manifest.weights],
    }
    try:
        data = seal(json.dumps(content, indent=1, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise SparsityError(
            f"`recipe` and `metadata` must be made of dicts with string keys, lists, strings, finite numbers, bools "
            f"and None; JSON cannot hold these ({error})."
        ) from None
    from_json(data)  # what could not be read back must not take the place of what can
    return data


def _entry(weight: WeightInfo) -> dict[str, Any]:
    return {
        "name": weight.name,
        "aliases": list(weight.aliases),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "shard": weight.shard,
        "masked": weight.masked,
        "nnz": weight.nnz,
        "structure": weight.structure,
        "encoding": weight.encoding,
        "parameters": weight.layout.parameters,
        "values_hash": weight.values_hash,
        "mask_hash": weight.mask_hash,
    }


def seal(text: str) -> bytes:
    """A JSON object with the digest of itself as its last entry."""
    body = text.rstrip().removesuffix("}").rstrip().encode()
    return body + _digest_line(body)


def _digest_line(body: bytes) -> bytes:
    return f',\n "digest": "{hash_of(body)}"\n}}\n'.encode()


# ---- reading ---------------------------------------------------------------------------------------------------------


def from_json(data: bytes) -> Manifest:
    """Read and check everything that can be checked without the shards; raises `SparsityError`."""
    content = _parsed(data)
    if not isinstance(content, dict) or content.get("format") != "sparselearn":
        raise SparsityError('it must be a JSON object with "format": "sparselearn"')
    if (version := content.get("format_version")) != VERSION or type(version) is not int:
        raise SparsityError(f"it is of format version {version!r}; this library reads version {VERSION}. Update it")
    body = data[: -len(_digest_line(b""))]
    if data[len(body) :] != _digest_line(body):
        raise SparsityError("its digest does not match: it was changed after it was written")
    shards = tuple(_shard(_of("a shard", dict, item)) for item in _get(content, "shards", list))
    weights = tuple(_weight(_of("a weight", dict, item), len(shards)) for item in _get(content, "weights", list))
    _refuse_repeats("file", [shard.file for shard in shards])
    _refuse_repeats("weight", [name for weight in weights for name in (weight.name, *weight.aliases)])
    _refuse_repeats("tensor", [key for weight in weights for key in weight.tensors])
    return Manifest(
        weights,
        shards,
        source=_get(content, "source", dict),
        method=_get(content, "method", str, type(None)),
        arguments=_get(content, "arguments", dict),
        recipe=content.get("recipe"),
        metadata=content.get("metadata"),
    )


def _parsed(data: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_repeats("key", [key for key, _ in pairs])
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise SparsityError(f"it holds {constant}, which is not JSON")

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except SparsityError:
        raise
    except (ValueError, RecursionError) as error:
        raise SparsityError(f"it is no JSON ({error})") from None


def _refuse_repeats(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SparsityError(f"it names the {what} `{name}` twice")
        seen.add(name)


def _of(what: str, *args: Any) -> Any:
    """The value, which is the last argument, where it is of one of the types before it (a bool is no int here)."""
    *types, value = args
    if type(value) not in types:
        wanted = " or ".join(t.__name__ for t in types)
        raise SparsityError(f"{what} must be a {wanted}; it is a {type(value).__name__}")
    return value


def _get(content: dict[str, Any], key: str, *types: type) -> Any:
    return _of(f'"{key}"', *types, content.get(key))


def _count(content: dict[str, Any], key: str, limit: int) -> int:
    value: int = _get(content, key, int)
    if not 0 <= value < limit:
        raise SparsityError(f'"{key}" must be from 0 to below {limit}; it is {value}')
    return value


def _shard(content: dict[str, Any]) -> Shard:
    file = _get(content, "file", str)
    if not SHARD_NAME.fullmatch(file):
        raise SparsityError(f"the file of a shard must be named like {SHARD_NAME.pattern}; it is {file!r}")
    return Shard(file, _count(content, "bytes", 1 << 62), _hash(content, "header"))


def _hash(content: dict[str, Any], key: str) -> str:
    value: str = _get(content, key, str)
    if not HASH.fullmatch(value):
        raise SparsityError(f'"{key}" must be 64 hexadecimal digits; it is {value!r}')
    return value


def _weight(content: dict[str, Any], shards: int) -> WeightInfo:
    name = _get(content, "name", str)
    try:
        return _checked_weight(name, content, shards)
    except SparsityError as error:
        raise SparsityError(f"the entry of `{name}` is wrong: {error}") from None


def _checked_weight(name: str, content: dict[str, Any], shards: int) -> WeightInfo:
    dtype = _get(content, "dtype", str)
    if dtype not in DTYPES:
        raise SparsityError(f'"dtype" is {dtype!r}, which is none of {", ".join(DTYPES)}')
    shape = tuple(_get(content, "shape", list))
    if any(type(size) is not int or size < 0 for size in shape) or len(shape) > 64:
        raise SparsityError(f'"shape" must hold at most 64 sizes, whole and not negative; it is {list(shape)}')
    if math.prod(size or 1 for size in shape) >= 1 << 56:
        raise SparsityError(f'"shape" is {list(shape)}, which is too large for any machine')
    size = math.prod(shape)
    weight = WeightInfo(
        name=name,
        aliases=tuple(_of("an alias", str, alias) for alias in _get(content, "aliases", list)),
        dtype=DTYPES[dtype],
        shape=shape,
        shard=_count(content, "shard", shards),
        masked=_get(content, "masked", bool),
        nnz=_count(content, "nnz", size + 1),
        structure=_get(content, "structure", str),
        layout=_layout(_get(content, "encoding", str), _get(content, "parameters", dict)),
        values_hash=_hash(content, "values_hash"),
        mask_hash=_hash(content, "mask_hash") if content.get("masked") else _get(content, "mask_hash", type(None)),
    )
    if not weight.masked and (weight.encoding != "dense" or weight.nnz != size):
        raise SparsityError(f'without a mask it must be "dense" with "nnz" {size}; it is not')
    if problem := weight.layout.problem(shape, weight.nnz):
        raise SparsityError(problem)
    if size > EXPANSION * weight.stored_bytes:
        raise SparsityError(f"{size} entries from {weight.stored_bytes} bytes are more than {EXPANSION} for each")
    return weight


def _layout(kind: str, parameters: dict[str, Any]) -> Encoding:
    if kind not in KINDS:
        raise SparsityError(f'"encoding" is {kind!r}, which is none of {", ".join(KINDS)}')
    names = [parameter.name for parameter in fields(KINDS[kind])]
    if parameters.keys() != set(names):
        raise SparsityError(f'"parameters" of {kind} must be {names}; they are {list(parameters)}')
    return KINDS[kind](**{key: _of(f'"{key}"', int, value) for key, value in parameters.items()})
