"""sparselearn: dynamic sparse training for PyTorch.

Weights are sparse from the first step to the last, with a fixed budget whose positions move.

    sparsifier = Sparsifier(model, rigl(stop=7500), sparsity=0.9)
    optimizer = SparseOptimizer(torch.optim.AdamW(model.parameters()), sparsifier)

`sparselearn.lightning.SparsityCallback` does the same for an unchanged LightningModule, `sparselearn train` for a
recipe.
"""

import importlib
from typing import Any

from sparselearn import criteria, distributions, schedules, structures
from sparselearn.criteria import Criterion, Layer, Tracker
from sparselearn.distributions import Distribution
from sparselearn.errors import SparsityError
from sparselearn.methods import (
    DropGrow,
    StraightThrough,
    acdc,
    asp,
    cast,
    dsr,
    dst_ee,
    g2gnet,
    gmp,
    granet,
    harmonic,
    itop,
    mdgf,
    mest,
    n_m_rigl,
    pretrain_24,
    rigl,
    s_ste,
    sdgf,
    set_,
    snfs,
    snfs_lite,
    sr_ste,
    srigl,
    static,
    static_reinit,
    ste,
    top_kast,
)
from sparselearn.optimizer import SparseOptimizer
from sparselearn.schedules import Schedule, UpdateSchedule, UpdateSteps, check_run, scale_schedule
from sparselearn.selection import split_projections
from sparselearn.sparsifier import Sparsifier
from sparselearn.state import SparseState
from sparselearn.structures import (
    NM,
    VNM,
    Block,
    ConstantFanIn,
    HierarchicalNM,
    Structure,
    TransposableNM,
    Unstructured,
)

__version__ = "0.1.0"

# Of sparselearn.checkpoint, which few programs need and which imports this package.
CHECKPOINT = ("export_dense", "export_onnx", "inspect", "load", "load_state_dict", "save", "verify")

__all__ = [
    "NM",
    "VNM",
    "Block",
    "ConstantFanIn",
    "Criterion",
    "Distribution",
    "DropGrow",
    "HierarchicalNM",
    "Layer",
    "Schedule",
    "SparseOptimizer",
    "SparseState",
    "Sparsifier",
    "SparsityError",
    "StraightThrough",
    "Structure",
    "Tracker",
    "TransposableNM",
    "Unstructured",
    "UpdateSchedule",
    "UpdateSteps",
    "acdc",
    "asp",
    "cast",
    "check_run",
    "criteria",
    "distributions",
    "dsr",
    "dst_ee",
    "g2gnet",
    "gmp",
    "granet",
    "harmonic",
    "itop",
    "mdgf",
    "mest",
    "n_m_rigl",
    "pretrain_24",
    "rigl",
    "s_ste",
    "scale_schedule",
    "schedules",
    "sdgf",
    "set_",
    "snfs",
    "snfs_lite",
    "split_projections",
    "sr_ste",
    "srigl",
    "static",
    "static_reinit",
    "ste",
    "structures",
    "top_kast",
]


def __getattr__(name: str) -> Any:
    if name in CHECKPOINT:
        return getattr(importlib.import_module("sparselearn.checkpoint"), name)
    raise AttributeError(f"module 'sparselearn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *CHECKPOINT})
