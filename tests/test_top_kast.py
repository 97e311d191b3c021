"""Top-KAST's sets, steps and penalty worked by hand; and when straight-through masks are renewed."""

import pytest
import torch
from method_list import OneLayer, active, build, hard, train

import sparselearn as sl

KAST = [4.0, -3.0, 2.0, 1.0, 0.95, 0.4, 0.3, 0.2]


def kast(**options):
    options = {"exploration": 0.25, "penalty": 0.01} | options
    return OneLayer(KAST, sl.top_kast(**options), lr=0.1, momentum=0.9, sparsity=0.75)


def test_top_kast_moves_the_backward_set_and_pulls_harder_outside_of_the_forward_set():
    """A = {0, 1}, B = {0, 1, 2, 3}; g = 1 everywhere. On A: w - .1·(1 + 2·.01·w), on B∖A: w - .1·(1 + 2·.01·w/.25)."""
    layer = kast()
    assert layer.weight == [4, -3, 0, 0, 0, 0, 0, 0]
    assert active(layer.state.memory["backward"]) == [0, 1, 2, 3]
    assert layer.step([1.0] * 8) == [0, 1]
    dense = [3.892, -3.094, 1.884, 0.892, 0.95, 0.4, 0.3, 0.2]
    assert layer.state.dense.flatten().tolist() == pytest.approx(dense)
    assert layer.weight == pytest.approx([3.892, -3.094, 0, 0, 0, 0, 0, 0])
    assert layer.momentum == pytest.approx([1.08, 0.94, 1.16, 1.08, 0, 0, 0, 0])
    # .892 fell below .95: weight 4 takes the place of 3 in B, with fresh state; 3 stays as it is, and loses its own
    assert active(layer.state.memory["backward"]) == [0, 1, 2, 4]
    layer.step([1.0] * 8)
    fresh = 1 + 2 * 0.01 * 0.95 / 0.25
    assert layer.state.dense.flatten().tolist()[3:] == pytest.approx([0.892, 0.95 - 0.1 * fresh, 0.4, 0.3, 0.2])
    assert layer.momentum[3:] == pytest.approx([0, fresh, 0, 0, 0])


def test_top_kast_swaps_the_forward_set_when_an_explored_weight_outgrows_it():
    layer = kast(penalty=0.0)
    g = [0.0, 0, -20, 0, 0, 0, 0, 0]  # 2 -> 4 > 3
    assert layer.step(g) == [0, 2]
    assert layer.weight == pytest.approx([4, 0, 4, 0, 0, 0, 0, 0])


def test_top_kast_stops_exploring_on_its_step_even_between_refreshes():
    layer = kast(every=4, stop_exploration=2)
    sizes = []
    for _ in range(4):
        sizes.append(int(layer.state.memory["backward"].sum()))
        layer.step([0.1] * 8)
    assert sizes == [4, 4, 2, 2]


def test_straight_through_masks_are_renewed_on_their_steps_alone():
    """The best half of four weights is the first pair after odd steps and the second after even ones."""
    layer = OneLayer([2.0, 2, 1, 1], sl.ste(sl.NM(2, 4), every=3, stop=8), sparsity=None, lr=1.0)
    first, second, masks = [2.0, 2, -2, -2], [-2.0, -2, 2, 2], []
    for t in range(11):
        masks.append(layer.step(first if t % 2 == 0 else second))
    # masks[t] is that of step t + 1: new ones for steps 3 and 6; 9 is past the stop
    assert masks == [[0, 1]] * 2 + [[2, 3]] * 3 + [[0, 1]] * 6
    method = sl.ste(sl.NM(2, 4), every=3, stop=8)
    assert [t for t in range(12) if method.refresh(t)] == [0, 3, 6]


def test_decoupled_weight_decay_does_not_move_what_top_kast_freezes():
    model, sparsifier, optimizer = build(hard(sl.top_kast(exploration=0.1, every=99)), "adamw-fused")
    dense = {n: layer.dense.clone() for n, layer in sparsifier.state.layers.items()}
    train(model, optimizer, 0, 4)
    for name, layer in sparsifier.state.layers.items():
        frozen = ~layer.memory["backward"]
        assert torch.equal(layer.dense[frozen], dense[name][frozen])
        assert not torch.equal(layer.dense, dense[name])
