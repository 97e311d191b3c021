"""An optimizer's update and what keeps weights sparse, in one pass over memory."""

from sparselearn.kernels.masked_optimizer import reference
from sparselearn.kernels.masked_optimizer.optimizers import Target, fits, serves, step

__all__ = ["Target", "fits", "reference", "serves", "step"]
