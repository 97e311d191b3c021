"""MaskedModel: a model whose selected weights have masks; what may be done to it between steps, and how it is saved."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparselearn import distributed, first_masks, latent, scaling, statistics
from sparselearn.criteria import Criterion, Layer, Tracker, check_score, fired, grown, tracker, zeros
from sparselearn.distributions import Distribution
from sparselearn.errors import SparsityError
from sparselearn.methods.drop_grow import DropGrow
from sparselearn.methods.straight_through import StraightThrough
from sparselearn.selection import Select, Weight, match_all, select_weights
from sparselearn.state import LayerState, SparseState, generator

Init = Literal["keep", "density", "fan_in"]


def _does(which: Tracker, hook: str) -> bool:
    """Whether a tracker has a hook of its own, and not that of the base class, which does nothing."""
    return getattr(type(which), hook) is not getattr(tracker, hook)


class MaskedModel:
    """The part of a `Sparsifier` that knows nothing of optimizer steps; see there."""

    method: DropGrow | StraightThrough

    def __init__(
        self,
        model: nn.Module,
        method: DropGrow | StraightThrough,
        *,
        sparsity: float | None,
        distribution: Distribution,
        select: Select,
        exclude: Iterable[str],
        overrides: Mapping[str, float] | None,
        seed: int,
        support: float | Mapping[str, Tensor] | None,
        initial: Criterion | None,
        init: Init,
        state_dict: Mapping[str, Any] | None,
    ) -> None:
        distributed.refuse_unsupported(model)
        if init not in ("keep", "density", "fan_in"):
            raise SparsityError(f"`init` must be 'keep', 'density' or 'fan_in'; got {init!r}.")
        self.model = model
        self.method = method
        self._weights = {w.name: w for w in select_weights(model, select, exclude)}
        self._shapes = {name: w.parameter.shape for name, w in self._weights.items()}
        match_all("protect", getattr(getattr(method, "ablation", None), "protect", ()), self._weights)
        density = 1 - first_masks.required_sparsity(sparsity, method.structure, self._shapes)
        outside = first_masks.overridden(overrides, self._weights)
        self._budget = first_masks.Budgets(self._shapes, distribution, density, outside)
        self._open: dict[int, Any] = {}  # steps begun, by id(optimizer.state), which an optimizer shares with wrappers
        self._room: dict[str, int] = {}  # size of the support, where there is one
        self._listeners: dict[str, list[Callable[[], None]]] = {"before": [], "after": []}
        self._expected: dict[str, dict[str, int]] = {}  # nonzero weights at the save, until checked after a resume
        self.state = SparseState(seed)
        self.trackers: tuple[Tracker, ...] = method.trackers
        if isinstance(method, DropGrow) and method.updates is not None:  # for the exploration rate
            self.trackers = tuple(dict.fromkeys((*method.trackers, fired(), grown())))
        self._after_step = [t for t in self.trackers if _does(t, "after_step")]
        self._after_update = [t for t in self.trackers if _does(t, "after_update")]
        self._draw(support, initial, init if state_dict is None else "keep", restore=state_dict is not None)
        self._observe()
        if state_dict is not None:
            self.load_state_dict(state_dict)
            self._check_resumed()
            if isinstance(method, DropGrow):  # a straight-through method has projected its weights
                self.apply_masks()

    # ---- building ----------------------------------------------------------------------------------------

    def _budgets(self, step: int) -> dict[str, int]:
        """nnz of every layer at this step."""
        method = self.method
        if isinstance(method, StraightThrough):
            return self._within(self._budget(method.structure_at(step), method.density, step))
        only_prunes = method.grow is None and method.reallocate is None and self.state.layers
        most = {name: layer.nnz for name, layer in self.state.layers.items()} if only_prunes else None
        return self._within(self._budget(method.structure, method.density, step, most))

    def _within(self, nnz: dict[str, int]) -> dict[str, int]:
        """At most the support's size, which bounds a method's denser phases."""
        return {name: min(n, self._room.get(name, n)) for name, n in nnz.items()}

    @torch.no_grad()
    def _draw(
        self, support: float | Mapping[str, Tensor] | None, score: Criterion | None, init: Init, restore: bool
    ) -> None:
        final = self._budget(self.method.structure, None, 0)
        within = self._budget.supports(support, final, self.method.structure, self.state.seed)
        self._room = {name: int(mask.sum()) for name, mask in within.items()}
        nnz = self._budgets(0)
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
                self._project([name])
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
            mask = structure.first(values, nnz)
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
        for one in self.trackers:
            if not hasattr(one, "observe"):
                continue
            for name, weight in self._weights.items():
                weight.module.register_forward_hook(latent.Observer(one, self.state.layers[name]))

    def _layer(self, name: str) -> LayerState:
        """The state of one layer, which follows the weight to another device, memory format or shards."""
        layer = self.state.layers[name]
        layer.follow(self._weights[name].parameter.data)
        return layer

    def _layers(self) -> Iterator[tuple[str, Weight, LayerState]]:
        """Every sparse layer."""
        for name, weight in self._weights.items():
            yield name, weight, self._layer(name)

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

    def _project(self, names: Sequence[str]) -> None:
        """Put the forward weights of a straight-through method into the model."""
        assert isinstance(self.method, StraightThrough)
        layers = [self.state.layers[name] for name in names]
        weights = [self._weights[name].parameter.data for name in names]
        latent.project(
            self.method, weights, layers, lambda i: self._view(names[i], layers[i].dense, layers[i], None, {})
        )

    # ---- changing masks and weights -----------------------------------------------------------------------

    def _move(
        self, optimizers: Iterable[Optimizer], view: Layer, mask: Tensor, stay: Tensor, reset: bool = False
    ) -> Tensor:
        """Give one layer its new mask, of which the weights of `stay` keep value and optimizer state, the others start
        anew; returns how many those are. `reset` clears the optimizer state of all."""
        weight, layer, method = self._weights[view.name], self.state.layers[view.name], self.method
        data, nnz, new = weight.parameter.data, int(mask.sum()), mask & ~stay
        local, placed = distributed.local(data), distributed.place_like(new, data)
        if isinstance(method, DropGrow) and method.grow_init is not zeros:
            values = distributed.local(distributed.place_like(method.grow_init(view).to(view.weight.dtype), data))
            local.copy_(torch.where(distributed.local(placed), values, local))
        elif isinstance(method, DropGrow):
            local.masked_fill_(distributed.local(placed), 0)
        placed_stay = distributed.place_like(stay, data)
        layer.set_mask(distributed.place_like(mask, data), nnz)
        local.masked_fill_(distributed.local(layer.inactive), 0)
        if method.optimizer_state != "keep":
            for optimizer in optimizers:
                self._zero_state(self._slots(optimizer, weight), torch.ones_like(stay) if reset else ~placed_stay)
        if "grown" in layer.memory:
            layer.memory["grown"] = placed
        for one in self._after_update:
            current = {key: distributed.full(value) for key, value in layer.memory.items()}
            after = view._replace(mask=mask, weight=distributed.full(data), memory=current)
            value = one.after_update(after, current[one.key])
            layer.memory[one.key] = distributed.place_like(value, data)
        return new.sum()

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor], *optimizers: Optimizer) -> None:
        """Impose masks (bool, by name; layers left out keep theirs), for outer loops such as iterative pruning.

        Weights that leave are zeroed; those that enter start at the method's `grow_init`. State of both is zeroed in
        the optimizers given. With straight-through methods the next refresh chooses anew.

        Raises:
            SparsityError: an unknown name, another shape, an empty mask; or a step is open.
        """
        self._require_closed("set_masks")
        for name, mask in masks.items():
            if name not in self._weights:
                raise SparsityError(f"`set_masks` names `{name}`, which is not a sparse weight of the model.")
            if mask.shape != self._shapes[name] or mask.dtype != torch.bool or not bool(mask.any()):
                raise SparsityError(
                    f"`set_masks` needs a bool mask of shape {list(self._shapes[name])} with at least one active "
                    f"weight for `{name}`; got {mask.dtype} of shape {list(mask.shape)} with {int(mask.sum())}."
                )
        for name, mask in masks.items():
            layer, parameter = self._layer(name), self._weights[name].parameter
            view = self._view(name, parameter, layer, parameter.grad, {})
            mask = mask.to(view.weight.device, copy=True)
            self._move(optimizers, view, mask, mask & view.mask)
            if isinstance(self.method, StraightThrough):
                self._project([name])
        self._tell("after")

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """The dense weights of a straight-through method in the model, to save them or to load others.

            with sparsifier.dense_weights():
                torch.save(model.state_dict(), "model.pt")

        What the model holds at the end becomes the dense weights. With other methods nothing changes.
        """
        self._require_closed("dense_weights")
        if isinstance(self.method, StraightThrough):
            for _, weight, layer in self._layers():
                distributed.local(weight.parameter.data).copy_(distributed.local(layer.dense))
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
            if distributed.sharded(state_dict[name])
            else distributed.full(value).detach().to(state_dict[name].device, copy=True)
            for name, value in dense.items()
            if name in state_dict
        }

    @torch.no_grad()
    def _adopt(self) -> None:
        """Take the model's weights for the dense ones, and project them."""
        assert isinstance(self.method, StraightThrough)
        for name, weight, layer in self._layers():
            distributed.local(layer.dense).copy_(distributed.local(weight.parameter.data))
            self._project([name])

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
        return {name: layer.mask for name, _, layer in self._layers()}

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

    def _tell(self, when: str) -> None:
        for listener in self._listeners[when]:
            listener()

    def _require_closed(self, call: str) -> None:
        if self._open:
            raise SparsityError(f"`{call}` came between `before_step` and `after_step`. Close the step first.")

    @torch.no_grad()
    def apply_masks(self, model: nn.Module | None = None) -> None:
        """Zero inactive weights of the model, or of a copy of it (an EMA or SWA average)."""
        if model is None:
            for _, weight, layer in self._layers():
                distributed.local(weight.parameter.data).masked_fill_(distributed.local(layer.inactive), 0)
            return
        named = {
            name.removeprefix("module."): p for name, p in model.named_parameters(remove_duplicate=False)
        }  # AveragedModel and DDP add "module."
        for name, layer in self.state.layers.items():
            if name not in named:
                raise SparsityError(f"`apply_masks` found no `{name}` in the model it was given: is it a copy of ours?")
            named[name].masked_fill_(layer.inactive.to(named[name].device), 0)

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
        layer = self._layer(name)
        trained = layer.dense if layer.dense.numel() else self._weights[name].parameter.detach()
        nonzero, mask = distributed.full(trained) != 0, distributed.full(layer.mask)
        return {"nonzero": int((nonzero & mask).sum()), "hidden": int((nonzero & ~mask).sum())}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state. The model's weights may be loaded before or after, but before the next step."""
        self._require_closed("load_state_dict")
        self.state.load_state_dict(dict(saved), {name: w.parameter.data for name, w in self._weights.items()})
        self._expected = {name: {k: row[k] for k in ("nonzero", "hidden")} for name, row in saved["layers"].items()}
        if isinstance(self.method, StraightThrough):
            self._project([name for name, *_ in self._layers()])  # new masks, the dense weights are as they were

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
