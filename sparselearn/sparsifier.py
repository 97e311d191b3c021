"""Sparsifier: binds a model, a method and the masks, and is the only way into a training step.

An optimizer step is `before_step(optimizer)`, clipping if any, the optimizer's step, `after_step(optimizer)`. The
optimizer wrapper and the Lightning callback are thin callers of these two.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from sparselearn import checks, distributed, fused_update, latent, scaling, statistics
from sparselearn.criteria import Criterion, Layer, Tracker
from sparselearn.distributions import Distribution, erk
from sparselearn.errors import SparsityError
from sparselearn.masked_model import Init, MaskedModel
from sparselearn.methods.drop_grow import DropGrow
from sparselearn.methods.straight_through import StraightThrough
from sparselearn.selection import Select, Weight
from sparselearn.state import LayerState, pack, unpack


def _refuse(optimizer: Optimizer) -> None:
    if isinstance(optimizer, LBFGS | SparseAdam):
        raise SparsityError(
            f"{type(optimizer).__name__} is not supported: its state is not one tensor per weight (LBFGS flattens its "
            "history and evaluates the loss within the step; SparseAdam needs sparse gradients). Use SGD, Adam, AdamW "
            "or another optimizer with element-wise state."
        )


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite; waits for each device once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for t in map(distributed.local, tensors):
        if t.numel():  # a shard may be empty
            by_device.setdefault(t.device, []).append(t)
    norms = [torch.stack(torch._foreach_norm(group, torch.inf)) for group in by_device.values()]
    return all(bool(torch.isfinite(norm).all()) for norm in norms)


@dataclass
class _OpenStep:
    """What `before_step` leaves for `after_step`."""

    due: bool
    grads: dict[str, Tensor] | None = None  # dense gradients at an update step; None where not finite
    memory: dict[tuple[str, Tracker], Tensor] = field(default_factory=dict)  # trackers' values if the step is taken
    penalised: dict[str, Tensor] = field(default_factory=dict)  # gradients that have their penalty
    entered: bool = False  # whether the model holds dense weights
    groups: list[dict[str, Any]] | None = None  # the optimizer's own groups while it sees scaled ones


class Sparsifier(MaskedModel):
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
        self.density_scaling = density_scaling
        self._compared = False  # whether ranks have been seen to start from equal masks and clocks
        self.last_update: dict[str, float] = {}
        self._samples: dict[str, list[Any]] = {}  # what straight-through methods saw on the last sampled step
        super().__init__(
            model,
            method,
            sparsity=sparsity,
            distribution=distribution,
            select=select,
            exclude=exclude,
            overrides=overrides,
            seed=seed,
            support=support,
            initial=initial,
            init=init or ("density" if density_scaling else "keep"),
            state_dict=state_dict,
        )

    # ---- one step ----------------------------------------------------------------------------------------

    def layers_of(self, optimizer: Optimizer) -> dict[str, tuple[Weight, LayerState]]:
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
                layer.follow(weight.parameter.data)
        return found

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer holds any of the sparse weights."""
        return bool(self.layers_of(optimizer))

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
        layers = self.layers_of(optimizer)
        if not layers:
            return
        if not self._compared and distributed.active():  # different clocks would wait for each other for ever
            distributed.check_equal([pack(distributed.full(s.mask)) for s in self.state.layers.values()], self.step)
        self._compared = True
        self._check_resumed()
        first = next(iter(layers.values()))[1]
        due = self.method.due(first.step) or first.deferred
        opened: _OpenStep = self._open.setdefault(id(optimizer.state), _OpenStep(due))
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
            latent.enter([weight.parameter.data for weight, _ in layers.values()], [s for _, s in layers.values()])
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
        if distributed.any_rank(not _finite(grads.values()), next(iter(layers.values()))[1].mask.device):
            return None
        copy = not self.method.skip_step and self.method.optimizer_state != "keep"
        return {n: g.detach().clone() if copy else g.detach() for n, g in grads.items()}

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, *, stepped: bool = True, masked: Container[nn.Parameter] = ()) -> None:
        """After the optimizer's step, or instead of it: `stepped=False` where GradScaler skipped it.

        Zeroes inactive weights; at an update step chooses the new masks and zeroes grown weights and the optimizer
        state of all weights that moved. A step that did not happen leaves masks and clock as they were. The weights of
        `masked` are zero outside their masks already.
        """
        layers = self.layers_of(optimizer)
        if not layers:
            return
        opened: _OpenStep | None = self._open.pop(id(optimizer.state), None)
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
            if weight.parameter not in masked:
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
            for tracker in self._after_step:
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
            weights, states = [weight for weight, _ in layers.values()], [layer for _, layer in layers.values()]
            if opened.entered:
                data = [weight.parameter.data for weight in weights]
                latent.leave(data, states, lambda i: self._slots(optimizer, weights[i]))
            for layer in states:
                layer.step += 1
            self._track_step(layers, opened)
            first = next(iter(layers.values()))[1]
            if method.refresh(first.step):
                nnz = self._budgets(first.step)
                with checks.together():
                    for name, (weight, layer) in layers.items():
                        view = self._view(name, layer.dense, layer, None, self._slots(optimizer, weight))
                        changed = latent.refresh(method, layer, view, nnz[name])
                        for key, value in changed.items():
                            self._samples.setdefault(key, []).append((value, view.mask.numel()))
        if stepped or opened.entered:
            self._project([*layers])
        if self._samples and stepped:
            step = next(iter(layers.values()))[1].step - 1
            self.last_update, self._samples = {"step": step} | statistics.of_samples(self._samples), {}

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
        reset = method.optimizer_state == "reset" and sum(nnz.values()) > sum(s.nnz for _, s in layers.values())
        slots = {n: self._slots(optimizer, w) for n, (w, _) in layers.items()}
        done = fused_update.update(method, layers, grads, slots, nnz)
        rest = {n: s for n, (_, s) in layers.items() if n not in done.names}
        flow = statistics.gradient_norm({n: grads[n] for n in rest if n in grads}, rest, done.squares)
        counts: list[Tensor] = []  # per layer: grown now, grown before, survivors of these
        # With a ranking over all layers their views are needed at once; otherwise one at a time, which for sharded
        # weights bounds the memory.
        together = [list(rest)] if method.reallocate is not None else [[n] for n in rest]
        for names in together:
            views = [self._view(n, layers[n][0].parameter, rest[n], grads.get(n), slots[n]) for n in names]
            masks = method.new_masks(views, [nnz[n] for n in names], fixed=self._budget.overrides)
            for view, (mask, kept) in zip(views, masks, strict=True):
                mask = self._agreed(mask, view)
                earlier = view.memory["grown"]
                survivors = (earlier & mask).sum()
                stay = kept & mask if method.reinit else view.mask & mask
                counts.append(torch.stack([self._move([optimizer], view, mask, stay, reset), earlier.sum(), survivors]))
        seen = torch.stack([c.to(counts[0].device) for c in counts]).sum(0).tolist() if counts else [0, 0, 0]
        moved, before, survived = seen[0] + done.grown, seen[1] + done.earlier, seen[2] + done.survivors
        total = sum(s.nnz for _, s in layers.values())
        self.last_update = {"step": step, "grown": moved, "churn": moved / total, "gradient_norm": flow}
        if before:
            self.last_update["survival"] = survived / before

    @staticmethod
    def _agreed(mask: Tensor, view: Layer) -> Tensor:
        """Rank 0's mask on every rank."""
        if not distributed.active():
            return mask
        return unpack(distributed.from_rank_0(pack(mask), view.name, view.step), mask.shape)

    # ---- what a user looks at ------------------------------------------------------------------------------

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

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self._compared = False
