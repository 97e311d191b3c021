"""Outer loops around training: pruning between runs, streams, nested networks. Each is used in a loop of your own."""

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
    "activating_while_pruning",
    "anytime_pruning",
    "app_densities",
    "global_masks",
    "group_supports",
    "random_search",
]
