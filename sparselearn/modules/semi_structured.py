"""Linear layers with n of every m inputs, `NM(n, m)`, in packed form.

Legend of shape suffixes: T tokens (rows of the input), I inputs, N neurons, K = I·n/m weights of a neuron.
"""

import warnings
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparselearn.kernels.semi_structured as kernel
from sparselearn.errors import SparsityError
from sparselearn.kernels import crossover
from sparselearn.kernels.semi_structured import cslt, fragments
from sparselearn.modules.base import SparseModule, apply_product, copied, masked_weight

GROUPS = (4, 2, 8, 16, 3, *range(5, 8), *range(9, 16))  # m, those that the GPU serves best first


def pattern_of(mask: Tensor) -> tuple[int, int]:
    """n and m of an n:m mask [N, I]; m = 4 where that holds, else the smallest of 2, 8, 16, others up to 15.

    Raises:
        SparsityError: the mask is of no such pattern.

    >>> pattern_of(torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0]]).bool())
    (2, 4)
    """
    inputs = mask.shape[1]
    for m in GROUPS:
        if inputs % m == 0:
            counts = mask.unflatten(1, (-1, m)).sum(-1)
            n = int(counts.max())
            if 0 < n < m and bool((counts == n).all()):
                return n, m
    raise SparsityError(
        f"A packed layer needs a mask with the same number n of every m inputs, m up to 16; this one (shape "
        f"{list(mask.shape)}) has not. Train with `NM(2, 4)`, or use `CondensedLinear`."
    )


