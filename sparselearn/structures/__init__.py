"""Structures: which masks are allowed, how many weights a density is, and the best mask for a score."""

from sparselearn.structures.base import Structure, Unstructured, count, top_indices
from sparselearn.structures.block import Block
from sparselearn.structures.fan_in import ConstantFanIn, rows
from sparselearn.structures.nm import NM, VNM, HierarchicalNM
from sparselearn.structures.transposable import TransposableNM

__all__ = [
    "NM",
    "VNM",
    "Block",
    "ConstantFanIn",
    "HierarchicalNM",
    "Structure",
    "TransposableNM",
    "Unstructured",
    "count",
    "rows",
    "top_indices",
]
