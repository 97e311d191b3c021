"""Products with constant fan-in ("condensed") weights on a CPU: values [N, K] and indices [N, K] for N neurons.

`prepare` checks and lays out a layer; `linear` is the differentiable product; `reference` holds the plain formulas.
"""

from sparselearn.kernels.condensed import reference
from sparselearn.kernels.condensed.plan import Plan, linear, prepare

__all__ = ["Plan", "linear", "prepare", "reference"]
