"""Methods of sparse training: pure update rules as frozen values, and the papers' methods as factories."""

from sparselearn.methods.drop_grow import DropGrow, global_ranking, gmp, rigl, set_, static

__all__ = ["DropGrow", "global_ranking", "gmp", "rigl", "set_", "static"]
