"""HyperSparse and ART: a regulariser that empties small weights, and the controller that decides when to prune."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparselearn.errors import SparsityError
from sparselearn.structures import count
from sparselearn.wrappers.one_shot import global_masks

CURVE = 0.6584789484624084  # artanh(1/√3): tanh bends most there


@dataclass(frozen=True)
class HyperSparse:
    """The HyperSparse regulariser's gradient (Glandorf et al., arXiv 2308.07163, eq. 4).

    With s = artanh(1/√3)/|w|_κ, |w|_κ the smallest magnitude that pruning to sparsity κ would keep:

        ∂R/∂w = sign(w)·s·sech²(s|w|)·(Σ|w| / Σtanh(s|w|))

    over all sparse weights as one vector. R itself is 0 always; only its gradient matters. Call `add_gradient` between
    backward and the optimizer's step (with GradScaler after `unscale_`). λ(t) = rate·growth^max(0, epoch - warm_up).

    >>> w = {"w": torch.tensor([0.1, -0.2, 0.4, 1.0])}
    >>> [round(x, 4) for x in HyperSparse(sparsity=0.5).gradient(w)["w"].tolist()]
    [1.3712, -1.2664, 0.9391, 0.1947]
    """

    sparsity: float
    rate: float = 5e-6
    growth: float = 1.05
    warm_up: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or self.rate < 0 or self.growth <= 0 or self.warm_up < 0:
            raise SparsityError(
                "`HyperSparse` needs a sparsity in [0, 1), rate >= 0, growth > 0 and warm_up >= 0 epochs; got "
                f"{self.sparsity}, {self.rate}, {self.growth} and {self.warm_up}."
            )

    def gradient(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """∂R/∂w of each weight."""
        magnitude = torch.cat([w.detach().reshape(-1).abs().double() for w in weights.values()])
        order = magnitude.numel() - count(self.sparsity, magnitude.numel())
        pivot = magnitude.kthvalue(min(order + 1, magnitude.numel())).values
        s = CURVE / pivot.clamp(min=torch.finfo(torch.float32).tiny)
        factor = s * magnitude.sum() / torch.tanh(s * magnitude).sum().clamp(min=torch.finfo(torch.float32).tiny)
        result = {}
        for name, weight in weights.items():
            w = weight.detach().double()
            result[name] = (w.sign() * factor / torch.cosh((s * w.abs()).clamp(max=350)).square()).to(weight.dtype)
        return result

    def strength(self, epoch: int) -> float:
        """λ in this epoch."""
        return self.rate * self.growth ** max(0, epoch - self.warm_up)

    @torch.no_grad()
    def add_gradient(self, weights: Mapping[str, nn.Parameter], epoch: int) -> None:
        """Add λ·∂R/∂w to the gradients in place."""
        for name, gradient in self.gradient(weights).items():
            grad = weights[name].grad
            if grad is None:
                raise SparsityError(f"HyperSparse found no gradient for `{name}`. Call it between backward and step.")
            grad.add_(gradient, alpha=self.strength(epoch))


@dataclass
class ARTController:
    """Adaptive regularised training (arXiv 2308.07163, Alg. 1): when to stop regularising and fix the mask.

    After every regularised epoch give the training accuracy of a copy pruned by `prune` and the masks. Their mean over
    `buffer` epochs is watched; once the best mean exceeds the dense model's training accuracy, `finished` is True and
    `masks` are those of the middle epoch of the best buffer. Then build `Sparsifier(model, static(), sparsity=0.0)`,
    which changes nothing yet, call its `set_masks(controller.masks)`, and fine-tune with a new optimizer.

    The weights that go on are those in the model; a copy of the masks' epoch is the caller's to keep.
    """

    dense_accuracy: float
    sparsity: float
    buffer: int = 3
    finished: bool = False
    best: float = -1.0
    masks: dict[str, Tensor] = field(default_factory=dict)
    recent: list[tuple[float, dict[str, Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or self.buffer < 1:
            raise SparsityError(
                f"`ARTController` needs a sparsity in [0, 1) and a buffer of at least one epoch; got {self.sparsity} "
                f"and {self.buffer}."
            )

    def prune(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Global magnitude masks at the sparsity."""
        size = sum(w.numel() for w in weights.values())
        return global_masks({n: w.abs() for n, w in weights.items()}, count(self.sparsity, size))

    def observe(self, accuracy: float, masks: dict[str, Tensor]) -> bool:
        """Take note of one epoch; returns `finished`."""
        self.recent = [*self.recent, (accuracy, masks)][-self.buffer :]
        if len(self.recent) == self.buffer:
            mean = sum(a for a, _ in self.recent) / self.buffer
            if mean > self.best:
                self.best, self.masks = mean, self.recent[self.buffer // 2][1]
            self.finished = self.best > self.dense_accuracy
        return self.finished
