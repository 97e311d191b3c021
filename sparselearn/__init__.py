"""sparselearn: dynamic sparse training for PyTorch.

Weights are sparse from the first step to the last, with a fixed budget whose positions move.

    sparsifier = Sparsifier(model, rigl(stop=7500), sparsity=0.9)
    optimizer = SparseOptimizer(torch.optim.AdamW(model.parameters()), sparsifier)

`sparselearn.lightning.SparsityCallback` does the same for an unchanged LightningModule, `sparselearn train` for a
recipe.
"""

from sparselearn import criteria, distributions, schedules, structures
from sparselearn.criteria import Criterion, Layer, Tracker
from sparselearn.distributions import Distribution
from sparselearn.errors import SparsityError
from sparselearn.methods import DropGrow, gmp, rigl, set_, static
from sparselearn.optimizer import SparseOptimizer
from sparselearn.schedules import Schedule, UpdateSchedule
from sparselearn.sparsifier import Sparsifier
from sparselearn.state import SparseState
from sparselearn.structures import Structure, Unstructured

__version__ = "0.1.0"

__all__ = [
    "Criterion",
    "Distribution",
    "DropGrow",
    "Layer",
    "Schedule",
    "SparseOptimizer",
    "SparseState",
    "Sparsifier",
    "SparsityError",
    "Structure",
    "Tracker",
    "Unstructured",
    "UpdateSchedule",
    "criteria",
    "distributions",
    "gmp",
    "rigl",
    "schedules",
    "set_",
    "static",
    "structures",
]
