"""Swap a model's masked layers for sparse modules where those are faster, and back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselearn.errors import SparsityError, closest
from sparselearn.modules.base import SparseModule, masked_weight
from sparselearn.modules.condensed import CondensedConv2d, CondensedLinear
from sparselearn.modules.grouped import GroupedFanInLinear
from sparselearn.modules.report import ConversionReport, Row, check_table
from sparselearn.modules.semi_structured import SemiStructuredLinear
from sparselearn.modules.siblings import CsrLinear
from sparselearn.modules.timing import Timer, interleaved, speedup
from sparselearn.sparsifier import Sparsifier

CANDIDATES: tuple[type[SparseModule], ...] = (CondensedLinear, CondensedConv2d, CsrLinear)
CUDA_CANDIDATES: tuple[type[SparseModule], ...] = (GroupedFanInLinear, SemiStructuredLinear, *CANDIDATES)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def convert(
    model: nn.Module,
    masks: Sparsifier | Mapping[str, Tensor],
    example: Any = None,
    *,
    force: bool = False,
    candidates: Sequence[type[SparseModule]] | None = None,
    min_speedup: float = 1.0,
    save_table: str | Path | None = None,
    timer: Timer = interleaved,
) -> ConversionReport:
    """Swap layers for sparse modules, in place, each only where it is faster here and on this input.

    The example runs through the model once to see what every layer is given; then each layer and its candidates are
    timed in turn on just that, without gradients. The fastest candidate takes the layer's place where the lower end
    of the 95 % confidence interval of its speed-up exceeds `min_speedup`. The model's output is compared before and
    after; where it differs by more than rounding, or the model fails, everything is put back and an error raised.

    A `Sparsifier` and an optimizer of the model lose sight of swapped layers, whose parameters are new; make the
    optimizer after converting. `revert` goes back.

    Args:
        model: the plain model; convert before DDP or torch.compile wraps it.
        masks: the sparsifier, or weight name -> bool mask (True = active). Layers without a mask stay.
        example: an input of the size to be fast for: a tensor, a tuple of arguments, or a dict of keyword arguments.
        force: swap every layer for the first candidate that can hold it, without timing; `example` may be left out,
            and then outputs are not compared.
        candidates: classes to try, in this order; by default all that may win on the layer's device.
        min_speedup: how many times faster a candidate must be.
        save_table: a .csv or .json file for the report.
        timer: how functions are timed.

    Raises:
        SparsityError: a mask without a parameter, of another shape, or that hides nonzero weights; a wrapped model; no
            example; outputs that differ.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> from sparselearn import Sparsifier, static
    >>> sparsifier = Sparsifier(model, static(), sparsity=0.9, exclude=["2"])
    >>> convert(model, sparsifier, torch.randn(8, 64), force=True, candidates=[CsrLinear]).swapped
    ['0']
    """
    if save_table is not None:
        check_table(save_table)
    if example is None and not force:
        raise SparsityError("`convert` needs an example input to time the layers on. Pass one, or `force=True`.")
    if isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        raise SparsityError(
            f"`convert` needs the plain model; got a {type(model).__name__}. Convert the model inside and wrap it anew."
        )
    targets = _targets(model, masks.masks if isinstance(masks, Sparsifier) else masks)
    calls, before = _observe(model, targets, example)
    rows: list[Row] = []
    made: dict[str, SparseModule] = {}
    for name, (module, mask) in targets.items():
        row = _row(name, module, mask, calls.get(name, []))
        tries = candidates or (CUDA_CANDIDATES if _on_cuda(module) else CANDIDATES)
        reason = _refusal(model, name, module, tries)
        if not reason and example is not None and not calls[name]:
            reason = "its forward is not called on the example"
        if reason:
            rows.append(replace(row, reason=reason))
            continue
        tried, chosen = _try(row, module, mask, calls[name], tries, None if force else timer, min_speedup)
        rows += tried
        if chosen is not None:
            made[name] = chosen
    _swap(model, {targets[name][0]: new for name, new in made.items()})
    if example is not None and made:
        _compare(model, example, before, {new: targets[name][0] for name, new in made.items()})
    report = ConversionReport(rows)
    if save_table is not None:
        report.save(save_table)
    return report


def revert(model: nn.Module) -> dict[str, Tensor]:
    """Swap every sparse module for its dense layer, in place; returns their masks by weight name.

    Weights, biases and masks are those that the sparse modules hold now, bit for bit: with `Sparsifier(...,
    state_dict=...)` training goes on. The parameters are new; make the optimizer after reverting.
    """
    masks: dict[str, Tensor] = {}
    swaps: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseModule) and name:
            _refuse_hooks(name, module)
            swaps[module], masks[f"{name}.weight"] = module.to_dense()
    _swap(model, swaps)
    return masks


# ---- which layers ------------------------------------------------------------------------------------------


def _targets(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, tuple[nn.Module, Tensor]]:
    """Module name -> (module, mask), each module once, in the model's order."""
    known = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if unknown := [name for name in masks if name not in set(known)]:
        raise SparsityError(
            f"There is a mask for `{unknown[0]}`, which is no parameter of the model. Closest names: "
            f"{closest(unknown[0], known)}."
        )
    found: dict[nn.Module, tuple[str, Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, _ in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            if name in masks and module not in found:
                found[module] = (path, masks[name])
    for module, (path, mask) in found.items():
        if type(module) in (nn.Linear, nn.Conv2d):
            try:
                masked_weight(module, mask, type(module))
            except SparsityError as error:
                raise SparsityError(f"`{path}.weight`: {error}") from error
    return {path: (module, mask) for module, (path, mask) in found.items()}


def _refusal(model: nn.Module, name: str, module: nn.Module, candidates: Sequence[type[SparseModule]]) -> str:
    """Why this layer must stay as it is; empty where nothing speaks against a swap."""
    parent = model.get_submodule(name.rpartition(".")[0]) if name else model
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads the weight itself"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "TransformerEncoderLayer's fast path reads the weight itself; "
            "turn it off with torch.backends.mha.set_fastpath_enabled(False)"
        )
    if not any(type(module) is candidate.replaces for candidate in candidates):
        return f"no candidate replaces {type(module).__name__}"
    if not name:
        return "it is the model itself; put it into an nn.Sequential"
    kinds = {type(parameter.data) for parameter in module.parameters(recurse=False)} - {Tensor}
    if kinds:
        return f"its weight is a {kinds.pop().__name__}"
    if _hooks(module):
        return "it has hooks, which would be lost"
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    for path, other in model.named_modules():
        for attribute, parameter in other.named_parameters(recurse=False):
            if other is not module and id(parameter) in own:
                return f"its weight or bias is tied to `{path}.{attribute}`"
    return ""


def _on_cuda(module: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in module.parameters(recurse=False))


def _hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _refuse_hooks(name: str, module: nn.Module) -> None:
    if _hooks(module):
        raise SparsityError(f"`{name}` has hooks, which would be lost. Remove them before `revert`.")


# ---- what is measured --------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and a random state of its own; everything as before after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _run(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _observe(
    model: nn.Module, targets: Mapping[str, tuple[nn.Module, Tensor]], example: Any
) -> tuple[dict[str, list[Call]], list[Tensor]]:
    """What each target is called with on the example, and the model's output."""
    calls: dict[str, list[Call]] = {name: [] for name in targets}
    if example is None:
        return calls, []

    def record(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)  # it may be changed in place later
        calls[name].append((args, kwargs))

    handles = [
        module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
        for name, (module, _) in targets.items()
    ]
    try:
        with _evaluating(model):
            return calls, _tensors(_run(model, example))
    finally:
        for handle in handles:
            handle.remove()


