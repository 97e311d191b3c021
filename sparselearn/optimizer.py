"""SparseOptimizer: any optimizer, with sparse weights. The wrapper for hand-written loops."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from sparselearn.errors import SparsityError
from sparselearn.release import ReleasedGradients
from sparselearn.sparsifier import Sparsifier

KEY = "sparsifier"


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

    Raises:
        SparsityError: the optimizer trains none of the sparse weights, or is of an unsupported kind.

    >>> import sparselearn as sl
    >>> model = torch.nn.Linear(20, 10)
    >>> sparsifier = sl.Sparsifier(model, sl.rigl(stop=75, every=10), sparsity=0.9)
    >>> optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    >>> model(torch.randn(4, 20)).sum().backward()
    >>> optimizer.step(); optimizer.zero_grad()
    >>> int((model.weight != 0).sum())
    20
    """

    def __init__(self, optimizer: Optimizer, sparsifier: Sparsifier, *, release_gradients: bool = False) -> None:
        if not isinstance(optimizer, Optimizer):
            raise SparsityError(f"`optimizer` must be a torch.optim.Optimizer; got {type(optimizer).__name__}.")
        if isinstance(optimizer, SparseOptimizer):
            raise SparsityError("`optimizer` is a SparseOptimizer already; wrap the base optimizer once.")
        sparsifier.check_optimizer(optimizer)
        self.base, self.sparsifier = optimizer, sparsifier
        self._released = ReleasedGradients(sparsifier, optimizer) if release_gradients else None
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
        self.sparsifier.before_step(self.base)
        try:
            (self._released or self.base).step()
        except BaseException:
            self.sparsifier.after_step(self.base, stepped=False)
            raise
        self.sparsifier.after_step(self.base)
        return loss

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
