"""SparseOptimizer: any optimizer, with sparse weights. The wrapper for hand-written loops."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparselearn.errors import SparsityError
from sparselearn.latent import SAMPLE
from sparselearn.methods.straight_through import StraightThrough, masked_decay
from sparselearn.release import ReleasedGradients
from sparselearn.sparsifier import Sparsifier
from sparselearn.state import LayerState

if TYPE_CHECKING:
    from sparselearn.kernels.masked_optimizer import Target

KEY = "sparsifier"


class FusedStep:
    """The sparse weights' part of a step in one pass over memory, where that gives the same numbers.

    Of the weights that `take` chooses the gradients are out of sight until `step` has used them, so that neither the
    engine masks them nor the base optimizer steps them. All others go the usual way.
    """

    def __init__(self, sparsifier: Sparsifier, optimizer: Optimizer) -> None:
        self.sparsifier, self.optimizer = sparsifier, optimizer
        self.targets: dict[nn.Parameter, Target] = {}

    @property
    def moves_dense(self) -> bool:
        """Whether dense weights behind the model's are stepped where they lie, so that no swap is needed."""
        return bool(self.targets) and isinstance(self.sparsifier.method, StraightThrough)

    def take(self) -> None:
        """Choose the weights of this step, and hide their gradients."""
        from sparselearn.kernels.masked_optimizer import fits

        layers = {w.parameter: layer for w, layer in self.sparsifier.layers_of(self.optimizer).values()}
        if not self._same(next(iter(layers.values()), None)):
            return
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        targets = {p: self._target(p, layer) for p, layer in layers.items() if p.grad is not None}
        fitting = {p: t for p, t in targets.items() if fits(self.optimizer, groups[p], p, t)}
        if len(fitting) < len(targets) and isinstance(self.sparsifier.method, StraightThrough):
            return  # the engine swaps the weights of all layers or of none
        self.targets = fitting
        for parameter in fitting:
            parameter.grad = None

    def _same(self, first: LayerState | None) -> bool:
        """Whether method, optimizer and moment leave nothing to do on this step but to update and to mask."""
        from sparselearn.kernels.masked_optimizer import serves

        sparsifier, method = self.sparsifier, self.sparsifier.method
        if first is None or not serves(self.optimizer):
            return False
        if any(hasattr(t, "on_gradient") for t in sparsifier.trackers) or sparsifier._after_step:
            return False  # they are shown gradients
        if not isinstance(method, StraightThrough):
            return method.optimizer_state != "keep" and not method.due(first.step) and not first.deferred
        if sparsifier.in_step(self.optimizer):  # `before_step` has put penalties into the gradients
            return False
        if method.gradient != "ste" or method.backward is not None or sparsifier.density_scaling:
            return False
        return isinstance(method.penalty, masked_decay | None) and first.step % SAMPLE != 0

    def _target(self, parameter: nn.Parameter, layer: LayerState) -> "Target":
        from sparselearn.kernels.masked_optimizer import Target

        method, grad = self.sparsifier.method, parameter.grad
        assert grad is not None
        if not isinstance(method, StraightThrough):
            return Target(parameter.data, grad, layer.mask, clean=layer.clean)
        rate = method.penalty.rate if isinstance(method.penalty, masked_decay) else 0.0
        return Target(layer.dense, grad, layer.mask, rate(layer.step) if callable(rate) else rate)

    def step(self) -> None:
        """After `before_step`, the optimizer's step of the other parameters and ours."""
        from sparselearn.kernels import masked_optimizer

        self.optimizer.step()
        if self.targets:
            masked_optimizer.step(self.optimizer, self.targets)

    def give_back(self) -> None:
        """Put the gradients where they were."""
        for parameter, target in self.targets.items():
            parameter.grad = target.grad
        self.targets = {}


