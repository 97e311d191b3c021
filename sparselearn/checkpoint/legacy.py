"""The `sparse-bitmask` and `sparse-24-bitmask` layouts of compressed-tensors up to 0.14.0.1, read and written.

Later releases of compressed-tensors and vLLM dropped them, so that files in them need another reader. A module `m`
with the weight `m.weight` of shape [..., C] (R rows in all) is stored as

    m.shape        int64 [ndim], or [ndim, 1] in sparse-24-bitmask
    m.bitmask      uint8 [..., ceil(C / 8)]: one bit a weight along the last dimension, the lowest bit first
    m.compressed   the kept values in row-major order: [nnz]; [R, C / 2] in sparse-24-bitmask
    m.row_offsets  int64 [R]: kept values before each row; not in sparse-24-bitmask, unread by the old decoder

in a folder whose config.json has `quantization_config.sparsity_config`. Dense tensors keep their name.

Differs: the old encoder stores `weight != 0`; here the mask says what is kept, so that kept zeros and -0.0 survive.
For sparse-24-bitmask it stored the two largest of every four and dropped the rest without a word; here an input that
is not 2:4 is refused. Its row_offsets of weights with more than two dimensions were wrong; ours count every row.

Source: compressed-tensors 0.14.0.1, compressors/sparse_compressors/sparse_bitmask.py and sparse_24_bitmask.py.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparselearn.checkpoint.plain import (
    copy_model_files,
    model_config,
    read_json,
    read_tensors,
    replacing,
    write_safetensors,
)
from sparselearn.errors import SparsityError, closest

LegacyFormat = Literal["sparse-bitmask", "sparse-24-bitmask"]
LEGACY_FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
PARTS = ("shape", "bitmask", "compressed", "row_offsets")
WRITER_VERSION = "0.14.0.1"  # the release whose layout this is


def write_legacy(
    state_dict: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    path: str | Path,
    format: LegacyFormat = "sparse-bitmask",
    *,
    base: str | Path | None = None,
) -> None:
    """Write a folder with `model.safetensors` and `config.json` in a legacy layout, atomically.

    Args:
        state_dict: all tensors of the model; they keep dtype and bits, but -0.0 outside a mask becomes 0.0.
        masks: bool [like the weight], True = kept, by the name of the weight, which must end in ".weight". Weights
            without a mask are stored dense.
        path: the new folder.
        format: "sparse-bitmask" for any mask; "sparse-24-bitmask" for 2-D weights with exactly two kept of every four
            along the rows.
        base: the folder of the Hugging Face model that was pruned: its config and tokenizer are copied. Without it
            the config holds the compression settings only, and no model loader will know the architecture.

    Raises:
        SparsityError: a weight that is nonzero outside its mask, a mask that is not 2:4, a name or shape that the
            layout cannot hold.
    """
    if format not in LEGACY_FORMATS:
        raise SparsityError(f"`format` must be one of {', '.join(LEGACY_FORMATS)}; got {format!r}.")
    if not masks:
        raise SparsityError("`masks` is empty, and a legacy checkpoint holds at least one sparse weight.")
    if unknown := [name for name in masks if name not in state_dict]:
        raise SparsityError(
            f"`masks` names `{unknown[0]}`, which is not in the state dict. Closest: {closest(unknown[0], state_dict)}."
        )
    parts: dict[str, Tensor] = {}
    dense = {name: tensor for name, tensor in state_dict.items() if name not in masks}
    for name, mask in masks.items():
        module = _module_of(name)
        for part, tensor in _encode(name, state_dict[name].detach().cpu(), mask.cpu(), format).items():
            parts[f"{module}.{part}"] = tensor
    if clash := [name for name in dense if name.rpartition(".")[2] in PARTS]:
        raise SparsityError(
            f"`{clash[0]}` cannot be stored: old readers take names that end in {', '.join(PARTS)} for parts of a "
            "sparse weight. Rename it."
        )
    config = model_config(Path(base)) if base is not None else {}
    config["quantization_config"] = _compression_config(state_dict, masks, format)
    with replacing(Path(path), folder=True) as folder:
        if base is not None:
            copy_model_files(Path(base), folder)
        write_safetensors(dense | parts, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _module_of(name: str) -> str:
    if not name.endswith(".weight"):
        raise SparsityError(
            f"`{name}` cannot be compressed: the legacy layouts hold weights named `<module>.weight` only. Leave it "
            "out of `masks`, which stores it dense."
        )
    return name.removesuffix(".weight")


def _compression_config(
    state_dict: Mapping[str, Tensor], masks: Mapping[str, Tensor], format: LegacyFormat
) -> dict[str, Any]:
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    return {
        "quant_method": "compressed-tensors",
        "version": WRITER_VERSION,
        "sparsity_config": {
            "format": format,
            "targets": [_module_of(name) for name in masks],
            "ignore": [],
            "global_sparsity": pruned / max(1, sum(tensor.numel() for tensor in state_dict.values())),
            "sparsity_structure": "2:4" if format == "sparse-24-bitmask" else "unstructured",
        },
        "transform_config": {},
    }


def _encode(name: str, weight: Tensor, mask: Tensor, format: LegacyFormat) -> dict[str, Tensor]:
    if mask.dtype != torch.bool or mask.shape != weight.shape or weight.ndim == 0:
        raise SparsityError(
            f"The mask of `{name}` must be bool and of the weight's shape {list(weight.shape)}, with at least one "
            f"dimension; it is {mask.dtype} of shape {list(mask.shape)}."
        )
    if lost := int((weight[~mask].to(torch.float64) != 0).sum()):
        raise SparsityError(
            f"`{name}` has {lost} nonzero weights outside its mask; they would be lost. Save the masked weights, as "
            "`sparsifier.apply_masks()` leaves them."
        )
    values = _bytes(weight.contiguous())[mask].view(weight.dtype).view(-1)
    shape = torch.tensor(weight.shape)
    bitmask = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    if format == "sparse-24-bitmask":
        _require_24(f"`{name}`", mask)
        rows, columns = mask.shape
        values = values.view(rows, columns // 2)
        return {"shape": shape.view(-1, 1), "bitmask": bitmask, "compressed": values}
    return {"shape": shape, "bitmask": bitmask, "compressed": values, "row_offsets": _row_offsets(mask)}


def _bytes(tensor: Tensor) -> Tensor:
    """uint8 [..., itemsize]: selecting from it keeps every bit of every dtype."""
    return tensor.view(*tensor.shape, 1).view(torch.uint8)


def _row_offsets(mask: Tensor) -> Tensor:
    """int64 [rows]: kept values before each row."""
    counts = mask.reshape(math.prod(mask.shape[:-1]), mask.shape[-1]).sum(1)
    return counts.cumsum(0) - counts


def _require_24(what: str, mask: Tensor) -> None:
    if mask.ndim != 2 or mask.shape[1] % 4:
        raise SparsityError(
            f"{what} must be 2-D with a fan-in that is a multiple of 4 in sparse-24-bitmask; its shape is "
            f"{list(mask.shape)}. Use sparse-bitmask."
        )
    kept = mask.view(-1, 4).sum(1)
    if (wrong := (kept != 2).nonzero().view(-1)).numel():
        row, group = divmod(int(wrong[0]), mask.shape[1] // 4)
        raise SparsityError(
            f"{what} must keep exactly 2 of every 4 weights in sparse-24-bitmask; {wrong.numel():,} of "
            f"{kept.numel():,} groups do not: row {row}, columns {4 * group} to {4 * group + 3} keep "
            f"{int(kept[wrong[0]])}. Use sparse-bitmask, or masks of `NM(2, 4)`."
        )


def read_legacy(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read a legacy checkpoint: a folder as `save_pretrained` left it (one file or shards), or one safetensors file.

    Returns:
        All tensors of the model with the sparse weights dense again (zeros outside the mask), and the masks (bool)
        of the sparse weights, both by name, on the CPU.

    Raises:
        SparsityError: not such a checkpoint, marlin-24 (its weights are quantized and have no decoder), or parts that
            are missing or contradict each other. Decoded sizes are checked against the file before memory is taken.
    """
    path = Path(path)
    tensors, declared = read_tensors(path), _declared_format(path)
    if declared == "marlin-24" or any(name.endswith(".scale_packed") for name in tensors):
        raise SparsityError(
            f"`{path}` is in the marlin-24 layout: quantized weights packed for one GPU kernel, for which there is no "
            "decoder. Export the model again from its unquantized checkpoint."
        )
    modules = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
    if not modules or declared not in (None, *LEGACY_FORMATS):
        raise SparsityError(
            f"`{path}` must hold sparse-bitmask or sparse-24-bitmask weights; it has {len(modules)} tensors named "
            f"`*.bitmask`, and its config names the format {declared!r}."
        )
    state, masks = {}, {}
    for module in modules:
        parts = {part: tensors.pop(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in tensors}
        name = f"{module}.weight"
        if name in tensors:
            raise SparsityError(f"`{path}` holds `{name}` twice: dense, and as `{module}.bitmask`.")
        state[name], masks[name] = _decode(name, parts, declared)
    if stray := [name for name in tensors if name.rpartition(".")[2] in ("compressed", "row_offsets")]:
        raise SparsityError(f"`{path}` holds `{stray[0]}` without the `bitmask` that it needs.")
    return tensors | state, masks


def _decode(name: str, parts: dict[str, Tensor], declared: str | None) -> tuple[Tensor, Tensor]:
    is_24 = "row_offsets" not in parts
    required = PARTS[:3] if is_24 else PARTS
    if missing := [part for part in required if part not in parts]:
        raise SparsityError(f"`{name}` needs the parts {', '.join(required)}; `{missing[0]}` is missing.")
    if declared is not None and is_24 != (declared == "sparse-24-bitmask"):
        raise SparsityError(
            f"`{name}` is stored {'without' if is_24 else 'with'} row_offsets, but the config names the format "
            f"{declared!r}: one of the two is wrong."
        )
    shape, bitmask, compressed = (parts[part] for part in PARTS[:3])
    mask = _unpack(name, shape, bitmask)
    kept = int(mask.sum())
    rows = math.prod(mask.shape[:-1])
    if is_24:
        _require_24(f"`{name}`", mask)
    expected = [rows, mask.shape[-1] // 2] if is_24 else [kept]
    if list(compressed.shape) != expected:
        raise SparsityError(
            f"`compressed` of `{name}` must have shape {expected}, since {kept} bits are set in its bitmask; it has "
            f"shape {list(compressed.shape)}."
        )
    if not is_24:
        _check_row_offsets(name, mask, parts["row_offsets"])
    weight = torch.zeros(mask.shape, dtype=compressed.dtype)
    _bytes(weight)[mask] = _bytes(compressed.reshape(-1))
    return weight, mask


def _unpack(name: str, shape: Tensor, bitmask: Tensor) -> Tensor:
    """The bool mask, after checks that its size is that of the stored bits."""
    dims = shape.reshape(-1).tolist() if shape.dtype == torch.int64 else []
    packed = [*dims[:-1], -(-dims[-1] // 8)] if dims else None
    if min(dims, default=-1) < 0 or bitmask.dtype != torch.uint8 or list(bitmask.shape) != packed:
        raise SparsityError(
            f"`bitmask` of `{name}` must be uint8 of shape {packed}, one bit a weight of its int64 shape {dims}; it "
            f"is {bitmask.dtype} of shape {list(bitmask.shape)}."
        )
    bits = np.unpackbits(bitmask.numpy(), axis=-1, bitorder="little")
    if bits[..., dims[-1] :].any():
        raise SparsityError(f"`bitmask` of `{name}` must have zeros after its {dims[-1]} columns; it has ones there.")
    return torch.from_numpy(bits[..., : dims[-1]].astype(bool))


def _check_row_offsets(name: str, mask: Tensor, offsets: Tensor) -> None:
    expected = _row_offsets(mask)
    known_wrong = mask.ndim > 2  # as the old encoder wrote them
    if offsets.dtype != torch.int64 or offsets.numel() != expected.numel():
        raise SparsityError(
            f"`row_offsets` of `{name}` must be {expected.numel()} int64 numbers, one a row; they are "
            f"{offsets.numel()} of {offsets.dtype}."
        )
    if not known_wrong and not torch.equal(offsets.reshape(-1), expected):
        row = int((offsets.reshape(-1) != expected).nonzero()[0])
        raise SparsityError(
            f"`row_offsets` of `{name}` must count the bits of the bitmask: {int(expected[row])} before row {row}; "
            f"it says {int(offsets.reshape(-1)[row])}."
        )


def _declared_format(path: Path) -> str | None:
    """The format that the folder's config names; None for a lone file or where it names none."""
    config = path / "config.json"
    if not config.is_file():
        return None
    content = read_json(config)
    settings: Any = content.get("quantization_config", content.get("compression_config", {}))
    if not isinstance(settings, dict):
        return None
    if settings.get("format") == "marlin-24":
        return "marlin-24"
    sparsity = settings.get("sparsity_config")
    return sparsity.get("format") if isinstance(sparsity, dict) else None
