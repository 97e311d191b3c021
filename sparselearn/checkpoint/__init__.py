"""Sparse checkpoints: smaller, verified, loadable everywhere.

    save(sparsifier, "runs/a/sparse")
    model.load_state_dict(load_state_dict("runs/a/sparse"))  # ordinary dense tensors

Format, version 1
-----------------
A folder with safetensors files (shards) and a manifest, `sparselearn.json`, in UTF-8:

    {"format": "sparselearn", "format_version": 1,
     "source": {"sparselearn": ..., "torch": ...}, "method": ..., "arguments": ..., "recipe": ..., "metadata": ...,
     "shards": [{"file": "weights-00000-0123456789abcdef.safetensors", "bytes": ..., "header": hash}, ...],
     "weights": [{"name": ..., "aliases": [...], "dtype": "bfloat16", "shape": [...], "shard": 0, "masked": true,
                  "nnz": ..., "structure": "NM(2, 4)",
                  "encoding": "packed_nm", "parameters": {"n": 2, "m": 4, "dim": 1},
                  "values_hash": hash, "mask_hash": hash}, ...],
     "digest": hash
    }

- Hashes are SHA-256, in lower-case hexadecimal. `digest` is of all bytes of the manifest before its own
  line, `,\\n "digest": "..."\\n}\\n`, which is last; `header` of the shard's bytes before its tensors (8 of length, and
  the JSON); `values_hash` of the kept values (all, without a mask), row-major, little-endian; `mask_hash` of the mask
  as bits (below), null without a mask. Neither depends on the encoding.
- `weights` are in the model's order. `aliases` are further names of a tied tensor. `shard` counts from 0. Without
  `masked` the encoding is "dense" and nnz the size. A shard holds the tensors that its weights call for and no other.
  Readers ignore keys that they do not know, and refuse versions that they do not know and keys that occur twice.
- Bits: True = kept; bit b is bit b % 8 (from the lowest) of byte b // 8; bits that fill up the last byte are 0.
- A weight is a matrix [R, C] of its first dimension by all others, or [1, size] below two dimensions. In every
  encoding the kept values are in row-major order of the weight. Entries outside of the mask are +0.
- Indices have the smallest unsigned type (uint8, 16, 32, 64) that holds the largest possible: C - 1; for pointers nnz.

A weight `w` is stored as `w` (dense) or `w#values`, in its dtype, and as components `w#...` of its mask:

    encoding    values              components
    dense       w [shape], all      bits [ceil(size / 8)], unless the mask is full or there is none
    bitmask     [nnz]               bits [ceil(size / 8)]
    condensed   [nnz / fan_in,      rows [ceil(R / 8)]: bits, which rows hold `fan_in` weights (others none);
                 fan_in]            indices [nnz / fan_in, fan_in]: their columns, ascending
    csr         [nnz]               pointers [R + 1]: where each row starts among the values, and nnz;
                                    indices [nnz]: columns, ascending in every row
    packed_nm   [nnz]               patterns [ceil(size / m * b / 8)]: b = ceil(log2(C(m, n))) bits, lowest first, for
                                    each group of m along `dim`; groups in row-major order with `dim` moved to the end.
                                    They number a pattern by its place among all m-bit integers with n ones, ascending,
                                    where bit i says whether weight i of the group is kept. m <= 16

No weight has more than 1024 entries for each byte that it stores. Writers put new shards (named by a hash of their
content) beside the old ones, replace the manifest in one step, and then remove what it no longer names. Nothing is
ever unpickled.
"""

from sparselearn.checkpoint.api import inspect, iterate, load, load_masks, load_state_dict, save, verify
from sparselearn.checkpoint.export import export_dense, export_onnx
from sparselearn.checkpoint.legacy import read_legacy, write_legacy
from sparselearn.checkpoint.manifest import Manifest, WeightInfo

__all__ = [
    "Manifest",
    "WeightInfo",
    "export_dense",
    "export_onnx",
    "inspect",
    "iterate",
    "load",
    "load_masks",
    "load_state_dict",
    "read_legacy",
    "save",
    "verify",
    "write_legacy",
]