class SparseOptimizer(Optimizer):
    """Wraps an optimizer so that every `step` keeps the model sparse.

    It is a torch Optimizer with the base optimizer's own `param_groups` and `state`: learning-rate schedulers,
    GradScaler and closures work on it as on the base. `state_dict` holds the base's and, under "sparsifier", the masks.

    In a loop that clips gradients, call `before_step()` first, so that masked gradients are what is clipped.

    Args:
        optimizer: SGD, Adam, AdamW or another one with element-wise state.
        sparsifier: of the model that it trains.
        release_gradients: keep only the active values of each gradient from the moment backward has made it, and step
            one layer at a time: less memory, same numbers. Dense gradients are all held at update steps alone. For one
            process, without gradient clipping or loss scaling; see `sparselearn.release`.
        fused: update and mask sparse weights and their optimizer state in one pass over memory, with the decay of
            SR-STE, where optimizer, method and step allow it (SGD, Adam and AdamW of torch itself, without hooks or
            AMSGrad; not on steps on which masks are chosen from gradients), see `sparselearn.kernels.masked_optimizer`.
            Other weights and steps go the usual way. Same numbers to one rounding of each operation; checkpoints are
            those of the usual way. Gradients are left unmasked. Needs triton; on a CPU it is for tests, and not
            faster. Off unless asked for: its kernel has not run on a GPU yet.

    Raises:
        SparsityError: the optimizer trains none of the sparse weights, or is of an unsupported kind; `fused` together
            with `release_gradients`.

    >>> import sparselearn as sl
    >>> model = torch.nn.Linear(20, 10)
    >>> sparsifier = sl.Sparsifier(model, sl.rigl(stop=75, every=10), sparsity=0.9)
    >>> optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    >>> model(torch.randn(4, 20)).sum().backward()
    >>> optimizer.step(); optimizer.zero_grad()
    >>> int((model.weight != 0).sum())
    20
    """

    def __init__(
        self, optimizer: Optimizer, sparsifier: Sparsifier, *, release_gradients: bool = False, fused: bool = False
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise SparsityError(f"`optimizer` must be a torch.optim.Optimizer; got {type(optimizer).__name__}.")
        if isinstance(optimizer, SparseOptimizer):
            raise SparsityError("`optimizer` is a SparseOptimizer already; wrap the base optimizer once.")
        if fused and release_gradients:
            raise SparsityError(
                "`fused` reads the dense gradients of sparse weights, which `release_gradients` frees. Leave one of "
                "the two out."
            )
        sparsifier.check_optimizer(optimizer)
        self.base, self.sparsifier = optimizer, sparsifier
        self._released = ReleasedGradients(sparsifier, optimizer) if release_gradients else None
        self._fused = FusedStep(sparsifier, optimizer) if fused else None
        groups, state = optimizer.param_groups, optimizer.state
        # Optimizer.__init__ sets up hooks and defaults. It also starts new groups and state, which reach the base
        # through the properties below; the base's own are put back.
        super().__init__([{"params": list(groups[0]["params"])}], optimizer.defaults)
        self.param_groups, self.state = groups, state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def before_step(self) -> None:
        """Mask the gradients now, before clipping. `step` does it itself where this was not called."""
        if self._released is not None:
            raise SparsityError(
                "`before_step()` is for clipping, and with `release_gradients` there are no gradients left to clip. "
                "Leave one of the two out."
            )
        self.sparsifier.before_step(self.base, swap=False)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; at an update step, new masks. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._released is not None:
            self._released.hide()
        if self._fused is None:
            self._step()
            return loss
        self._fused.take()
        try:
            self._step()
        finally:
            self._fused.give_back()
        return loss

    def _step(self) -> None:
        """The step between the engine's two phases."""
        swap = self._fused is None or not self._fused.moves_dense
        self.sparsifier.before_step(self.base, swap=swap)
        try:
            (self._released or self._fused or self.base).step()
        except BaseException:
            self.sparsifier.after_step(self.base, stepped=False)
            raise
        self.sparsifier.after_step(self.base, masked=self._fused.targets if self._fused else ())

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.sparsifier.in_step(self.base):  # GradScaler skipped the step that `before_step` opened
            self.sparsifier.after_step(self.base, stepped=False)
        if self._released is not None:
            self._released.clear()
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return {**self.base.state_dict(), KEY: self.sparsifier.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if KEY not in state_dict:
            raise SparsityError(
                f"The optimizer state has no `{KEY}`: it was saved by a plain optimizer, so its masks are not known. "
                "Load it into the base optimizer and the masks into the sparsifier."
            )
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        self.sparsifier.load_state_dict(state_dict[KEY])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"SparseOptimizer({self.base!r})"
