"""Methods of sparse training: pure update rules as frozen values, and the papers' methods as factories."""

from sparselearn.methods.drop_grow import Budget, DropGrow, global_ranking, gmp, rigl, set_, static
from sparselearn.methods.dynamic import (
    acdc,
    dsr,
    dst_ee,
    granet,
    harmonic,
    itop,
    mest,
    snfs,
    snfs_lite,
    static_reinit,
)
from sparselearn.methods.ensembles import g2gnet
from sparselearn.methods.n_m import (
    asp,
    cast,
    dense_then,
    mdgf,
    n_m_rigl,
    pretrain_24,
    s_ste,
    sdgf,
    sr_ste,
    ste,
    then_dense,
)
from sparselearn.methods.neurons import srigl
from sparselearn.methods.straight_through import StraightThrough, top_kast

__all__ = [
    "Budget",
    "DropGrow",
    "StraightThrough",
    "acdc",
    "asp",
    "cast",
    "dense_then",
    "dsr",
    "dst_ee",
    "g2gnet",
    "global_ranking",
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
    "sdgf",
    "set_",
    "snfs",
    "snfs_lite",
    "sr_ste",
    "srigl",
    "static",
    "static_reinit",
    "ste",
    "then_dense",
    "top_kast",
]
