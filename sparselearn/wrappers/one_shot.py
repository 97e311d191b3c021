"""Masks from outside of a training step: global one-shot pruning, and the outer loops of papers built on it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparselearn.distributions import snip_scores
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import part_of
from sparselearn.schedules import check_density
from sparselearn.selection import select_weights
from sparselearn.sparsifier import Sparsifier
from sparselearn.state import generator
from sparselearn.structures import top_indices


def global_masks(
    scores: Mapping[str, Tensor], nnz: int, within: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The nnz weights of highest score over all layers, at least one in each; only weights of `within`, if given.

    Raises:
        SparsityError: nnz is less than the number of layers, or more than may be chosen.

    >>> global_masks({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.5])}, 2)["a"].tolist()
    [True, False]
    """
    masked = {
        name: score.detach().float().masked_fill(~within[name], -torch.inf) if within else score.detach().float()
        for name, score in scores.items()
    }
    flat = []
    for score in masked.values():
        line = score.reshape(-1).clone()
        if line[line.argmax()] > -torch.inf:
            line[line.argmax()] = torch.inf
        flat.append(line)
    every = torch.cat([line.to(flat[0].device) for line in flat])
    room = int((every > -torch.inf).sum())
    if not len(flat) <= nnz <= room:
        raise SparsityError(
            f"`global_masks` was asked for {nnz} weights of {len(flat)} layers; it needs one for each layer, and there "
            f"are {room} to choose from."
        )
    parts = top_indices(every, nnz).split([line.numel() for line in flat])
    return {
        name: part.view(score.shape).to(score.device) for (name, score), part in zip(masked.items(), parts, strict=True)
    }


def weights_of(model: nn.Module, sparsifier: Sparsifier) -> dict[str, Tensor]:
    """The sparse weights by name."""
    named = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: named[name] for name in sparsifier.masks}


def activating_while_pruning(
    weights: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    prune: float = 0.2,
    activate: float = 0.02,
) -> dict[str, Tensor]:
    """The masks after one cycle of AP (activating-while-pruning, arXiv 2212.06145, Alg. 1).

    Of all active weights the fraction prune - activate of least |w| goes, over all layers; then, of the survivors, the
    fraction `activate` that is negative and has moved least since the cycle's start, |w - w_start|: such weights push
    pre-activations down for good. Every layer keeps its largest weight. Rewind the kept weights to `start` afterwards,
    as in iterative pruning. The paper: prune = 0.2, activate = 0.02.

    Differs: norm and bias parameters take no part (the reference includes every parameter named 'weight'); where there
    are too few negative weights all of them go (the reference fails).
    """
    if not 0 <= activate <= prune < 1:
        raise SparsityError(f"AP needs 0 <= activate <= prune < 1; got activate={activate}, prune={prune}.")
    active = sum(int(mask.sum()) for mask in masks.values())
    kept = global_masks({n: w.abs() for n, w in weights.items()}, active - part_of(prune - activate, active), masks)
    negative = {n: kept[n] & (w < 0) for n, w in weights.items()}
    for name, w in weights.items():
        negative[name] &= ~top_indices(w.abs().masked_fill(~kept[name], -1).reshape(-1), 1).view(w.shape)
    still = {n: -(w - start[n]).abs() for n, w in weights.items()}
    n_drop = min(part_of(activate, active), sum(int(m.sum()) for m in negative.values()))
    names = list(weights)
    flat = torch.cat([still[n].float().masked_fill(~negative[n], -torch.inf).reshape(-1) for n in names])
    for n, part in zip(names, top_indices(flat, n_drop).split([weights[n].numel() for n in names]), strict=True):
        kept[n] = kept[n] & ~part.view(kept[n].shape)
    return kept


def app_densities(batches: int, *, last: float, base: float = 0.8) -> list[float]:
    """APP's densities before each megabatch of a stream: base^x, x from 1 to `last` in equal steps (arXiv 2202.07155).

    >>> [round(d, 3) for d in app_densities(3, last=5)]
    [0.8, 0.512, 0.328]
    """
    if batches < 1 or last < 1 or not 0 < base < 1:
        raise SparsityError(f"APP needs batches >= 1, last >= 1 and 0 < base < 1; got {batches}, {last}, {base}.")
    step = (last - 1) / max(batches - 1, 1)
    return [base ** (1 + step * b) for b in range(batches)]


