"""Linear layers with n of every m weights: values [N, I·n/m] and places (uint8), as `reference` defines.

`pack`, `pack_transposable` prune and pack 2:4; `unpack` and `gemv` are differentiable; `cslt` multiplies many tokens.
"""

from sparselearn.kernels.semi_structured import reference
from sparselearn.kernels.semi_structured.ops import (
    MAX_DECODE_TOKENS,
    MAX_GEMV_TOKENS,
    gemv,
    pack,
    pack_transposable,
    unpack,
)

__all__ = ["MAX_DECODE_TOKENS", "MAX_GEMV_TOKENS", "gemv", "pack", "pack_transposable", "reference", "unpack"]
