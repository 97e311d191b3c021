"""What `save` and `load` refuse: one clear error each, and nothing changed."""

import builtins
import copy

import pytest
import torch
from test_checkpoint_files import equal, network, trained
from torch import nn

from sparselearn import SparsityError
from sparselearn.checkpoint import load, load_state_dict, save

pytest.importorskip("safetensors", reason="checkpoints need safetensors")


def refuse(tmp_path, match, model=None, **options):
    with pytest.raises(SparsityError, match=match):
        save(model or {"w": torch.zeros(2, 3), "b": torch.zeros(3)}, tmp_path / "out", **options)


def test_masks_that_do_not_fit(tmp_path):
    mask = torch.ones(2, 3, dtype=torch.bool)
    refuse(tmp_path, r"`masks` names `v`, which the model has not. Closest: `w`, `b`", masks={"v": mask})
    refuse(tmp_path, r"mask of `w` must be bool of shape \[2, 3\].*it is torch.float32", masks={"w": mask.float()})
    refuse(tmp_path, r"mask of `w` must be .*it is torch.bool of shape \[3, 2\]", masks={"w": mask.T})
    assert not (tmp_path / "out" / "sparselearn.json").exists()


@pytest.mark.parametrize("hidden", [1.0, -0.0, float("nan")])
def test_numbers_outside_of_the_mask_are_refused(tmp_path, hidden):
    weight = torch.tensor([[0.0, 1.0], [hidden, 0.0]])
    mask = torch.tensor([[False, True], [False, True]])
    match = (
        "`w` has 1 weights outside of its mask that are not \\+0 and would be lost. Zero them first with `sparsifier"
    )
    refuse(tmp_path, match, {"w": weight}, masks={"w": mask})
    save({"w": weight.masked_fill(~mask, 0)}, tmp_path, masks={"w": mask})


def test_encodings_that_do_not_fit(tmp_path):
    mask = torch.tensor([[True, True, True], [False, False, True]])
    refuse(tmp_path, "`encoding` must be one of dense, bitmask", masks={"w": mask}, encoding="zip")
    refuse(tmp_path, "`encoding` names `v`, which the model has not", masks={"w": mask}, encoding={"v": "csr"})
    refuse(tmp_path, "`encoding` names `b`, which has no mask", masks={"w": mask}, encoding={"b": "csr"})
    for kind in ("condensed", "packed_nm"):
        refuse(tmp_path, f"`w` cannot be stored as asked: .*'{kind}'", masks={"w": mask}, encoding=kind)


def test_tensors_that_cannot_be_stored(tmp_path):
    refuse(
        tmp_path, "`w` must be an ordinary .strided. tensor .* layout torch.sparse_coo", {"w": torch.eye(3).to_sparse()}
    )
    refuse(tmp_path, "`w` must be an ordinary", {"w": torch.empty(3, device="meta")})
    refuse(tmp_path, "`w` must be an ordinary .* it is int", {"w": 3})
    refuse(
        tmp_path, "`w` is torch.complex128; a checkpoint holds float64", {"w": torch.zeros(1, dtype=torch.complex128)}
    )
    mask = torch.ones(1, 2, dtype=torch.bool)
    state = {"w": torch.zeros(1, 2), "w#bits": torch.zeros(1)}
    mask[0, 0] = False
    refuse(tmp_path, "`w#bits`", state, masks={"w": mask}, encoding="bitmask")


def test_recipes_that_are_no_json(tmp_path):
    cycle = []
    cycle.append(cycle)
    for value in (float("nan"), {1, 2}, cycle, {1: "a", "1": "b"}):
        with pytest.raises(SparsityError):
            save(network(), tmp_path / "out", recipe=value)
    assert not (tmp_path / "out").exists()


def test_paths_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SparsityError, match="must be the folder of a checkpoint, new or old; it is a file"):
        save(network(), tmp_path / "file")
    with pytest.raises(SparsityError, match=r"there is no folder .* Create it first"):
        save(network(), tmp_path / "none" / "out")


def test_models_that_do_not_fit(tmp_path):
    model, sparsifier, _ = trained()
    save(model, tmp_path, masks=sparsifier)
    for other, match in (
        (nn.Sequential(*list(network())[:-1]), r"holds `4.weight`, which the model has not"),
        (nn.Sequential(*network(), nn.Linear(4, 4)), r"The model has `5.weight`, which"),
        (nn.Sequential(nn.Linear(20, 30), *list(network())[1:]), r"`0.weight` is torch.float32 of shape \[30, 20\]"),
        (network().bfloat16(), r"`0.weight` is torch.bfloat16 .* so that nothing is rounded"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(SparsityError, match=match):
            load(tmp_path, other)
        assert equal(other.state_dict(), before)


def test_ways_to_load_that_do_not_fit(tmp_path):
    model, sparsifier, _ = trained()
    save(model, tmp_path, masks=sparsifier)
    with pytest.raises(SparsityError, match="`as_` must be one of dense, masked, condensed, semi_structured; got 'x'"):
        load(tmp_path, model, "x")
    with pytest.raises(SparsityError, match="`sparsifier` goes with `as_='masked'`; got 'dense'"):
        load(tmp_path, model, sparsifier=sparsifier)
    save(model, tmp_path, masks={name: mask for name, mask in sparsifier.masks.items() if name != "3.weight"})
    with pytest.raises(SparsityError, match=r"`3.weight` is sparse in the sparsifier and has no mask in"):
        load(tmp_path, model, "masked", sparsifier=sparsifier)


def test_without_safetensors(tmp_path, monkeypatch):
    save(network(), tmp_path)
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for call in (lambda: save(network(), tmp_path), lambda: load_state_dict(tmp_path)):
        with pytest.raises(SparsityError, match=r"need the package `safetensors`.* Run `pip install safetensors`"):
            call()
