"""Sparse checkpoints: smaller, verified, loadable everywhere.

    save(model, "runs/a/sparse", masks=sparsifier)
    model.load_state_dict(load_state_dict("runs/a/sparse"))  # ordinary dense tensors

A checkpoint is a folder: safetensors files and a manifest, `sparselearn.json` (sparselearn.checkpoint.manifest has the
format, sparselearn.checkpoint.encodings how masks are stored). Nothing is ever unpickled.
"""

from sparselearn.checkpoint.api import inspect, iterate, load, load_masks, load_state_dict, save, verify
from sparselearn.checkpoint.manifest import Manifest, WeightInfo

__all__ = [
    "Manifest",
    "WeightInfo",
    "inspect",
    "iterate",
    "load",
    "load_masks",
    "load_state_dict",
    "save",
    "verify",
]
