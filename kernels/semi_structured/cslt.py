"""2:4 products for many tokens through cuSPARSELt, as torch binds it (bfloat16 and float16).

cuSPARSELt holds a weight as one tensor ("blob"): the values in row-major order, then metadata whose order it does not
document and changes between GPUs. torch's own packing in training (`_sparse_semi_structured_tile`) guesses that order,
wrongly on Hopper: the products are wrong and nothing says so. Here the metadata always comes from the library itself,
once for each mask (`metadata`), and new values are put in front of it (`blob`); the order of the values is checked
against ours, and a product against the dense one (`trusted`), before anything is computed so.
"""

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearn.errors import SparsityError
from sparselearn.kernels import crossover
from sparselearn.kernels.semi_structured import reference
from sparselearn.kernels.semi_structured.search import DEFAULT, Algorithm, Product, known

FLOATS = (torch.bfloat16, torch.float16)
MULTIPLE = 32  # of neurons and of inputs
TOKENS = 16  # the library's shapes; others are padded


def fits(neurons: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether the library takes such a weight."""
    return dtype in FLOATS and neurons % MULTIPLE == 0 and inputs % MULTIPLE == 0


def metadata(values: Tensor, places: Tensor) -> Tensor:
    """What the library writes after the values of a weight with these places; one dimension, of the values' dtype.

    The numbers in `values` are not read. (Those that are zero would let the library choose other places.)

    Raises:
        SparsityError: the library does not keep the values in row-major order.
    """
    rows = torch.arange(len(values), device=values.device)[:, None]
    columns = torch.arange(values.shape[1], device=values.device)
    probe = ((rows * 13 + columns * 7) % 251 + 1).to(values.dtype)  # exact in bfloat16, and neighbours differ
    packed = torch._cslt_compress(reference.unpack(probe, places)).flatten()
    if not torch.equal(packed[: probe.numel()], probe.flatten()):
        raise SparsityError(
            "cuSPARSELt of this torch does not keep the values of a 2:4 weight in row-major order. Compute densely, "
            "and report it with the versions of torch and cuSPARSELt."
        )
    return packed[probe.numel() :].clone()


def blob(values: Tensor, metadata: Tensor) -> Tensor:
    """The library's form of a weight, of one copy of its values."""
    return torch.cat([values.flatten(), metadata]).view(len(values), -1)


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None, algorithm: Algorithm | None = None) -> Tensor:
    """x [T, I] · Wᵀ + bias -> [T, N], by the algorithm found best for so many tokens (see `search`)."""
    tokens = len(x)
    x = F.pad(x, (0, 0, 0, -tokens % TOKENS)).contiguous()
    case = Product(len(packed), x.shape[1], str(x.dtype).removeprefix("torch."), len(x))
    found = algorithm or known(case)
    try:
        y = _multiply(x, packed, bias, found)
    except RuntimeError:  # found for another number of tokens of this bucket
        if found == DEFAULT:
            raise
        crossover.table().blocks[case.key] = DEFAULT
        y = _multiply(x, packed, bias, DEFAULT)
    return y[:tokens]


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
    number, split, mode = algorithm
    return torch._cslt_sparse_mm(
        packed, x.T, bias=bias, transpose_result=True, alg_id=number, split_k=split, split_k_mode=mode
    )


@cache
def trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library multiplies on this GPU as it should; looked at once, with a notice where it does not."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if not torch.backends.cusparselt.is_available():
        return False
    try:
        problem = self_test(device, dtype)
    except (RuntimeError, SparsityError) as error:
        problem = str(error)
    if problem:
        warnings.warn(f"2:4 layers are computed densely for many tokens: {problem}", stacklevel=2)
    return not problem


def self_test(device: torch.device, dtype: torch.dtype) -> str:
    """Compares a product with the dense one, of a weight that has zeros and equals among its values; "" if it is right.

    Wrong metadata gives errors of the order of the result, rounding gives a hundredth of the limit in float16.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=generator)
    mask = reference.magnitude_mask(torch.randn(128, 256, generator=generator)).to(device)
    weight[::3, ::5] = 0
    values, places = reference.pack(weight.to(device, dtype), mask)
    x, bias = (torch.randn(size, generator=generator).to(device, dtype) for size in ((48, 256), (128,)))
    y = product(x, blob(values, metadata(values, places)), bias, DEFAULT).float()
    expected = reference.linear(x.float(), values.float(), places, bias.float())
    error = float((y - expected).abs().max() / expected.abs().max())
    return "" if error <= 0.02 else f"a product by cuSPARSELt is off by {error:.0%} on {device} ({dtype})."