def _try(
    row: Row,
    module: nn.Module,
    mask: Tensor,
    calls: Sequence[Call],
    candidates: Sequence[type[SparseModule]],
    timer: Timer | None,
    min_speedup: float,
) -> tuple[list[Row], SparseModule | None]:
    """A row for each candidate of one layer, and the one to take. Without a timer: the first that can hold it."""
    rows: list[Row] = []
    made: dict[int, SparseModule] = {}  # by row
    for candidate in candidates:
        if candidate.replaces is not type(module):
            continue
        try:
            new = candidate.from_dense(module, mask)
        except SparsityError as error:
            rows.append(replace(row, candidate=candidate.__name__, reason=str(error)))
            continue
        made[len(rows)] = new
        rows.append(replace(row, candidate=candidate.__name__))
        if timer is None:
            new.way = "sparse"
            rows[-1] = replace(rows[-1], swapped=True, reason="forced")
            return rows, new
        for x in [arguments[0] for arguments, _ in calls if arguments]:
            new.measure(x.numel() // x.shape[-1])
    if not made or timer is None:
        return rows, None
    dense, *others = timer([partial(_replay, m, calls) for m in (module, *made.values())])
    passed: dict[int, float] = {}
    for i, times in zip(made, others, strict=True):
        ratio = speedup(dense, times)
        rows[i] = replace(
            rows[i], dense_us=_median_us(dense), candidate_us=_median_us(times), speedup=ratio.median, low=ratio.low,
            high=ratio.high, reason="" if ratio.low > min_speedup else f"not faster than {min_speedup:g}x for certain",
        )  # fmt: skip
        if ratio.low > min_speedup:
            passed[i] = ratio.median
    if not passed:
        return rows, None
    best = max(passed, key=lambda i: passed[i])
    for i in passed:
        rows[i] = replace(rows[i], swapped=i == best, reason="" if i == best else "another candidate is faster")
    return rows, made[best]


def _row(name: str, module: nn.Module, mask: Tensor, calls: Sequence[Call]) -> Row:
    shapes = ["x".join(map(str, a[0].shape)) if a and isinstance(a[0], Tensor) else "?" for a, _ in calls]
    inputs = " ".join(f"{n}·{s}" if (n := shapes.count(s)) > 1 else s for s in dict.fromkeys(shapes))
    return Row(name, "x".join(map(str, mask.shape)), float(mask.float().mean()), inputs)


def _replay(module: nn.Module, calls: Sequence[Call]) -> None:
    with torch.no_grad():
        for args, kwargs in calls:
            module(*args, **kwargs)


def _median_us(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 2] * 1e6


# ---- swapping and checking -----------------------------------------------------------------------------------


def _swap(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, under all their names."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in swaps:
                setattr(parent, key, swaps[child])


def _compare(model: nn.Module, example: Any, before: list[Tensor], undo: Mapping[nn.Module, nn.Module]) -> None:
    """Raise, with the old layers back in place, where the model's output is not what it was."""
    problem, cause = "", None
    try:
        with _evaluating(model):
            after = _tensors(_run(model, example))
    except Exception as error:
        problem, cause = f"the model fails with {type(error).__name__}: {error}", error
    else:
        for old, new in zip(before, after, strict=True):
            limit = torch.finfo(old.dtype).eps ** 0.5 * float(old.abs().max()) if old.numel() else 0.0
            worst = float((old - new).abs().max()) if old.numel() else 0.0
            if not worst <= limit and bool(torch.isfinite(old).all()):
                problem = f"the output differs by {worst:.3g} (allowed: {limit:.3g})"
    if problem:
        _swap(model, undo)
        raise SparsityError(
            f"After conversion {problem}. The model is as it was. Leave the layer that it depends on out of the masks."
        ) from cause


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a nested output."""
    if isinstance(output, Tensor):
        return [output.detach().clone()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, tuple | list) else []
