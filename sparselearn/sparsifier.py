"""Sparsifier: binds a model, a method and the masks, and is the only way into a training step.

An optimizer step is `before_step(optimizer)`, clipping if any, the optimizer's step, `after_step(optimizer)`. The
optimizer wrapper and the Lightning callback are thin callers of these two.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from sparselearn import distributed, first_masks, latent, scaling, statistics
from sparselearn.criteria import Criterion, Layer, Tracker, check_score, fired, grown
from sparselearn.distributions import Distribution, budgets, erk
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import DropGrow
from sparselearn.methods.straight_through import StraightThrough
from sparselearn.selection import Select, Weight, match_all, select_weights
from sparselearn.state import LayerState, SparseState, generator, pack, unpack
from sparselearn.structures import Structure

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
    memory: dict[tuple[str, Tracker], Tensor] = field(default_factory=dict)  # trackers' values if the step is taken
    penalised: dict[str, Tensor] = field(default_factory=dict)  # gradients that have their penalty
    entered: bool = False  # whether the model holds dense weights
    groups: list[dict[str, Any]] | None = None  # the optimizer's own groups while it sees scaled ones


class Sparsifier:
    """A model whose selected weights are sparse, now and after every optimizer step.

    Building one draws the masks and zeroes the weights outside them. To resume, build it the same way and call
    `load_state_dict`, then load the model; or pass `state_dict` where the model is loaded already.

    Args:
        model: its parameters are changed in place; wrapping it (DDP, torch.compile) before or after is fine.
        method: `rigl(...)`, `sr_ste(...)`, ...: a `DropGrow` or a `StraightThrough`.
        sparsity: fraction of zeros over the selected weights (without `overrides`), in [0, 1).
        distribution: per-layer densities from the global one; see sparselearn.distributions.
        select, exclude: which weights; see `selection.select_weights`.
        overrides: name pattern -> sparsity of those layers, which then leave the distribution's budget. 0 is dense.
        seed: of masks and random growth; equal seeds give equal masks on any device and number of ranks.
        support: density of a random fixed support, or masks by name, that active weights never leave.
        initial: score of the weights for the first masks, higher first: `criteria.magnitude` for a trained model. None
            draws at random. Straight-through methods choose by their own criterion.
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
        method: DropGrow | StraightThrough,
        *,
        sparsity: float | None = None,
        distribution: Distribution = erk,
        select: Select = None,
        exclude: Iterable[str] = (),
        overrides: Mapping[str, float] | None = None,
        seed: int = 0,
        support: float | Mapping[str, Tensor] | None = None,
        initial: Criterion | None = None,
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
        self._density = 1 - first_masks.required_sparsity(sparsity, method.structure, self._shapes)
        self._override = {
            name: 1 - first_masks.checked_sparsity(value)
            for pattern, value in reversed(list((overrides or {}).items()))
            for name in match_all("overrides", [pattern], self._weights)[pattern]
        }
        self._open: dict[int, _OpenStep] = {}  # by id(optimizer.state), which an optimizer shares with its wrappers
        self._listeners: dict[str, list[Callable[[], None]]] = {"before": [], "after": []}
        self._expected: dict[str, dict[str, int]] = {}  # nonzero weights at the save, until checked after a resume
        self._compared = False  # whether ranks have been seen to start from equal masks and clocks
        self.last_update: dict[str, float] = {}
        self._samples: dict[str, list[Any]] = {}  # what straight-through methods saw on the last sampled step
        self.state = SparseState(seed)
        self.trackers: tuple[Tracker, ...] = method.trackers
        if isinstance(method, DropGrow) and method.updates is not None:  # for the exploration rate
            self.trackers = tuple(dict.fromkeys((*method.trackers, fired(), grown())))
        self._draw(support, initial, init if state_dict is None else "keep", restore=state_dict is not None)
        self._observe()
        if state_dict is not None:
            self.load_state_dict(state_dict)
            if isinstance(method, StraightThrough):
                self._adopt()
            self._check_resumed()
            self.apply_masks()

    # ---- building ----------------------------------------------------------------------------------------

    def _budgets(self, step: int) -> dict[str, int]:
        """nnz of every layer at this step, by the distribution."""
        method = self.method
        structure = method.structure if isinstance(method, DropGrow) else method.structure_at(step)
        if structure is None:
            return {name: shape.numel() for name, shape in self._shapes.items()}
        at = partial(method.density, step) if method.density is not None else lambda density: density
        free = {name: shape for name, shape in self._shapes.items() if name not in self._override}
        most = None
        if isinstance(method, DropGrow) and method.grow is None and method.reallocate is None:
            most = {name: layer.nnz for name, layer in self.state.layers.items() if name in free}
        try:
            nnz = budgets(structure, free, self.distribution(free, at(self._density)), most) if free else {}
            for name, density in self._override.items():
                nnz[name] = structure.budget(self._shapes[name], at(density) if density < 1 else 1.0)
        except SparsityError as error:
            raise SparsityError(self._blame(structure, str(error))) from error
        first_masks.check_counts(nnz, self._shapes)
        return {name: nnz[name] for name in self._shapes}

    def _blame(self, structure: Structure, message: str) -> str:
        """The message with the name of the layer that the structure refused, if it was one."""
        for name, shape in self._shapes.items():
            try:
                structure.budget(shape, 1.0)
            except SparsityError as error:
                return f"`{name}`: {error} Or leave this layer out with `exclude`."
        return message

    @torch.no_grad()
    def _draw(
        self, support: float | Mapping[str, Tensor] | None, score: Criterion | None, init: Init, restore: bool
    ) -> None:
        nnz = self._budgets(0)
        within = first_masks.supports(
            support, self._shapes, self._override, nnz, self.method.structure, self.distribution, self.state.seed
        )
        for name, weight in self._weights.items():
            parameter, shape = weight.parameter, self._shapes[name]
            ones = torch.ones(shape, dtype=torch.bool, device=parameter.device)
            layer = LayerState(distributed.place_like(ones, parameter), nnz[name])
            if name in within:
                layer.support = distributed.place_like(within[name], parameter)
            self.state.layers[name] = layer
            if isinstance(self.method, StraightThrough):
                layer.dense = parameter.data.clone()
                self._remember(name, weight, layer)
                latent.refresh(self.method, layer, self._view(name, layer.dense, layer, None, {}), nnz[name])
                if not restore:
                    scaling.rescale_initial(layer.dense, layer.mask, weight.fan_in_dims, init)
                latent.project(self.method, parameter.data, self._view(name, layer.dense, layer, None, {}))
                continue
            mask = self._first_mask(name, weight, layer, nnz[name], score)
            layer.set_mask(distributed.place_like(mask, parameter), nnz[name])
            if not restore:
                scaling.rescale_initial(parameter.data, layer.mask, weight.fan_in_dims, init)
                distributed.local(parameter.data).masked_fill_(distributed.local(layer.inactive), 0)
            self._remember(name, weight, layer)

    def _first_mask(self, name: str, weight: Weight, layer: LayerState, nnz: int, score: Criterion | None) -> Tensor:
        structure = self.method.structure
        if score is None:
            support = None if layer.support is None else distributed.full(layer.support)
            values = first_masks.random_score(name, self._shapes[name], support, self.state.seed)
        else:
            view = self._view(name, weight.parameter, layer, weight.parameter.grad, {})
            values = check_score(score(view), view, "initial").float()
            if view.support is not None:
                values = values.masked_fill(~view.support, -torch.inf)
        mask = structure.topk(values, nnz)
        structure.check(mask, nnz)
        return mask

    def _remember(self, name: str, weight: Weight, layer: LayerState) -> None:
        """The first values of the trackers."""
        view = self._view(name, weight.parameter, layer, None, {})
        layer.memory = {t.key: distributed.place_like(t.init(view), weight.parameter) for t in self.trackers}

    def _observe(self) -> None:
        """Let trackers see the forward passes of the modules that own the weights."""
        for tracker in self.trackers:
            if not hasattr(tracker, "observe"):
                continue
            for name, weight in self._weights.items():
                weight.module.register_forward_hook(latent.Observer(tracker, self.state.layers[name]))

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
    def before_step(self, optimizer: Optimizer, *, swap: bool = True) -> None:
        """Between backward (gradients averaged over ranks and micro-batches, unscaled) and clipping.

        Masks the gradients in place. At an update step it keeps the dense ones for `after_step`, and, where the update
        takes the step's place, sets every gradient of the optimizer to None. Calling it again before the step is
        harmless: gradients of a new backward pass are noticed.

        With a straight-through method it adds the penalty and puts the dense weights into the model; swap=False leaves
        the latter (and a penalty due after clipping) to a second call right before the step.
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
        self._track_gradients(grads, layers, opened)
        if isinstance(self.method, StraightThrough):
            self._enter(optimizer, grads, layers, opened, swap)
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
        if self.density_scaling and swap and opened.groups is None:
            opened.groups = list(optimizer.param_groups)
            multipliers = {
                w.parameter: scaling.rate_multiplier(layer.nnz / layer.mask.numel()) for w, layer in layers.values()
            }
            optimizer.param_groups[:] = scaling.scaled_groups(optimizer, multipliers)

    def _track_gradients(
        self, grads: dict[str, Tensor], layers: dict[str, tuple[Weight, LayerState]], opened: _OpenStep
    ) -> None:
        """Show the dense gradients to the trackers that follow them; kept aside until the step is taken."""
        for tracker in self.trackers:
            if not hasattr(tracker, "on_gradient"):
                continue
            for name, grad in grads.items():
                if opened.penalised.get(name) is grad or not bool(torch.isfinite(distributed.local(grad)).all()):
                    continue
                weight, layer = layers[name]
                view = self._view(name, weight.parameter, layer, grad, {})
                value = tracker.on_gradient(view, view.memory[tracker.key])
                opened.memory[name, tracker] = distributed.place_like(value, weight.parameter.data)
        if not isinstance(self.method, StraightThrough):
            opened.penalised = dict(grads)

    def _enter(
        self, optimizer: Optimizer, grads: dict[str, Tensor], layers: dict[str, tuple[Weight, LayerState]],
        opened: _OpenStep, swap: bool,
    ) -> None:  # fmt: skip
        """Penalise each new gradient once, and put the dense weights into the model."""
        method = self.method
        assert isinstance(method, StraightThrough)
        last = swap and method.penalty_after_clip
        for name, grad in grads.items():
            weight, layer = layers[name]
            fresh = opened.penalised.get(name) is not grad
            if not fresh and not (last and not opened.entered):
                continue
            view = self._view(name, distributed.full(layer.dense), layer, grad, self._slots(optimizer, weight))
            if fresh and layer.step % latent.SAMPLE == 0:
                self._samples.setdefault("noise", []).append(statistics.noise(view.dense_grad(), view.mask))
            latent.adjust_gradient(
                method, layer, view, grad, fresh=fresh, penalty=last or not method.penalty_after_clip
            )
            opened.penalised[name] = grad
        if swap and not opened.entered:
            for weight, layer in layers.values():
                distributed.local(weight.parameter.data).copy_(distributed.local(layer.dense))
            opened.entered = True

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
        if isinstance(self.method, StraightThrough):
            self._leave(optimizer, layers, opened, stepped)
            return
        if not stepped:
            return
        for weight, layer in layers.values():
            distributed.local(weight.parameter.data).masked_fill_(distributed.local(layer.inactive), 0)
        self._track_step(layers, opened)
        update = opened.due and opened.grads is not None
        if update:
            self._tell("before")
            self._update(optimizer, layers, opened.grads or {})
        for weight, layer in layers.values():
            if not layer.clean and self.method.optimizer_state != "keep":
                layer.clean = self._zero_state(self._slots(optimizer, weight), layer.inactive) > 0
            layer.deferred = opened.due and opened.grads is None
            layer.step += 1
        if update:
            self._tell("after")

    def _track_step(self, layers: dict[str, tuple[Weight, LayerState]], opened: _OpenStep) -> None:
        """The trackers' values after a step that was taken."""
        for (name, tracker), value in opened.memory.items():
            layers[name][1].memory[tracker.key] = value
        for name, (weight, layer) in layers.items():
            for tracker in self.trackers:
                view = self._view(name, weight.parameter, layer, weight.parameter.grad, {})
                value = tracker.after_step(view, view.memory[tracker.key])
                if value is not view.memory[tracker.key]:
                    layer.memory[tracker.key] = distributed.place_like(value, weight.parameter.data)

    def _leave(
        self, optimizer: Optimizer, layers: dict[str, tuple[Weight, LayerState]], opened: _OpenStep, stepped: bool
    ) -> None:
        """Take the dense weights out of the model; after a step, choose the masks of the next one."""
        method = self.method
        assert isinstance(method, StraightThrough)
        if stepped:
            for weight, layer in layers.values():
                if opened.entered:
                    latent.leave(layer, weight.parameter.data, self._slots(optimizer, weight))
                layer.step += 1
            self._track_step(layers, opened)
            first = next(iter(layers.values()))[1]
            if method.refresh(first.step):
                nnz = self._budgets(first.step)
                for name, (weight, layer) in layers.items():
                    view = self._view(name, layer.dense, layer, None, self._slots(optimizer, weight))
                    changed = latent.refresh(method, layer, view, nnz[name])
                    for key, value in changed.items():
                        self._samples.setdefault(key, []).append((value, view.mask.numel()))
        if stepped or opened.entered:
            for name, (weight, layer) in layers.items():
                latent.project(method, weight.parameter.data, self._view(name, layer.dense, layer, None, {}))
        if self._samples and stepped:
            step = next(iter(layers.values()))[1].step - 1
            self.last_update, self._samples = {"step": step} | statistics.of_samples(self._samples), {}

    def _tell(self, when: str) -> None:
        for listener in self._listeners[when]:
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
        method = self.method
        assert isinstance(method, DropGrow)
        nnz = {n: s.nnz for n, (_, s) in layers.items()}
        if method.density is not None or method.ablation is not None:
            nnz = {n: k for n, k in self._budgets(step).items() if n in layers}
        for _, layer in layers.values():
            for tracker in self.trackers:
                if hasattr(tracker, "observe"):  # each rank has seen its own part of the batch
                    layer.memory[tracker.key] = distributed.mean(layer.memory[tracker.key])
        flow = statistics.gradient_norm(grads, {n: s for n, (_, s) in layers.items()})
        moved, before, survivors = 0, 0, 0
        # With a ranking over all layers their views are needed at once; otherwise one at a time, which for sharded
        # weights bounds the memory.
        together = [list(layers)] if method.reallocate is not None else [[n] for n in layers]
        for names in together:
            views = [
                self._view(n, layers[n][0].parameter, layers[n][1], grads.get(n), self._slots(optimizer, layers[n][0]))
                for n in names
            ]
            masks = method.new_masks(views, [nnz[n] for n in names])
            for view, (mask, kept) in zip(views, masks, strict=True):
                mask = self._agreed(mask, view)
                earlier = view.memory["grown"]
                before, survivors = before + int(earlier.sum()), survivors + int((earlier & mask).sum())
                stay = kept & mask if method.reinit else view.mask & mask
                moved += self._move([optimizer], view, mask, stay)
        total = sum(s.nnz for _, s in layers.values())
        self.last_update = {"step": step, "grown": moved, "churn": moved / total, "gradient_norm": flow}
        if before:
            self.last_update["survival"] = survivors / before

    @staticmethod
    def _agreed(mask: Tensor, view: Layer) -> Tensor:
        """Rank 0's mask on every rank."""
        if not distributed.active():
            return mask
        return unpack(distributed.from_rank_0(pack(mask), view.name, view.step), mask.shape)

    def _move(self, optimizers: Iterable[Optimizer], view: Layer, mask: Tensor, stay: Tensor) -> int:
        """Give one layer its new mask, of which the weights of `stay` keep value and optimizer state, the others start
        anew; returns how many those are."""
        weight, layer, method = self._weights[view.name], self.state.layers[view.name], self.method
        parameter, nnz, new = weight.parameter, int(mask.sum()), mask & ~stay
        if isinstance(method, DropGrow) and bool(new.any()):
            values = method.grow_init(view).to(view.weight.dtype)
            placed = distributed.place_like(new, parameter.data)
            local_values = distributed.local(distributed.place_like(values, parameter.data))
            local_weight = distributed.local(parameter.data)
            local_weight.copy_(torch.where(distributed.local(placed), local_values, local_weight))
        reset = method.optimizer_state == "reset" and nnz > layer.nnz
        placed_stay = distributed.place_like(stay, parameter.data)
        layer.set_mask(distributed.place_like(mask, parameter.data), nnz)
        distributed.local(parameter.data).masked_fill_(distributed.local(layer.inactive), 0)
        if method.optimizer_state != "keep":
            for optimizer in optimizers:
                self._zero_state(self._slots(optimizer, weight), torch.ones_like(stay) if reset else ~placed_stay)
        if "grown" in layer.memory:
            layer.memory["grown"] = distributed.place_like(new, parameter.data)
        for tracker in self.trackers:
            current = {key: distributed.full(value) for key, value in layer.memory.items()}
            after = view._replace(mask=mask, weight=distributed.full(parameter.detach()), memory=current)
            value = tracker.after_update(after, current[tracker.key])
            layer.memory[tracker.key] = distributed.place_like(value, parameter.data)
        return int(new.sum())

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor], *optimizers: Optimizer) -> None:
        """Impose masks (bool, by name; layers left out keep theirs), for outer loops such as iterative pruning.

        Weights that leave are zeroed; those that enter start at the method's `grow_init`. State of both is zeroed in
        the optimizers given. With straight-through methods the next refresh chooses anew.

        Raises:
            SparsityError: an unknown name, another shape, an empty mask; or a step is open.
        """
        if self._open:
            raise SparsityError("`set_masks` came between `before_step` and `after_step`. Close the step first.")
        for name, mask in masks.items():
            if name not in self._weights:
                raise SparsityError(f"`set_masks` names `{name}`, which is not a sparse weight of the model.")
            if mask.shape != self._shapes[name] or mask.dtype != torch.bool or not bool(mask.any()):
                raise SparsityError(
                    f"`set_masks` needs a bool mask of shape {list(self._shapes[name])} with at least one active "
                    f"weight for `{name}`; got {mask.dtype} of shape {list(mask.shape)} with {int(mask.sum())}."
                )
        for name, mask in masks.items():
            layer, parameter = self.state.layers[name], self._weights[name].parameter
            view = self._view(name, parameter, layer, parameter.grad, {})
            mask = mask.to(view.weight.device)
            self._move(optimizers, view, mask, mask & view.mask)
            if isinstance(self.method, StraightThrough):
                latent.project(self.method, parameter.data, self._view(name, layer.dense, layer, None, {}))
        self._tell("after")

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """The dense weights of a straight-through method in the model, to save them or to load others.

            with sparsifier.dense_weights():
                torch.save(model.state_dict(), "model.pt")

        What the model holds at the end becomes the dense weights. With other methods nothing changes.
        """
        if any(opened.entered for opened in self._open.values()):
            raise SparsityError("`dense_weights` came between `before_step` and `after_step`. Close the step first.")
        if isinstance(self.method, StraightThrough):
            for name, weight in self._weights.items():
                distributed.local(weight.parameter.data).copy_(distributed.local(self.state.layers[name].dense))
        try:
            yield
        finally:
            if isinstance(self.method, StraightThrough):
                self._adopt()

    def dense_state(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """The dense weights for those entries of a model's state dict that a straight-through method trains; empty with
        other methods. Sharded where the entry is, else whole and on its device."""
        dense = {name: layer.dense for name, layer in self.state.layers.items() if layer.dense.numel()}
        return {
            name: value.detach().clone()
            if isinstance(state_dict[name], DTensor)
            else distributed.full(value).detach().to(state_dict[name].device, copy=True)
            for name, value in dense.items()
            if name in state_dict
        }

    @torch.no_grad()
    def _adopt(self) -> None:
        """Take the model's weights for the dense ones, and project them."""
        assert isinstance(self.method, StraightThrough)
        for name, weight in self._weights.items():
            layer = self.state.layers[name]
            distributed.local(layer.dense).copy_(distributed.local(weight.parameter.data))
            latent.project(self.method, weight.parameter.data, self._view(name, layer.dense, layer, None, {}))

    @staticmethod
    def _slots(optimizer: Optimizer, weight: Weight) -> dict[str, Tensor]:
        """The optimizer's state that has one number per weight."""
        parameter = weight.parameter
        state = optimizer.state.get(parameter, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}

    @staticmethod
    def _zero_state(slots: Mapping[str, Tensor], where: Tensor) -> int:
        """Zero optimizer state at these positions; returns how many tensors there were."""
        for slot in slots.values():
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

    def on_update(self, listener: Callable[[], None], *, when: Literal["before", "after"] = "after") -> None:
        """Call this at every mask update: before it (the model is as the step left it) or after it."""
        self._listeners[when].append(listener)

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
        """Numbers for a logger, under "sparsity/": those of `statistics.of_masks`, and of the last update

        - drop and grow: `grown` weights, `churn` (grown / active), `survival` (the fraction of the weights grown at the
          update before that are still active), `gradient_norm` (of the active weights' gradient);
        - straight-through, on every 50th step: `flip_rate` (changed / all mask positions), `sad` (their number),
          `groups_changed` (fraction of groups of m), `gradient_noise` (norm of the gradient of inactive weights / of
          all).
        """
        values = statistics.of_masks(self.state.layers)
        values |= {key: float(value) for key, value in self.last_update.items() if key != "step"}
        return {f"sparsity/{key}": value for key, value in values.items()}

    def summary(self) -> str:
        """A table: shape, density of the mask, nnz, and nonzero weights (fewer, just after growth at zero)."""
        weights = self._weights
        return statistics.table(
            weights, self.state.layers, lambda name: distributed.full(weights[name].parameter.detach())
        )

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks (one bit per weight), counts, clocks and trackers; whole, on the CPU. A collective when sharded."""
        saved = self.state.state_dict()
        for name in self._weights:
            saved["layers"][name] |= self._nonzero(name)
        return saved

    def _nonzero(self, name: str) -> dict[str, int]:
        """Trained weights that are not zero, inside and outside of the mask."""
        layer = self.state.layers[name]
        trained = layer.dense if layer.dense.numel() else self._weights[name].parameter.detach()
        nonzero, mask = distributed.full(trained) != 0, distributed.full(layer.mask)
        return {"nonzero": int((nonzero & mask).sum()), "hidden": int((nonzero & ~mask).sum())}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state. The model's weights may be loaded before or after, but before the next step."""
        if self._open:
            raise SparsityError("`load_state_dict` came between `before_step` and `after_step`. Close the step first.")
        self.state.load_state_dict(dict(saved), {name: w.parameter.data for name, w in self._weights.items()})
        self._expected = {name: {k: row[k] for k in ("nonzero", "hidden")} for name, row in saved["layers"].items()}
        self._compared = False
        if isinstance(self.method, StraightThrough):
            for name, weight in self._weights.items():  # the masks are new, the dense weights are as they were
                layer = self.state.layers[name]
                latent.project(self.method, weight.parameter.data, self._view(name, layer.dense, layer, None, {}))

    def _check_resumed(self) -> None:
        """After a load: the weights must be those that the masks were saved with."""
        for name, expected in self._expected.items():
            seen = self._nonzero(name)
            if seen["nonzero"] < expected["nonzero"]:
                raise SparsityError(
                    f"`{name}` has {seen['nonzero']} nonzero weights inside the mask that was loaded; "
                    f"{expected['nonzero']} were saved. The model's weights are not those of the checkpoint: load them "
                    f"{self._how_to_load()}."
                )
            if isinstance(self.method, StraightThrough) and seen["hidden"] < expected["hidden"]:
                raise SparsityError(
                    f"`{name}` has {seen['hidden']} nonzero weights outside the mask that was loaded; "
                    f"{expected['hidden']} were saved. A straight-through method goes on from dense weights, and these "
                    f"were masked: save the model within `with sparsifier.dense_weights():`, and load it "
                    f"{self._how_to_load()}."
                )
        self._expected = {}

    def _how_to_load(self) -> str:
        if isinstance(self.method, StraightThrough):
            return "within `with sparsifier.dense_weights():`, or pass `state_dict=` for a model that is loaded already"
        return (
            "after building the Sparsifier, or pass `state_dict=` when building it for a model that is loaded already"
        )
