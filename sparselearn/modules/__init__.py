"""Sparse modules: layers that hold only their active weights, and the conversion of a trained model to them and back.

report = convert(model, sparsifier, example)  # swaps each layer that is faster in condensed form
print(report)
"""

from sparselearn.modules.ablation import remove_ablated, shrink
from sparselearn.modules.base import SparseModule
from sparselearn.modules.condensed import CondensedConv2d, CondensedLinear
from sparselearn.modules.convert import convert, revert
from sparselearn.modules.grouped import GroupedFanInLinear, measure_layers
from sparselearn.modules.report import ConversionReport
from sparselearn.modules.semi_structured import SemiStructuredLinear
from sparselearn.modules.siblings import CsrLinear, MaskedDenseLinear
from sparselearn.modules.update import captured, rewire, update_condensed

__all__ = [
    "CondensedConv2d",
    "CondensedLinear",
    "ConversionReport",
    "CsrLinear",
    "GroupedFanInLinear",
    "MaskedDenseLinear",
    "SemiStructuredLinear",
    "SparseModule",
    "captured",
    "convert",
    "measure_layers",
    "remove_ablated",
    "revert",
    "rewire",
    "shrink",
    "update_condensed",
]