def anytime_pruning(
    model: nn.Module,
    sparsifier: Sparsifier,
    stream: Iterable[Callable[[nn.Module], Tensor]],
    densities: Iterable[float],
    *optimizers: Optimizer,
) -> Iterator[int]:
    """APP: anytime progressive pruning (Misra et al., arXiv 2202.07155): before each megabatch a one-shot global SNIP.

    `stream` gives, for each megabatch, the loss of the model on part of it (the paper: 20 %); `densities` are those of
    `app_densities`. Train on the megabatch at each yield, which is its index:

        for b in anytime_pruning(model, sparsifier, losses, app_densities(10, last=10), optimizer):
            fit(megabatches[b])

    Masks only shrink; `stream` and `densities` must be of one length. Start from a
    `Sparsifier(model, static(), sparsity=0.0)`.

    Differs: all selected weights take part (the reference: convolutions); loading the best model of the last megabatch
    is the caller's, as is the restart of the learning rate.
    """
    size = sum(mask.numel() for mask in sparsifier.masks.values())
    for index, (loss, density) in enumerate(zip_longest(stream, densities)):
        if loss is None or density is None:
            raise SparsityError(
                f"`anytime_pruning` needs a density for each megabatch; there are {index} "
                f"{'megabatches' if loss is None else 'densities'}, and more of the other."
            )
        check_density("densities", density)
        scores = snip_scores(model, loss, list(sparsifier.masks))
        nnz = min(round(density * size), sparsifier.nnz)
        sparsifier.set_masks(global_masks(scores, nnz, sparsifier.masks), *optimizers)
        yield index


def random_search(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    density: float,
    trials: int,
    seed: int = 0,
    names: list[str] | None = None,
) -> dict[str, Tensor]:
    """The best of K random node masks at initialisation: a baseline that is known not to beat random pruning.

    In every weight [out, in, ...] but the last layer's each output is active with its whole row or not at all, a
    fraction `density` of them; the masks with the least `loss(model)` win, and the model stays as it was, buffers
    included. Train them by `Sparsifier(model, static(), sparsity=0.0)` and its `set_masks(result)`.

    Differs: only the abstract of the random-search study was known; the choice of K masks and of the loss at
    initialisation is ours. No fidelity is claimed.
    """
    if not 0 < density <= 1 or trials < 1:
        raise SparsityError(f"`random_search` needs 0 < density <= 1 and trials >= 1; got {density}, {trials}.")
    chosen = {w.name: w.parameter for w in select_weights(model, names)}
    weights = dict(list(chosen.items())[:-1]) or chosen
    best = math.inf
    result: dict[str, Tensor] = {}
    for trial in range(trials):
        masks = {}
        for name, parameter in weights.items():
            score = torch.rand(len(parameter), generator=generator(seed, trial, name))
            nodes = top_indices(score, max(1, round(density * len(score)))).to(parameter.device)
            masks[name] = nodes.view(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape).clone()
        with torch.no_grad(), _masked(model, weights, masks):
            value = float(loss(model))
        if not result or value < best:
            best, result = (value if value == value else math.inf), masks  # NaN never wins
    return result


@contextmanager
def _masked(model: nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with masked weights; afterwards with the old ones and the old buffers (running statistics)."""
    changing = [*weights.values(), *model.buffers()]
    saved = [t.detach().clone() for t in changing]
    for name, weight in weights.items():
        weight.masked_fill_(~masks[name], 0)
    try:
        yield
    finally:
        for tensor, old in zip(changing, saved, strict=True):
            tensor.copy_(old)


def group_supports(shapes: Mapping[str, torch.Size], *, groups: int, links: float, seed: int = 0) -> dict[str, Tensor]:
    """Block supports between groups of neurons: of the groups x groups blocks of each weight [out, in] the diagonal and
    a random fraction `links` of the others may be active (G2GNet's ensemble-to-ensemble links).

    For `Sparsifier(support=...)`. Neurons are grouped by index, as evenly as their number allows.

    Differs: group assignment and the number of links in the paper are not known to us; no fidelity is claimed.
    """
    if groups < 1 or not 0 <= links <= 1:
        raise SparsityError(f"`group_supports` needs groups >= 1 and links in [0, 1]; got {groups}, {links}.")
    result = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or min(shape) < groups:
            raise SparsityError(
                f"`group_supports` needs weights [out, in] of at least {groups} each; `{name}`: {shape}."
            )
        score = torch.rand(groups, groups, generator=generator(seed, 0, f"groups/{name}"))
        score.fill_diagonal_(2.0)
        chosen = top_indices(score.view(-1), groups + round(links * groups * (groups - 1))).view(groups, groups)
        row = torch.arange(shape[0]) * groups // shape[0]
        column = torch.arange(shape[1]) * groups // shape[1]
        result[name] = chosen[row][:, column]
    return result
