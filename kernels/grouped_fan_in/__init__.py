"""Linear layers in which V neighbouring neurons share their K inputs: values [G, V, K], indices [G, K].

`linear` is the differentiable product, `by_feature` a copy of its input that layers share, `dense` the weight written
out, `scores` the growth scores of groups; `reference` holds the plain formulas.
"""

from sparselearn.kernels.grouped_fan_in import reference
from sparselearn.kernels.grouped_fan_in.layout import by_input, is_by_feature
from sparselearn.kernels.grouped_fan_in.ops import GROUPS, by_feature, dense, linear, scores

__all__ = ["GROUPS", "by_feature", "by_input", "dense", "is_by_feature", "linear", "reference", "scores"]