class SemiStructuredLinear(SparseModule):
    """A linear layer that holds n of every m inputs of each neuron; it trains (with fixed connections) and infers so.

    Values, their gradient and optimizer state are [N, K]. Takes x [..., I] in the dtype of `values` and returns
    [..., N]; values, bias and x get gradients. Forward is the dense layer's up to rounding.

    On a GPU (compute capability 8.0) each call is computed in the way that `kernels.crossover` measured to be the
    fastest for its number of tokens, densely where none was; `measure` measures. On a CPU, and where a GPU, dtype or
    shape is not served, it is computed densely, with one notice. Ways:

    - "gemv": up to 8 tokens, every n:m; "decode": 2:4 on sparse tensor cores, up to 64 tokens, for frozen values;
    - "gemm": 2:4 through cuSPARSELt for many tokens, also in training; the gradient of the input is sparse where the
      mask is `TransposableNM(2, 4)`, else dense. The gradient of values is a dense product in every way.

    For inference freeze the layer, `model.requires_grad_(False)`: its weight is then kept in the form of each way in
    use (made at the first call), else it is made at every call. Call a frozen layer once before `torch.compile` and
    CUDA graphs; `refresh` after writing to frozen values in place. Make one with `from_dense`.

    Attributes:
        way: forces a way of computing, where it is possible; "sparse" is the first that is. None takes the fastest.

    >>> layer, mask = nn.Linear(8, 4), torch.tensor([True, False, False, True]).repeat(4, 2)
    >>> layer.weight.data.masked_fill_(~mask, 0).shape
    torch.Size([4, 8])
    >>> SemiStructuredLinear.from_dense(layer, mask)
    SemiStructuredLinear(in_features=8, out_features=4, pattern=2:4, bias=True)
    """

    replaces = nn.Linear

    values: nn.Parameter  # [N, K]
    places: Tensor  # uint8, see `kernels.semi_structured.reference`
    places_t: Tensor | None  # of the transpose, where that is 2:4, too
    bias: nn.Parameter | None  # [N]

    def __init__(
        self, values: nn.Parameter, places: Tensor, bias: nn.Parameter | None = None, n: int = 2, m: int = 4
    ) -> None:
        """From packed values and places as `kernels.semi_structured.pack` makes them.

        Raises:
            SparsityError: they are not a packed n:m weight.
        """
        super().__init__()
        kernel.reference.check_packed(values, places, n, m)
        if bias is not None and bias.shape != values.shape[:1]:
            raise SparsityError(f"The bias must have shape {list(values.shape[:1])}; it has {list(bias.shape)}.")
        self.n, self.m = n, m
        self.out_features, self.in_features = len(values), values.shape[1] // n * m
        self.values = values
        self.bias = bias
        self.register_buffer("places", places)
        self.register_buffer("places_t", None, persistent=False)
        self._forms: dict[tuple[str, torch.dtype], tuple[Tensor, ...]] = {}
        self._prepared: set[tuple[int, torch.dtype, bool, bool]] = set()
        self.refresh()

    @classmethod
    def from_dense(cls, layer: nn.Module, mask: Tensor, n: int | None = None, m: int | None = None) -> Self:
        """From an `nn.Linear` and its mask [N, I]. n and m: by default those that `pattern_of` finds."""
        weight, mask = masked_weight(layer, mask, nn.Linear)
        layer = cast(nn.Linear, layer)
        found = (n, m) if n is not None and m is not None else pattern_of(mask)
        values, places = kernel.reference.pack(weight, mask, *found)
        made = cls(nn.Parameter(values, layer.weight.requires_grad), places, copied(layer.bias), *found)
        return made.train(layer.training)

    def to_dense(self) -> tuple[nn.Linear, Tensor]:
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.scatter(self.values), self.values.requires_grad)
        layer.register_parameter("bias", copied(self.bias))
        return layer.train(self.training), self.mask

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def mask(self) -> Tensor:
        """The mask (bool, [N, I]), made anew at each use."""
        return self.scatter(torch.ones_like(self.values, dtype=torch.bool))

    def scatter(self, numbers: Tensor) -> Tensor:
        """One number per value [N, K] -> a matrix [N, I], zero where the mask is False."""
        return kernel.reference.unpack(numbers.detach(), self.places, self.n, self.m)

    # ---- the product -------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise SparsityError(f"`SemiStructuredLinear` needs [..., {self.in_features}]; it got {list(x.shape)}.")
        y_TN = apply_product(self._product, x.reshape(-1, self.in_features), self.values, self.bias)
        return y_TN.view(*x.shape[:-1], self.out_features)

    def _product(self, x_TI: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        frozen = not self.values.requires_grad
        if not frozen:
            for key in [key for key in self._forms if not key[0].startswith("metadata")]:
                del self._forms[key]  # they are of values that an optimizer changes
                self._prepared.clear()
        trains = any(t is not None and t.requires_grad for t in (x_TI, self.values, self.bias))
        training = torch.is_grad_enabled() and trains
        way = self._way(x_TI, training, frozen)
        self._prepare(x_TI, values, training, frozen)
        if way == "gemv":
            return kernel.gemv(x_TI, values, self.places, bias, self.n, self.m)
        ops = torch.ops.sparselearn
        if way == "decode":
            return ops.sp24_decode(x_TI, *self._form("decode", values), bias)  # type: ignore[no-any-return]
        if way == "gemm" and frozen and not training:
            return ops.sp24_gemm(x_TI, *self._form("gemm", values), bias)  # type: ignore[no-any-return]
        if way == "gemm":
            metadata, *other = self._form("metadata", values)
            transposed = (self.places_t, other[0]) if other else (None, None)
            return ops.sp24_linear(x_TI, values, self.places, metadata, *transposed, bias)  # type: ignore[no-any-return]
        if frozen and (not _recorded() or self._has("dense", values.dtype)):
            return F.linear(x_TI, self._form("dense", values)[0], bias)
        return F.linear(x_TI, kernel.unpack(values, self.places, self.n, self.m), bias)

    def _prepare(self, x_TI: Tensor, values: Tensor, training: bool, frozen: bool) -> None:
        """Make the form that a graph wants which is recorded later: its fastest way may be another than this call's."""
        if _recorded():
            return
        call = (crossover.bucket(x_TI.shape[0]), x_TI.dtype, training, frozen)
        if call in self._prepared:
            return
        with crossover.graphs():
            way = self._way(x_TI, training, frozen)
        if way in ("decode", "gemm"):
            self._form(_form_of(way, training, frozen), values)
        self._prepared.add(call)

    def _has(self, name: str, dtype: torch.dtype) -> bool:
        return not torch.compiler.is_compiling() and (name, dtype) in self._forms

    def _form(self, name: str, values: Tensor) -> tuple[Tensor, ...]:
        """The weight as a way wants it, kept; "metadata" is of the places alone."""
        key = (name, values.dtype)
        if key not in self._forms:
            with torch.no_grad():
                self._forms[key] = self._made(name, values)
        return self._forms[key]

    def _made(self, name: str, values: Tensor) -> tuple[Tensor, ...]:
        if name == "dense":
            return (kernel.unpack(values, self.places, self.n, self.m),)
        if name == "decode":
            return fragments.fragments(values, self.places)
        if name == "gemm":
            return (cslt.blob(values, self._form("metadata", values)[0]),)
        made = (cslt.metadata(values, self.places),)
        if self.places_t is None:
            return made
        other = values.new_empty(self.in_features, self.out_features // 2)
        return (*made, cslt.metadata(other, self.places_t))

    def _way(self, x_TI: Tensor, training: bool, frozen: bool) -> str:
        tokens = crossover.bucket(x_TI.shape[0])
        shape = (self.out_features, self.in_features)
        possible: list[str] = _ways(
            x_TI.device, x_TI.dtype, *shape, f"{self.n}:{self.m}", tokens, training, frozen
        ).split()
        if _recorded():  # forms are not made while a graph is
            possible = [
                way for way in possible
                if way == "gemv" or (_form_of(way, training, frozen), x_TI.dtype) in self._forms
            ]  # fmt: skip
        if not possible or x_TI.shape[0] == 0:
            return "dense"
        wanted = self.way or crossover.choose(*self._case(x_TI.dtype, training, tokens))
        if wanted == "sparse":
            return possible[0]
        return next((way for way in possible if way == wanted), "dense")

    def _case(self, dtype: torch.dtype, training: bool, tokens: int) -> crossover.Case:
        shape, name = (self.out_features, self.in_features), crossover.dtype_name(dtype)
        return crossover.Case(*shape, 1, self.values.shape[1], name, training, tokens, f"{self.n}:{self.m}")

    def measure(self, tokens: int, *, training: bool = False, dtype: torch.dtype | None = None) -> None:
        """Measure on this GPU which way is fastest for so many tokens, where that is not known yet (some seconds).

        Args:
            training: forward and backward, else forward alone.
            dtype: of the product, by default that of `values`; under autocast give its.
        """
        if self.values.is_cuda:
            from sparselearn.kernels.crossover_measure import ensure

            ensure(self._case(dtype or self.values.dtype, training, crossover.bucket(tokens)))

    # ---- copies and files --------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Forget what was made of values and places. Needed only after writing to them in place while frozen."""
        self._forget()
        self.places_t = None
        if (self.n, self.m) == (2, 4) and self.out_features % 8 == 0 and self.in_features % 8 == 0:
            mask = self.mask
            if bool((mask.unflatten(0, (-1, 4)).sum(1) == 2).all()):
                self.places_t = kernel.reference.pack(mask.T, mask.T)[1]

    def _forget(self) -> None:
        self._forms.clear()
        self._prepared.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_forms": {}, "_prepared": set()}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Checks what is loaded: places decide where kernels read."""
        saved = [state_dict.get(prefix + name) for name in ("values", "places")]
        if all(isinstance(tensor, Tensor) for tensor in saved):
            values, places = cast(list[Tensor], saved)
            try:
                kernel.reference.check_packed(values, places, self.n, self.m)
            except SparsityError as error:
                raise SparsityError(f"The saved `{prefix.removesuffix('.')}` cannot be loaded. {error}") from error
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, pattern={self.n}:{self.m}, "
            f"bias={self.bias is not None}"
        )


def _recorded() -> bool:
    """Whether torch compiles now, or a CUDA graph is captured."""
    return torch.compiler.is_compiling() or (
        torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    )  # fmt: skip


def _form_of(way: str, training: bool, frozen: bool) -> str:
    return "metadata" if way == "gemm" and (training or not frozen) else way


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ways(
    device: torch.device, dtype: torch.dtype, neurons: int, inputs: int, pattern: str, tokens: int, training: bool,
    frozen: bool,
) -> str:  # fmt: skip
    """The sparse ways that are possible, the likely fastest first, with spaces between; a notice where there is none.

    `tokens` is a bucket of `crossover`, which has 8 and 64 among them.
    """
    if problem := _unserved(device, dtype):
        _notice(f"`SemiStructuredLinear` computes densely here: {problem}")
        return ""
    ways = []
    if not training and frozen and pattern == "2:4" and fragments.fits(neurons, inputs, dtype):
        ways += ["decode"] * (tokens <= kernel.MAX_DECODE_TOKENS)
    ways += ["gemv"] * (not training and tokens <= kernel.MAX_GEMV_TOKENS)
    if pattern == "2:4" and cslt.fits(neurons, inputs, dtype):
        ways += ["gemm"] * cslt.trusted(device, dtype)
    elif not ways and tokens > kernel.MAX_GEMV_TOKENS:
        _notice(
            f"`SemiStructuredLinear` of {pattern}, shape [{neurons}, {inputs}] and {dtype} computes many tokens "
            f"densely: sparse products need 2:4, multiples of {cslt.MULTIPLE}, and bfloat16 or float16."
        )
    return " ".join(ways)


def _unserved(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda" or torch.version.hip:
        return f"it has no sparse products for {device.type}; they need an NVIDIA GPU."
    if (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"sparse products need compute capability 8.0; {torch.cuda.get_device_name(device)} has {found}."
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"sparse products are of float32, bfloat16 and float16, not {dtype}."
    return "" if find_spec("triton") else "triton is not installed."


@cache
def _notice(text: str) -> None:
    warnings.warn(text, stacklevel=6)
