"""Which parameters of a model are sparsified, under which names."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from sparselearn.errors import SparsityError, closest

Predicate = Callable[[str, nn.Module, nn.Parameter], bool]
Select = Iterable[str] | Predicate | None

LINEAR = (nn.Linear, nn.Bilinear)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class Weight:
    """One weight of the model, found anew at each use (FSDP2 and `.to()` may replace the parameter)."""

    name: str
    module: nn.Module
    attribute: str
    aliases: list[str] = field(default_factory=list)  # further names of the same tied tensor

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    @property
    def fan_in_dims(self) -> tuple[int, ...]:
        """The dimensions that one output sums over (0 is the output dimension, but for a transposed conv)."""
        first = 0 if isinstance(self.module, CONV_TRANSPOSE) else 1
        return (first, *range(2, self.parameter.ndim))


def clean_name(name: str) -> str:
    """The name without what DDP and torch.compile add to it."""
    name = name.replace("_orig_mod.", "")
    return name.removeprefix("module.")


def is_depthwise(module: nn.Module) -> bool:
    """A convolution with one input channel per filter: its fan-in is the kernel alone."""
    return isinstance(module, CONV + CONV_TRANSPOSE) and module.groups > 1 and module.groups == module.in_channels


def _candidates(model: nn.Module) -> dict[str, Weight]:
    """Every parameter of at least two dimensions, tied ones once under their first name."""
    inner = getattr(model, "_orig_mod", model)
    wrapped = isinstance(inner, nn.parallel.DistributedDataParallel)
    found: dict[str, Weight] = {}
    seen: dict[int, Weight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter) and attribute != "bias"
            if parameter.ndim < 2 and not lazy:  # a lazy weight is refused where it is selected
                continue
            name = f"{path}.{attribute}" if path else attribute
            name = clean_name(name) if wrapped else name.replace("_orig_mod.", "")
            if id(parameter) in seen:
                first = seen[id(parameter)]
                if name != first.name:
                    first.aliases.append(name)
                    if _by_default(module, attribute) and not _by_default(first.module, first.attribute):
                        first.module, first.attribute = module, attribute  # a tied head counts as Linear
                continue
            found[name] = seen[id(parameter)] = Weight(name, module, attribute)
    return found


def _by_default(module: nn.Module, attribute: str) -> bool:
    """Weights of linear and convolution layers and attention projections; not depthwise, not embeddings."""
    if isinstance(module, nn.MultiheadAttention):
        return attribute in ATTENTION
    return attribute == "weight" and isinstance(module, LINEAR + CONV + CONV_TRANSPOSE) and not is_depthwise(module)


def _maskable(module: nn.Module, attribute: str) -> bool:
    """What a pattern with wildcards may select beyond the default: embeddings and depthwise convolutions."""
    kinds = (*CONV, *CONV_TRANSPOSE, nn.Embedding, nn.EmbeddingBag)
    return _by_default(module, attribute) or (attribute == "weight" and isinstance(module, kinds))


def matches(pattern: str, weight: Weight) -> bool:
    """Whether a shell pattern matches one of the weight's names, or the module that holds it."""
    for name in (weight.name, *weight.aliases):
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[0], pattern):
            return True
    return False


def match_all(
    what: str, patterns: Iterable[str], weights: Mapping[str, Weight], names: Iterable[str] | None = None
) -> dict[str, list[str]]:
    """Pattern -> the names that it matches; a pattern that matches nothing is an error."""
    if isinstance(patterns, str):
        raise SparsityError(f"`{what}` needs a list of patterns; got the string {patterns!r}. Write [{patterns!r}].")
    result = {}
    for pattern in patterns:
        result[pattern] = [name for name, weight in weights.items() if matches(pattern, weight)]
        if not result[pattern]:
            raise SparsityError(
                f"`{what}` pattern {pattern!r} matched no parameter. "
                f"Closest names: {closest(pattern, names or weights)}."
            )
    return result


def select_weights(model: nn.Module, select: Select = None, exclude: Iterable[str] = ()) -> list[Weight]:
    """The weights to sparsify, in the model's order.

    By default: weights of Linear, Conv1d/2d/3d, ConvTranspose, Bilinear and MultiheadAttention. Biases, norms, 1-D
    parameters, embeddings, depthwise convolutions and frozen parameters (a teacher, say) stay as they are.

    `select` is a list of name patterns (they reach embeddings, depthwise convolutions and frozen weights too, and any
    parameter of two or more dimensions by its full name) or a predicate (name, module, parameter) -> bool. `exclude`
    is a list of patterns taken away.
    """
    candidates = _candidates(model)
    if select is None:
        chosen = {n for n, w in candidates.items() if _by_default(w.module, w.attribute) and w.parameter.requires_grad}
    elif callable(select):
        chosen = {n for n, w in candidates.items() if select(n, w.module, w.parameter)}
    else:
        chosen = set()
        for pattern, names in match_all("select", select, candidates).items():
            chosen |= {
                n for n in names
                if n == pattern or _maskable(candidates[n].module, candidates[n].attribute)
            }  # fmt: skip
    for names in match_all("exclude", exclude, candidates).values():
        chosen -= set(names)
    weights = [candidates[n] for n in candidates if n in chosen]
    if not weights:
        raise SparsityError(
            "No weight was selected. Sparsified by default: trainable Linear, Conv, ConvTranspose and "
            f"MultiheadAttention weights; the model has {len(candidates)} parameters of two or more dimensions: "
            f"{', '.join(list(candidates)[:5]) or 'none'}."
        )
    for weight in weights:
        parameter = weight.parameter
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise SparsityError(f"`{weight.name}` is not initialised yet. Run one batch through the model first.")
        if not torch.is_floating_point(parameter):
            raise SparsityError(f"`{weight.name}` is {parameter.dtype}; only floating-point weights are sparsified.")
    return weights


@torch.no_grad()
def split_projections(model: nn.Module) -> nn.Module:
    """Give every `MultiheadAttention` its query, key and value projections as three weights; returns the model.

    torch packs them into one [3E, E] weight when sizes are equal; masks, budgets and rankings then span all three. The
    model is changed in place: call this before the optimizer and the Sparsifier are built. Outputs stay the same, but
    for rounding.

    >>> attention = split_projections(nn.MultiheadAttention(8, 2))
    >>> [w.name for w in select_weights(attention)]
    ['q_proj_weight', 'k_proj_weight', 'v_proj_weight', 'out_proj.weight']
    """
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            packed = module.in_proj_weight
            for name, part in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), packed.chunk(3), strict=True):
                setattr(module, name, nn.Parameter(part.clone(), requires_grad=packed.requires_grad))
            module.register_parameter("in_proj_weight", None)
            module._qkv_same_embed_dim = False  # what torch's forward looks at
    return model
