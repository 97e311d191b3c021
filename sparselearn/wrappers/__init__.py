"""Around training: pruning between runs, streams, nested networks, self-distillation. Used in a loop of your own."""

from sparselearn.wrappers.distillation import SelfDistillation
from sparselearn.wrappers.hypersparse import ARTController, HyperSparse
from sparselearn.wrappers.nested import NestedSubnets
from sparselearn.wrappers.one_shot import (
    activating_while_pruning,
    anytime_pruning,
    app_densities,
    global_masks,
    group_supports,
    random_search,
)

__all__ = [
    "ARTController",
    "HyperSparse",
    "NestedSubnets",
    "SelfDistillation",
    "activating_while_pruning",
    "anytime_pruning",
    "app_densities",
    "global_masks",
    "group_supports",
    "random_search",
]
