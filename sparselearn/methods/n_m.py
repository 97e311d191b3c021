"""N:M training: straight-through estimators with decay, decaying masks, structure schedules, and one-shot pruning."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sparselearn.criteria import Criterion, Layer
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import DropGrow
from sparselearn.methods.straight_through import StraightThrough, masked_decay
from sparselearn.schedules import Schedule, UpdateSchedule
from sparselearn.structures import NM, Structure, TransposableNM


def ste(structure: Structure, *, every: int = 1, stop: int | None = None) -> StraightThrough:
    """Straight-through estimator: forward W⊙M with M the best mask of W, the gradient to all of W (arXiv 1308.3432)."""
    return StraightThrough(structure, every=every, stop=stop)


def sr_ste(
    structure: Structure, *, decay: float = 2e-4, every: int = 1, stop: int | None = None, micro_batches: int = 1
) -> StraightThrough:
    """SR-STE: STE with a decay of the masked-out weights (Zhou et al., arXiv 2102.04010, eq. 8).

    gradient = g + λ·(1 - M)⊙W, once per optimizer step, after unscaling; the paper's λ: 2e-4 for 2:4 on ImageNet.

    Args:
        structure: the paper's is `NM(n, m)`.
        decay: λ.
        micro_batches: the official code adds λ within backward, so that k accumulated micro-batches add it k times;
            pass k here to have that reading. (Its loss scaling under AMP, which divides λ by the scale, is not copied.)

    Differs: λ per step, see above; groups of convolutions run over input channels.
    """
    return StraightThrough(structure, every=every, stop=stop, penalty=masked_decay(decay * micro_batches))


@dataclass(frozen=True)
class decaying:
    """β of MdGf: 1 until `start`, then max(0, 1 - per_step·t) or exp(-per_step·t), t from `start`; 0 from `stop` on."""

    per_step: float
    start: int
    stop: int
    kind: Literal["linear", "exponential"]

    def __call__(self, step: int) -> float:
        if step < self.start:
            return 1.0
        if step >= self.stop:
            return 0.0
        t = step - self.start
        return max(0.0, 1 - self.per_step * t) if self.kind == "linear" else math.exp(-self.per_step * t)


@dataclass(frozen=True)
class structure_stages:
    """The structure from each step on; None is dense, and holds before the first step."""

    steps: tuple[int, ...]
    structures: tuple[Structure | None, ...]

    def __call__(self, step: int) -> Structure | None:
        passed = sum(t <= step for t in self.steps)
        return self.structures[passed - 1] if passed else None


def mdgf(
    structure: Structure,
    *,
    stop: int,
    start: int = 0,
    rate: float | None = None,
    kind: Literal["linear", "exponential"] = "linear",
    gradient: Literal["ste", "chain"] = "ste",
    every: int = 1,
) -> StraightThrough:
    """MdGf: progressive gradient flow by a decaying mask (Bambhaniya et al., arXiv 2402.04744, §4.1).

    Forward W⊙(M + β·(1 - M)); β falls from 1 at `start` linearly or exponentially and is 0 from `stop` on, the
    fine-tuning phase with an exactly sparse model. Before `start` training is dense.

    Args:
        stop, start: optimizer steps.
        rate: of the decay per step; default: linear reaches 0, exponential 0.01, at `stop`.
        gradient: "ste" gives all weights the full gradient, as the authors' code does; "chain" the true derivative, as
            the paper describes.
    """
    if not 0 <= start < stop:
        raise SparsityError(f"`mdgf` needs 0 <= start < stop (optimizer steps); got start={start}, stop={stop}.")
    default = 1 / (stop - start) if kind == "linear" else math.log(100) / (stop - start)
    beta = decaying(default if rate is None else rate, start, stop, kind)
    return StraightThrough(structure, every=every, residual=beta, gradient=gradient)


def sdgf(
    n: int, m: int, *, stop: int, start: int = 0, kind: Literal["stepwise", "geometric"] = "stepwise", every: int = 1
) -> StraightThrough:
    """SdGf: progressive gradient flow by a structure that tightens (Bambhaniya et al., arXiv 2402.04744, §4.2).

    stepwise (n = 1): (m-1):m, m/2:m, m/4:m, ..., 1:m; geometric: 8n:8m, 4n:4m, 2n:2m, n:m, of one density. Dense before
    `start`; equal frames, the last of them from `stop` on.

    Differs: the frame is a function of the step (the authors' code switches only when an epoch equals a key, which
    breaks on resume). The coarser frames need fan-ins that 8m divides for "geometric".
    """
    if not 0 <= start < stop:
        raise SparsityError(f"`sdgf` needs 0 <= start < stop (optimizer steps); got start={start}, stop={stop}.")
    if kind == "stepwise":
        if n != 1 or m < 4 or m & (m - 1):
            raise SparsityError(f"`sdgf` stepwise goes to 1:m with m a power of 2 from 4 on; got {n}:{m}.")
        frames = [m - 1, *(m >> k for k in range(1, m.bit_length()))]
        structures = tuple(NM(k, m) for k in frames)
    else:
        structures = tuple(NM(n * k, m * k) for k in (8, 4, 2, 1))
    last = len(structures) - 1
    steps = tuple(start + round((stop - start) * i / last) for i in range(last + 1))
    return StraightThrough(NM(n, m), every=every, stage=structure_stages(steps, structures))


def dense_then(method: StraightThrough, *, start: int) -> StraightThrough:
    """The method after a dense phase: no mask before optimizer step `start`."""
    return _staged(method, (start,), (method.structure,))


def then_dense(method: StraightThrough, *, stop: int) -> StraightThrough:
    """The method, with dense fine-tuning from optimizer step `stop` on."""
    return _staged(method, (0, stop), (method.structure, None))


def _staged(
    method: StraightThrough, steps: tuple[int, ...], structures: tuple[Structure | None, ...]
) -> StraightThrough:
    if method.stage is not None:
        raise SparsityError("The method has stages of its own already.")
    return replace(method, stage=structure_stages(steps, structures))


def pretrain_24(*, steps: int, decay: float = 6e-5, every: int = 40, dense_from: float = 5 / 6) -> StraightThrough:
    """2:4 pre-training with transposable masks (Hu et al., arXiv 2404.01847).

    The mask, 2:4 in rows and columns so that forward and dX are both sparse, is renewed every 40 optimizer steps; the
    gradient gets λ·(1 - M)⊙W after clipping (masked decay on the gradient, §4.2); from 5/6 of the run on training is
    dense. λ: 6e-5 for GPT-2 124M and 774M, 2e-4 for 350M and 1.5B. The neural gradients' MVUE, which makes dW sparse
    too, is `modules.mvue.mvue`.

    Args:
        steps: length of the run in optimizer steps.
    """
    method = StraightThrough(TransposableNM(2, 4), every=every, penalty=masked_decay(decay), penalty_after_clip=True)
    return then_dense(method, stop=round(steps * dense_from))


@dataclass(frozen=True)
class soft_threshold:
    """S-STE's projection (Hu et al., arXiv 2409.09099, eq. 8): in each group of m every weight is moved towards zero by
    the largest magnitude that is not kept, so that the forward weights are continuous in W; scaled per tensor by
    β = ⟨W, S(W)⟩/⟨S(W), S(W)⟩, which is computed once, at the first step, in the paper; here at every call.

    Differs: see above; β is a function of the dense weights, not state.
    """

    structure: NM
    scaled: bool = True

    def __call__(self, layer: Layer) -> Tensor:
        dense, mask = layer.weight, layer.mask
        dropped = dense.abs().masked_fill(mask, 0)
        grouped = dropped.movedim(self.structure.dim, -1)
        limit = (
            grouped.unflatten(-1, (-1, self.structure.m))
            .amax(-1, keepdim=True)
            .expand(*grouped.shape[:-1], -1, self.structure.m)
        )
        limit = limit.reshape(grouped.shape).movedim(-1, self.structure.dim)
        shrunk = dense.sign() * (dense.abs() - limit).clamp(min=0)
        soft: Tensor = torch.where(mask, shrunk, 0.0)
        if not self.scaled:
            return soft
        power = soft.square().sum()
        scale: Tensor = torch.where(power > 0, (dense * soft).sum() / power, 1.0)
        return soft * scale


def s_ste(n: int = 2, m: int = 4) -> StraightThrough:
    """S-STE: continuous pruning by soft thresholding (Hu et al., arXiv 2409.09099)."""
    structure = NM(n, m)
    return StraightThrough(structure, project=soft_threshold(structure))


@dataclass(frozen=True)
class l1_decay:
    """λ(t)·(1 - M)⊙sign(W): CAST's pull of masked-out weights towards zero, added to the gradient.

    Adam divides it by √v̂ as it does g, so that the pull is adaptive.
    """

    rate: float | Schedule

    def __call__(self, layer: Layer) -> Tensor:
        rate = self.rate(layer.step) if callable(self.rate) else self.rate
        return (layer.weight.sign() * rate).masked_fill(layer.mask, 0)


def cast(structure: Structure, *, decay: float | Schedule, stop: int, every: int = 10) -> StraightThrough:
    """CAST-like: continuous adaptive sparse training (arXiv 2509.25996).

    The forward pass stays dense until `stop` (β = 1); an L1 decay on masked-out weights, renewed every 10 steps, draws
    them to zero; from `stop` on they are zero exactly.

    The paper's other two parts are `modules.scaled.scale_outputs` and `wrappers.SelfDistillation`.

    Differs: only the abstract and the authors' earlier code were read; the L1 term goes through the gradient. No
    fidelity is claimed.
    """
    return StraightThrough(structure, every=every, residual=decaying(0.0, 0, stop, "linear"), penalty=l1_decay(decay))


def asp(*, structure: Structure | None = None) -> DropGrow:
    """ASP: one-shot pruning of a trained model, masks fixed from then on (NVIDIA apex, arXiv 2104.08378).

    Build it as Sparsifier(model, asp(), initial=criteria.magnitude) and train again with the same recipe.
    """
    return DropGrow(structure=structure or NM(2, 4))


def n_m_rigl(
    n: int, m: int, *, stop: int, every: int = 100, drop_fraction: float | Schedule = 0.3, grow: Criterion
) -> DropGrow:
    """RigL within N:M groups: keeps the best of the active weights, fills each group up to n by `grow`."""
    return DropGrow(grow=grow, updates=UpdateSchedule(every, stop, None, drop_fraction), structure=NM(n, m))


def permutation_search(
    weight: Tensor, structure: NM, *, sweeps: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    """A permutation of the inputs that keeps more magnitude under N:M (Pool & Yu, NeurIPS 2021, greedy swaps).

    Args:
        weight: [out, in].
        sweeps: rounds; each tries, for every pair of groups (stripes), a random swap of one channel each and takes
            those that gain, best first, each group once.

    Returns:
        [in] int64: new channel i is old channel result[i]. The magnitude kept never falls.

    Differs: random swaps between paired groups, not the exhaustive search over stripe groups.
    """
    if weight.ndim != 2 or weight.shape[1] % structure.m:
        raise SparsityError(
            f"`permutation_search` needs a weight [out, in] with in a multiple of {structure.m}; got "
            f"{list(weight.shape)}."
        )
    n, m = structure.n, structure.m
    groups = weight.shape[1] // m
    order = torch.arange(weight.shape[1])
    score = weight.detach().abs().float().cpu()
    generator = generator or torch.Generator().manual_seed(0)

    def kept(columns: Tensor) -> Tensor:  # [pairs, m] -> magnitude kept by each group
        return score[:, columns].topk(n, dim=-1).values.sum((0, 2))

    for _ in range(sweeps if groups > 1 else 0):
        shuffled = torch.randperm(groups, generator=generator)[: groups // 2 * 2].view(2, -1)
        left, right = order.view(groups, m)[shuffled[0]], order.view(groups, m)[shuffled[1]]
        i, j = torch.randint(m, (2, len(left)), generator=generator)
        new_left, new_right, pair = left.clone(), right.clone(), torch.arange(len(left))
        new_left[pair, i], new_right[pair, j] = right[pair, j], left[pair, i]
        gain = kept(new_left) + kept(new_right) > (kept(left) + kept(right)) * (1 + 1e-7)
        table = order.view(groups, m).clone()
        table[shuffled[0][gain]], table[shuffled[1][gain]] = new_left[gain], new_right[gain]
        order = table.view(-1)
    return order


def mvue_24(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Minimum-variance unbiased 2:4 pruning of neural gradients along the last dimension (Chmiel et al., 2203.10991).

    With a1 <= a2 <= a3 <= a4 the magnitudes of a group and S their sum: if a4 <= S/2 a weight is kept with probability
    2a/S and becomes ±S/2; otherwise a4 is kept as it is and one of the others, with probability in proportion, at
    ±their sum. Pairs are drawn with probabilities that have these marginals (`mvue_pairs`).

    Differs: the pair probabilities are ours; those of the public code (2by4-pretrain) are biased in two of three cases.
    """
    if values.shape[-1] % 4:
        raise SparsityError(f"`mvue_24` needs a last dimension that is a multiple of 4; it is {values.shape[-1]}.")
    groups = values.float().reshape(-1, 4)
    magnitude, order = groups.abs().sort(dim=-1)
    probabilities, amounts = mvue_pairs(magnitude)
    u = torch.rand(len(groups), 1, generator=generator, device=generator.device if generator else None).to(groups)
    pick = (probabilities.cumsum(-1)[:, :-1] <= u).sum(-1)
    chosen = amounts.gather(1, pick.view(-1, 1, 1).expand(-1, 1, 4)).squeeze(1)
    result = torch.zeros_like(groups).scatter(1, order, chosen) * groups.sign()
    return result.view(values.shape).to(values.dtype)


PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def mvue_pairs(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """For groups [g, 4] of ascending magnitudes: the probability of each pair [g, 6] and what it becomes [g, 6, 4]."""
    a1, a2, a3, a4 = magnitude.unbind(-1)
    total = a1 + a2 + a3 + a4
    zero = torch.zeros_like(a1)
    large = a4 > total / 2
    s = torch.where(total > 0, total, 1.0)
    rest = torch.where(a1 + a2 + a3 > 0, a1 + a2 + a3, 1.0)
    a = torch.stack(
        [zero, (2 * a1 + a3 - a4) / (2 * s), (2 * a1 - a3 + a4) / (2 * s), (2 * a2 + a3 - a4) / (2 * s),
         (2 * a2 - a3 + a4) / (2 * s), (a3 + a4 - a1 - a2) / s], -1
    )  # fmt: skip
    b = torch.stack([zero, zero, 2 * a1 / s, (s - 2 * a4) / s, (a2 + a4 - a1 - a3) / s, (a3 + a4 - a1 - a2) / s], -1)
    c = torch.stack([zero, zero, a1 / rest, zero, a2 / rest, a3 / rest], -1)
    case = torch.where((2 * a1 + a3 >= a4).unsqueeze(-1), a, b)
    probabilities = torch.where(large.unsqueeze(-1), c, case).clamp(min=0)
    # a group of zeros, or a single value, is left as it is by any pair that holds the largest
    probabilities[..., 5] = torch.where(probabilities.sum(-1) > 0, probabilities[..., 5], 1.0)
    held = torch.zeros(6, 4, dtype=torch.bool, device=magnitude.device)
    for row, pair in enumerate(PAIRS):
        held[row, list(pair)] = True
    amounts = (total / 2).view(-1, 1, 1) * held
    big = held * (a1 + a2 + a3).view(-1, 1, 1)
    big[..., 3] = a4.view(-1, 1) * held[:, 3]
    return probabilities, torch.where(large.view(-1, 1, 1), big, amounts)


def masks_of(structure: Structure, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The best masks by magnitude for weights of a trained model."""
    return {
        name: structure.topk(weight.detach().abs().float(), structure.budget(weight.shape, 1.0))
        for name, weight in weights.items()
    }
