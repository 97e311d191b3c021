"""Sparsifier: binds a model, a method and the masks, and is the only way into a training step.

An optimizer step is `before_step(optimizer)`, clipping if any, the optimizer's step, `after_step(optimizer)`. The
optimizer wrapper and the Lightning callback are thin callers of these two.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from sparselearn import distributed, scaling
from sparselearn.criteria import Layer
from sparselearn.distributions import Distribution, budgets, erk
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import DropGrow
from sparselearn.selection import Select, Weight, match_all, select_weights
from sparselearn.state import LayerState, SparseState, generator, pack, unpack

Init = Literal["keep", "density", "fan_in"]


def _refuse(optimizer: Optimizer) -> None:
    if isinstance(optimizer, LBFGS | SparseAdam):
        raise SparsityError(
            f"{type(optimizer).__name__} is not supported: its state is not one tensor per weight (LBFGS flattens its "
            "history and evaluates the loss within the step; SparseAdam needs sparse gradients). Use SGD, Adam, AdamW "
            "or another optimizer with element-wise state."
        )


@dataclass
class _OpenStep:
    """What `before_step` leaves for `after_step`."""

    due: bool
    grads: dict[str, Tensor] | None = None  # dense gradients at an update step; None where not finite
    groups: list[dict[str, Any]] | None = None  # the optimizer's own groups while it sees scaled ones


class Sparsifier:
    """A model whose selected weights are sparse, now and after every optimizer step.

    Building one draws the masks and zeroes the weights outside them. To resume, build it the same way and call
    `load_state_dict`, then load the model; or pass `state_dict` where the model is loaded already.

    Args:
        model: its parameters are changed in place; wrapping it (DDP, torch.compile) before or after is fine.
        method: `rigl(...)`, `set_(...)`, `static()`, `gmp(...)`, or a `DropGrow`.
        sparsity: fraction of zeros over the selected weights (without `overrides`), in [0, 1).
        distribution: per-layer densities from the global one; see sparselearn.distributions.
        select, exclude: which weights; see `selection.select_weights`.
        overrides: name pattern -> sparsity of those layers, which then leave the distribution's budget. 0 is dense.
        seed: of masks and random growth; equal seeds give equal masks on any device and number of ranks.
        support: density of a random fixed support, or masks by name, that active weights never leave.
        init: "keep" the initial weights, or rescale them by the layer's "density" or each neuron's "fan_in".
            Default: "density" with `density_scaling`, else "keep".
        density_scaling: learning rate and weight decay per layer by density, see sparselearn.scaling.
        state_dict: masks and clocks to go on from, for a model that holds the matching weights.

    Raises:
        SparsityError: a pattern without a match, a sparsity out of range, a budget that a layer cannot meet.

    >>> model = nn.Linear(100, 10)
    >>> from sparselearn import static
    >>> Sparsifier(model, static(), sparsity=0.9).nnz
    100
    """

    def __init__(
        self,
        model: nn.Module,
        method: DropGrow,
        *,
        sparsity: float | None = None,
        distribution: Distribution = erk,
        select: Select = None,
        exclude: Iterable[str] = (),
        overrides: Mapping[str, float] | None = None,
        seed: int = 0,
        support: float | Mapping[str, Tensor] | None = None,
        init: Init | None = None,
        density_scaling: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        distributed.refuse_unsupported(model)
        self.method = method
        self.distribution = distribution
        self.density_scaling = density_scaling
        init = init or ("density" if density_scaling else "keep")
        if init not in ("keep", "density", "fan_in"):
            raise SparsityError(f"`init` must be 'keep', 'density' or 'fan_in'; got {init!r}.")
        self._weights = {w.name: w for w in select_weights(model, select, exclude)}
        self._shapes = {name: w.parameter.shape for name, w in self._weights.items()}
        self._density = 1 - self._checked_sparsity(sparsity)
        self._override = {
            name: 1 - self._checked_sparsity(value)
            for pattern, value in reversed(list((overrides or {}).items()))
            for name in match_all("overrides", [pattern], self._weights)[pattern]
        }
        self._open: dict[int, _OpenStep] = {}  # by id(optimizer.state), which an optimizer shares with its wrappers
        self._listeners: list[Callable[[], None]] = []
        self._expected: dict[str, int] = {}  # nonzero weights at the save, until checked after a resume
        self._compared = False  # whether ranks have been seen to start from equal masks and clocks
        self.last_update: dict[str, float] = {}
        self.state = SparseState(seed)
        self._draw(support, init if state_dict is None else "keep", restore=state_dict is not None)
        if state_dict is not None:
            self.load_state_dict(state_dict)
            self._check_resumed()
            self.apply_masks()

    # ---- building ----------------------------------------------------------------------------------------

    def _checked_sparsity(self, sparsity: float | None) -> float:
        if sparsity is None:
            shape = next(iter(self._shapes.values()))
            if self.method.structure.unit(shape) == 0:
                return 0.0
            raise SparsityError("`sparsity` is required with this method: the fraction of zeros, in [0, 1).")
        if not 0 <= sparsity < 1:
            raise SparsityError(
                f"`sparsity` is the fraction of zeros and must lie in [0, 1); got {sparsity}. For 90 % write 0.9."
            )
        return sparsity

    def _budgets(self, step: int) -> dict[str, int]:
        """nnz of every layer at this step, by the distribution."""
        at = partial(self.method.density, step) if self.method.density is not None else lambda density: density
        free = {name: shape for name, shape in self._shapes.items() if name not in self._override}
        structure = self.method.structure
        most = None
        if self.method.grow is None and self.method.reallocate is None:
            most = {name: layer.nnz for name, layer in self.state.layers.items() if name in free}
        nnz = budgets(structure, free, self.distribution(free, at(self._density)), most) if free else {}
        for name, density in self._override.items():
            nnz[name] = structure.budget(self._shapes[name], at(density) if density < 1 else 1.0)
        for name, n in nnz.items():
            if not 0 < n <= self._shapes[name].numel():
                raise SparsityError(
                    f"`{name}` (shape {list(self._shapes[name])}) would have {n} active weights; every layer needs at "
                    "least one. Lower the sparsity, exclude the layer, or give it a sparsity in `overrides`."
                )
        return nnz

    @torch.no_grad()
    def _draw(self, support: float | Mapping[str, Tensor] | None, init: Init, restore: bool) -> None:
        nnz = self._budgets(0)
        supports = self._supports(support, nnz)
        for name, weight in self._weights.items():
            parameter = weight.parameter
            score = torch.rand(self._shapes[name], generator=generator(self.state.seed, 0, f"init/{name}"))
            if name in supports:
                score.masked_fill_(~supports[name].cpu(), -torch.inf)
            mask = self.method.structure.topk(score, nnz[name])
            self.method.structure.check(mask, nnz[name])
            layer = LayerState(distributed.place_like(mask, parameter), nnz[name])
            if name in supports:
                layer.support = distributed.place_like(supports[name], parameter)
            self.state.layers[name] = layer
            if not restore:
                scaling.rescale_initial(parameter.data, layer.mask, weight.fan_in_dims, init)
                distributed.local(parameter.data).masked_fill_(distributed.local(layer.inactive), 0)
            view = self._view(name, parameter, layer, None, {})
            layer.memory = {t.key: distributed.place_like(t.init(view), parameter) for t in self.method.trackers}

    def _supports(self, support: float | Mapping[str, Tensor] | None, nnz: dict[str, int]) -> dict[str, Tensor]:
        if support is None:
            return {}
        if isinstance(support, Mapping):
            if unknown := [name for name in support if name not in self._shapes]:
                raise SparsityError(f"`support` names `{unknown[0]}`, which is not a sparse weight of the model.")
            result = {name: mask.bool() for name, mask in support.items()}
        else:
            free = {name: shape for name, shape in self._shapes.items() if name not in self._override}
            result = {}
            for name, n in budgets(self.method.structure, free, self.distribution(free, support)).items():
                score = torch.rand(self._shapes[name], generator=generator(self.state.seed, 0, f"support/{name}"))
                result[name] = self.method.structure.topk(score, n)
        for name, mask in result.items():
            room = int(mask.sum())
            if mask.shape != self._shapes[name] or room < nnz[name]:
                raise SparsityError(
                    f"The support of `{name}` must have shape {list(self._shapes[name])} and room for {nnz[name]} "
                    f"active weights; it has shape {list(mask.shape)} and room for {room}. Use a denser support."
                )
        return result

    # ---- one step ----------------------------------------------------------------------------------------

    def _layers_of(self, optimizer: Optimizer) -> dict[str, tuple[Weight, LayerState]]:
        """The sparse layers that this optimizer trains, at one clock."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = {
            name: (weight, self.state.layers[name])
            for name, weight in self._weights.items()
            if id(weight.parameter) in held
        }
        if found:  # a parameter group added late takes over the clock
            clock = max(layer.step for _, layer in found.values())
            for weight, layer in found.values():
                layer.step = clock
                if layer.mask.device != weight.parameter.device or type(layer.mask) is not type(weight.parameter.data):
                    layer.move_like(weight.parameter.data)
        return found

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer holds any of the sparse weights."""
        return bool(self._layers_of(optimizer))

    def in_step(self, optimizer: Optimizer) -> bool:
        """Whether `before_step` has come and `after_step` has not."""
        return id(optimizer.state) in self._open

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raises where this optimizer trains none of the sparse weights, or is of a kind that cannot be masked."""
        _refuse(optimizer)
        if not self.trains(optimizer):
            raise SparsityError(
                "The optimizer trains none of the sparse weights. Give it the parameters of the model that the "
                f"sparsifier was built with (it holds `{next(iter(self._weights))}` and {len(self._weights) - 1} more)."
            )

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Between backward (gradients averaged over ranks and micro-batches, unscaled) and clipping.

        Masks the gradients in place. At an update step it keeps the dense ones for `after_step`, and, where the update
        takes the step's place, sets every gradient of the optimizer to None. Calling it again before the step is
        harmless: gradients of a new backward pass are noticed.
        """
        _refuse(optimizer)
        layers = self._layers_of(optimizer)
        if not layers:
            return
        if not self._compared and distributed.active():  # different clocks would wait for each other for ever
            distributed.check_equal([pack(distributed.full(s.mask)) for s in self.state.layers.values()], self.step)
        self._compared = True
        self._check_resumed()
        first = next(iter(layers.values()))[1]
        due = self.method.due(first.step) or first.deferred
        opened = self._open.setdefault(id(optimizer.state), _OpenStep(due))
        grads = {n: w.parameter.grad for n, (w, _) in layers.items() if w.parameter.grad is not None}
        if due and self._is_new(grads, layers, opened):
            opened.grads = self._dense_gradients(grads, layers)
        if due and opened.grads is not None and self.method.skip_step:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            return
        if self.method.optimizer_state != "keep":
            for name, grad in grads.items():
                distributed.local(grad).masked_fill_(distributed.local(layers[name][1].inactive), 0)
        if self.density_scaling and opened.groups is None:
            opened.groups = list(optimizer.param_groups)
            multipliers = {
                w.parameter: scaling.rate_multiplier(layer.nnz / layer.mask.numel()) for w, layer in layers.values()
            }
            optimizer.param_groups[:] = scaling.scaled_groups(optimizer, multipliers)

    def _is_new(
        self, grads: dict[str, Tensor], layers: dict[str, tuple[Weight, LayerState]], opened: _OpenStep
    ) -> bool:
        """Whether these gradients are of a backward pass that `before_step` has not seen."""
        if opened.grads is None or self.method.skip_step:
            return opened.grads is None or bool(grads)
        local = distributed.local
        dense = any(bool((local(g)[local(layers[n][1].inactive)] != 0).any()) for n, g in grads.items())
        return distributed.any_rank(dense, next(iter(layers.values()))[1].mask.device)

    def _dense_gradients(
        self, grads: dict[str, Tensor], layers: dict[str, tuple[Weight, LayerState]]
    ) -> dict[str, Tensor] | None:
        """The dense gradients for `after_step`; None where one is not finite. Copied if they are masked in place."""
        finite = all(bool(torch.isfinite(distributed.local(g)).all()) for g in grads.values())
        if distributed.any_rank(not finite, next(iter(layers.values()))[1].mask.device):
            return None
        copy = not self.method.skip_step and self.method.optimizer_state != "keep"
        return {n: g.detach().clone() if copy else g.detach() for n, g in grads.items()}

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, *, stepped: bool = True) -> None:
        """After the optimizer's step, or instead of it: `stepped=False` where GradScaler skipped it.

        Zeroes inactive weights; at an update step chooses the new masks and zeroes grown weights and the optimizer
        state of all weights that moved. A step that did not happen leaves masks and clock as they were.
        """
        layers = self._layers_of(optimizer)
        if not layers:
            return
        opened = self._open.pop(id(optimizer.state), None)
        if opened is None:
            raise SparsityError("`after_step` came without `before_step`. Call before_step between backward and step.")
        if opened.groups is not None:
            scaling.merge_groups(opened.groups, optimizer.param_groups)
            optimizer.param_groups[:] = opened.groups
        if not stepped:
            return
        for weight, layer in layers.values():
            distributed.local(weight.parameter.data).masked_fill_(distributed.local(layer.inactive), 0)
        for name, (weight, layer) in layers.items():
            for tracker in self.method.trackers:
                view = self._view(name, weight.parameter, layer, weight.parameter.grad, {})
                value = tracker.after_step(view, view.memory[tracker.key])
                if value is not view.memory[tracker.key]:
                    layer.memory[tracker.key] = distributed.place_like(value, weight.parameter.data)
        if opened.due and opened.grads is not None:
            self._update(optimizer, layers, opened.grads)
        for weight, layer in layers.values():
            if not layer.clean and self.method.optimizer_state != "keep":
                layer.clean = self._zero_state(optimizer, weight.parameter, layer.inactive) > 0
            layer.deferred = opened.due and opened.grads is None
            layer.step += 1
        if opened.due and opened.grads is not None:
            for listener in self._listeners:
                listener()

    def _view(
        self, name: str, weight: Tensor, layer: LayerState, grad: Tensor | None, state: Mapping[str, Tensor]
    ) -> Layer:
        full = distributed.full
        return Layer(
            name=name,
            weight=full(weight.detach()),
            grad=None if grad is None else full(grad),
            mask=full(layer.mask),
            optimizer_state={key: full(value) for key, value in state.items()},
            step=layer.step,
            generator=generator(self.state.seed, layer.step, name),
            memory={key: full(value) for key, value in layer.memory.items()},
            support=None if layer.support is None else full(layer.support),
        )

    def _update(
        self, optimizer: Optimizer, layers: dict[str, tuple[Weight, LayerState]], grads: dict[str, Tensor]
    ) -> None:
        """New masks for the layers of one optimizer, then weights and optimizer state to match."""
        layers = {n: (w, s) for n, (w, s) in layers.items() if w.parameter.requires_grad}
        if not layers:
            return
        step = next(iter(layers.values()))[1].step
        if distributed.active():
            distributed.check_equal([pack(distributed.full(s.mask)) for _, s in layers.values()], step)
        nnz = {n: s.nnz for n, (_, s) in layers.items()}
        if self.method.density is not None:
            nnz = {n: k for n, k in self._budgets(step).items() if n in layers}
        moved = 0
        # With a ranking over all layers their views are needed at once; otherwise one at a time, which for sharded
        # weights bounds the memory.
        together = [list(layers)] if self.method.reallocate is not None else [[n] for n in layers]
        for names in together:
            views = [
                self._view(n, layers[n][0].parameter, layers[n][1], grads.get(n), self._slots(optimizer, layers[n][0]))
                for n in names
            ]
            masks = self.method.new_masks(views, [nnz[n] for n in names])
            for view, mask in zip(views, masks, strict=True):
                moved += self._move(optimizer, *layers[view.name], view, mask)
        total = sum(s.nnz for _, s in layers.values())
        self.last_update = {"step": step, "grown": moved, "grown_fraction": moved / total}

    def _move(self, optimizer: Optimizer, weight: Weight, layer: LayerState, view: Layer, mask: Tensor) -> int:
        """Give one layer its new mask; returns how many weights were grown."""
        if distributed.active():
            agreed = distributed.from_rank_0(pack(mask), view.name, view.step)
            mask = unpack(agreed, mask.shape)
        nnz = int(mask.sum())
        grown = mask & ~view.mask
        parameter = weight.parameter
        if bool(grown.any()):
            values = self.method.grow_init(view).to(view.weight.dtype)
            placed = distributed.place_like(grown, parameter.data)
            local_values = distributed.local(distributed.place_like(values, parameter.data))
            local_weight = distributed.local(parameter.data)
            local_weight.copy_(torch.where(distributed.local(placed), local_values, local_weight))
        rose = nnz > layer.nnz
        stay = distributed.place_like(mask & view.mask, parameter.data)
        layer.set_mask(distributed.place_like(mask, parameter.data), nnz)
        distributed.local(parameter.data).masked_fill_(distributed.local(layer.inactive), 0)
        if self.method.optimizer_state != "keep":
            reset = self.method.optimizer_state == "reset" and rose
            self._zero_state(optimizer, parameter, torch.ones_like(stay) if reset else ~stay)
        for tracker in self.method.trackers:
            after = view._replace(mask=mask, weight=distributed.full(parameter.detach()))
            value = tracker.after_update(after, view.memory[tracker.key])
            layer.memory[tracker.key] = distributed.place_like(value, parameter.data)
        return int(grown.sum())

    @staticmethod
    def _slots(optimizer: Optimizer, weight: Weight) -> dict[str, Tensor]:
        """The optimizer's state that has one number per weight."""
        parameter = weight.parameter
        state = optimizer.state.get(parameter, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}

    @staticmethod
    def _zero_state(optimizer: Optimizer, parameter: Tensor, where: Tensor) -> int:
        """Zero weight-shaped optimizer state at these positions; returns how many tensors there were."""
        state = optimizer.state.get(parameter, {})
        slots = [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
        for slot in slots:
            distributed.local(slot).masked_fill_(distributed.local(where), 0)
        return len(slots)

    # ---- what a user looks at ------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps taken (of the optimizer that is furthest, where there are several)."""
        return max(layer.step for layer in self.state.layers.values())

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by name, bool, True = active. For reading."""
        return {name: layer.mask for name, layer in self.state.layers.items()}

    @property
    def densities(self) -> dict[str, float]:
        """nnz / size of every sparse layer."""
        return {name: layer.nnz / layer.mask.numel() for name, layer in self.state.layers.items()}

    @property
    def nnz(self) -> int:
        """Active weights in all sparse layers."""
        return sum(layer.nnz for layer in self.state.layers.values())

    @property
    def sparsity(self) -> float:
        """Fraction of inactive weights over all sparse layers."""
        return 1 - self.nnz / sum(shape.numel() for shape in self._shapes.values())

    def on_update(self, listener: Callable[[], None]) -> None:
        """Call this after every mask update (weight averages mask their copy there)."""
        self._listeners.append(listener)

    @torch.no_grad()
    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Zero inactive weights of the model, or of a copy of it (an EMA or SWA average)."""
        if model is None:
            for name, weight in self._weights.items():
                layer = self.state.layers[name]
                distributed.local(weight.parameter.data).masked_fill_(distributed.local(layer.inactive), 0)
            return
        named = {
            name.removeprefix("module."): p for name, p in model.named_parameters(remove_duplicate=False)
        }  # AveragedModel and DDP add "module."
        for name, layer in self.state.layers.items():
            if name not in named:
                raise SparsityError(f"`apply_masks` found no `{name}` in the model it was given: is it a copy of ours?")
            named[name].masked_fill_(layer.inactive.to(named[name].device), 0)

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: sparsity, nnz, and what the last update moved."""
        values = {"sparsity/sparsity": self.sparsity, "sparsity/nnz": float(self.nnz)}
        return values | {f"sparsity/{key}": value for key, value in self.last_update.items() if key != "step"}

    def summary(self) -> str:
        """A table: shape, density of the mask, nnz, and nonzero weights (fewer, just after growth at zero)."""
        rows = [("layer", "shape", "density", "nnz", "nonzero", "nonzero density")]
        nonzero_total, size_total = 0, 0
        for name, weight in self._weights.items():
            layer, shape = self.state.layers[name], self._shapes[name]
            n, nonzero = shape.numel(), int((distributed.full(weight.parameter.detach()) != 0).sum())
            nonzero_total, size_total = nonzero_total + nonzero, size_total + n
            dims = "x".join(map(str, shape))
            rows.append((name, dims, f"{layer.nnz / n:.4f}", f"{layer.nnz:,}", f"{nonzero:,}", f"{nonzero / n:.4f}"))
        rows.append(
            ("total", f"{size_total:,}", f"{self.nnz / size_total:.4f}", f"{self.nnz:,}", f"{nonzero_total:,}",
             f"{nonzero_total / size_total:.4f}")
        )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks (one bit per weight), counts, clocks and trackers; whole, on the CPU. A collective when sharded."""
        saved = self.state.state_dict()
        for name, weight in self._weights.items():
            saved["layers"][name]["nonzero"] = int((distributed.full(weight.parameter.detach()) != 0).sum())
        return saved

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state. The model's weights may be loaded before or after, but before the next step."""
        if self._open:
            raise SparsityError("`load_state_dict` came between `before_step` and `after_step`. Close the step first.")
        self.state.load_state_dict(dict(saved), {name: w.parameter.data for name, w in self._weights.items()})
        self._expected = {name: layer["nonzero"] for name, layer in saved["layers"].items()}
        self._compared = False

    def _check_resumed(self) -> None:
        """After a load: the weights must be those that the masks were saved with."""
        for name, expected in self._expected.items():
            mask, weight = self.state.layers[name].mask, self._weights[name].parameter.detach()
            seen = int(((distributed.full(weight) != 0) & distributed.full(mask)).sum())
            if seen < expected:
                raise SparsityError(
                    f"`{name}` has {seen} nonzero weights inside the mask that was loaded; {expected} were saved. The "
                    "model's weights are not those of the checkpoint: load them after building the Sparsifier, or "
                    "pass `state_dict=` when building it for a model that is loaded already."
                )
        self._expected = {}
