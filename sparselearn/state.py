"""SparseState: masks, counts and clocks of all layers, and their form on disk (one bit per weight)."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparselearn import distributed
from sparselearn.errors import SparsityError

VERSION = 1


def pack(mask: Tensor) -> Tensor:
    """Bool tensor -> uint8 tensor of ceil(n/8), on the mask's device; the first weight is the lowest bit."""
    bits = mask.reshape(-1).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits * powers).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`."""
    n = shape.numel()
    if packed.dtype != torch.uint8 or packed.numel() != (n + 7) // 8:
        raise SparsityError(
            f"A packed mask of shape {list(shape)} is {(n + 7) // 8} uint8; got {packed.numel()} {packed.dtype}."
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.view(-1, 1) >> shifts & 1).bool().view(-1)[:n].view(shape)


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """A CPU generator that depends on seed, step and layer name alone (never on rank, device or order)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass
class LayerState:
    """One layer's mask and counters. `mask` lies where the weight lies (device, memory format, shards)."""

    mask: Tensor
    nnz: int
    step: int = 0  # optimizer steps that this layer's optimizer has taken
    deferred: bool = False  # an update was due on a step with non-finite gradients, and waits
    support: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    dense: Tensor = field(default_factory=lambda: torch.empty(0))  # of straight-through methods; saved with the model
    clean: bool = False  # whether the optimizer state of inactive weights is known to be zero
    inactive: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.set_mask(self.mask, self.nnz)

    def set_mask(self, mask: Tensor, nnz: int) -> None:
        self.mask, self.nnz = mask, nnz
        self.inactive = ~mask  # kept, since masked_fill_ needs it on every step

    def follow(self, weight: Tensor) -> None:
        """Lie where the weight lies, if it was moved to another device or sharded."""
        if self.mask.device == weight.device and type(self.mask) is type(weight):
            return
        self.set_mask(distributed.place_like(self.mask, weight), self.nnz)
        if self.support is not None:
            self.support = distributed.place_like(self.support, weight)
        self.memory = {key: distributed.place_like(value, weight) for key, value in self.memory.items()}
        if self.dense.numel():
            self.dense = distributed.place_like(self.dense, weight)

    def state_dict(self) -> dict[str, Any]:
        def whole(t: Tensor) -> Tensor:
            t = distributed.full(t)
            return pack(t).cpu() if t.dtype == torch.bool else t.detach().cpu().clone()

        return {
            "shape": list(self.mask.shape),
            "mask": whole(self.mask),
            "nnz": self.nnz,
            "step": self.step,
            "deferred": self.deferred,
            "support": None if self.support is None else whole(self.support),
            "memory": {key: whole(value) for key, value in self.memory.items()},
        }

    def load_state_dict(self, name: str, saved: dict[str, Any], weight: Tensor) -> None:
        shape = torch.Size(saved["shape"])
        if shape != weight.shape:
            raise SparsityError(
                f"The saved mask of `{name}` has shape {list(shape)}; the model's weight has {list(weight.shape)}."
            )
        mask = unpack(saved["mask"], shape)
        if int(mask.sum()) != saved["nnz"]:
            raise SparsityError(
                f"The saved mask of `{name}` has {int(mask.sum())} active weights, but {saved['nnz']} were recorded. "
                "The file is damaged; take an earlier checkpoint."
            )
        if missing := self.memory.keys() ^ saved["memory"].keys():
            raise SparsityError(
                f"The checkpoint of `{name}` and the method differ in what criteria remember: {sorted(missing)}. "
                "Build the sparsifier with the method that was saved."
            )
        self.step, self.deferred, self.clean = saved["step"], saved["deferred"], False
        self.set_mask(distributed.place_like(mask, weight), saved["nnz"])
        if saved["support"] is not None:
            self.support = distributed.place_like(unpack(saved["support"], shape), weight)
        for key, value in saved["memory"].items():
            packed = self.memory[key].dtype == torch.bool
            self.memory[key] = distributed.place_like(unpack(value, shape) if packed else value, weight)


@dataclass
class SparseState:
    """The state of all layers, by name in the model's order."""

    seed: int
    layers: dict[str, LayerState] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and CPU tensors, whole (not sharded): loads on any number of devices."""
        layers = {name: layer.state_dict() for name, layer in self.layers.items()}
        return {"version": VERSION, "seed": self.seed, "layers": layers}

    def load_state_dict(self, saved: dict[str, Any], weights: dict[str, Tensor]) -> None:
        if saved.get("version") != VERSION:
            raise SparsityError(
                f"A sparsifier state of version {saved.get('version')} cannot be read (known: {VERSION})."
            )
        if missing := self.layers.keys() ^ saved["layers"].keys():
            name = sorted(missing)[0]
            where = "the checkpoint" if name in self.layers else "this sparsifier"
            raise SparsityError(
                f"`{name}` is not among the sparse weights of {where} ({len(missing)} names differ). "
                "Build the sparsifier with the same model, `select` and `exclude`."
            )
        self.seed = saved["seed"]
        for name, layer in self.layers.items():
            layer.load_state_dict(name, saved["layers"][name], weights[name])
