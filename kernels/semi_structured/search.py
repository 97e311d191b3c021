"""The fastest algorithms of cuSPARSELt, looked for in a process of their own.

The library's search runs all of its kernels. On an H100 one of them stopped with "an illegal instruction" (float16,
1024 x 512, at most 4096 tokens; bfloat16 passed), and after that a process can do nothing more on its GPU. So another
process searches, and checks what it found against the dense product; where it dies, the default algorithm is taken.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sparselearn.kernels import crossover

Algorithm = tuple[int, int, int]  # alg_id, split_k, split_k_mode
DEFAULT: Algorithm = (0, 1, -1)
LIMIT = 0.02  # of the error of a product over its largest number; rounding gives a tenth of it


class Product(NamedTuple):
    """tokens [T, inputs] by a 2:4 weight [neurons, inputs]."""

    neurons: int
    inputs: int
    dtype: str  # as "bfloat16"
    tokens: int

    @property
    def key(self) -> tuple[object, ...]:
        """Where the table of `crossover` holds the algorithm; the same for all tokens of a bucket."""
        return "sp24_gemm", *self[:3], crossover.bucket(self.tokens)


def known(product: Product) -> Algorithm:
    """The algorithm found for a product, the library's default where none was looked for."""
    number, split, mode = crossover.table().blocks.get(product.key, DEFAULT)
    return number, split, mode


def search(products: Iterable[Product]) -> None:
    """Find the algorithms that are not known yet (some seconds, and a fraction of one for each) and keep them."""
    blocks = crossover.table().blocks
    bucketed = dict.fromkeys(p._replace(tokens=crossover.bucket(p.tokens)) for p in products)
    left = [p for p in bucketed if p.key not in blocks]
    while left:
        found, error = _in_a_process(left)
        blocks.update((product.key, algorithm) for product, algorithm in zip(left, found, strict=False))
        left = left[len(found) :]
        if left:
            blocks[left[0].key] = DEFAULT
            warnings.warn(
                f"cuSPARSELt's search stopped at {left[0]}: its default algorithm is used. {error}", stacklevel=2
            )
            del left[0]


def _in_a_process(products: list[Product]) -> tuple[list[Algorithm], str]:
    """What it found before it ended, and the last line of its errors."""
    command = [sys.executable, "-m", "sparselearn.kernels.semi_structured.search", json.dumps(products)]
    run = subprocess.run(command, capture_output=True, text=True)
    found = [tuple(json.loads(line)) for line in run.stdout.splitlines() if line.startswith("[")]
    return found, (run.stderr.strip().splitlines() or [""])[-1]


def found_here(products: Iterable[Product], device: str = "cuda") -> Iterator[Algorithm]:
    """One algorithm after another, found in this process.

    Raises:
        RuntimeError: the library failed; the GPU may be lost to this process.
    """
    from sparselearn.kernels.semi_structured import reference

    binding: Any = getattr(torch._C, "_cusparselt")  # noqa: B009  # not in torch's stubs
    for neurons, inputs, name, tokens in products:
        weight = torch.randn(neurons, inputs, device=device, dtype=getattr(torch, name)) * inputs**-0.5
        weight.masked_fill_(~reference.magnitude_mask(weight), 0)
        packed = torch._cslt_compress(weight)
        x = torch.randn(max(tokens, 16), inputs, device=device, dtype=weight.dtype)
        number, split, mode, *_ = binding.mm_search(packed, x.T, None, None, None, True)
        y = torch._cslt_sparse_mm(
            packed, x.T, transpose_result=True, alg_id=number, split_k=split, split_k_mode=mode
        )  # fmt: skip
        expected = F.linear(x, weight).float()
        right = float((y.float() - expected).abs().max() / expected.abs().max()) <= LIMIT
        yield (int(number), int(split), int(mode)) if right else DEFAULT


if __name__ == "__main__":
    for algorithm in found_here(Product(*given) for given in json.loads(sys.argv[1])):
        print(json.dumps(algorithm), flush=True)
