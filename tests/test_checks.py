"""Checks that are read together say the same as those that are read one by one, with one wait in a step."""

import pytest
import torch
from torch import nn
from torch.profiler import profile

import sparselearn as sl
from sparselearn import checks
from sparselearn.criteria import check_score
from sparselearn.errors import SparsityError
from sparselearn.structures import NM


def refuse(what):
    raise SparsityError(what)


def test_a_check_tells_at_once_or_at_the_end_in_order():
    with pytest.raises(SparsityError, match=r"^now$"):
        checks.check(torch.tensor(True), bool, lambda: refuse("now"))
    checks.check(torch.tensor(False), bool, lambda: refuse("never"))
    reached = []
    with pytest.raises(SparsityError, match=r"^layer b: second$"), checks.together():  # noqa: PT012
        checks.check(torch.tensor(False), bool, lambda: refuse("first"))
        with checks.located("layer b"):
            checks.check(torch.tensor(True), bool, lambda: refuse("second"))
        checks.check(torch.tensor(True), bool, lambda: refuse("third"))
        reached.append("end")
    assert reached == ["end"]
    checks.check(torch.tensor(False), bool, lambda: refuse("never"))  # the block is over


def test_checks_that_keep_much_memory_alive_are_read_between_two_places():
    def two_places():
        with checks.located("layer a"):
            checks.check(torch.tensor(True), bool, lambda: refuse("wrong"), checks.MOST + 1)
        reached.append("layer b")

    reached = []
    with pytest.raises(SparsityError, match=r"^layer a: wrong$"), checks.together():
        two_places()
    assert reached == []


def test_errors_within_a_place_name_it():
    with pytest.raises(SparsityError, match=r"^layer a: wrong$"), checks.located("layer a"):
        refuse("wrong")
    with pytest.raises(SparsityError, match=r"^layer a: wrong$"), checks.located("layer a"):
        checks.check(torch.tensor(True), bool, lambda: refuse("wrong"))


def test_an_error_leaves_no_checks_behind():
    with pytest.raises(SparsityError, match=r"^other$"), checks.together():  # noqa: PT012
        checks.check(torch.tensor(True), bool, lambda: refuse("waiting"))
        refuse("other")
    with checks.together():
        pass


def trained(criterion=None):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    method = sl.sr_ste(NM(2, 4))
    if criterion is not None:
        method = sl.StraightThrough(NM(2, 4), criterion)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sl.Sparsifier(model, method))

    def step():
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def test_a_step_of_sr_ste_reads_nothing_layer_by_layer():
    _, step = trained()
    step()
    with profile(acc_events=True) as seen:
        step()
    assert not [event for event in seen.key_averages() if event.key in ("aten::item", "aten::is_nonzero")]


def test_nan_is_refused_in_its_step_and_layer():
    model, step = trained()
    step()
    model[3].weight.grad = None
    model[3].weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(SparsityError, match=r"mask criterion returned NaN for `3.weight` at step 2"):
        step()


def test_too_few_candidates_are_refused_in_their_step_and_layer():
    def none_in_layer_two(layer):
        score = layer.weight.abs()
        return score.fill_(-torch.inf) if layer.name == "2.weight" and layer.step == 1 else score

    _, step = trained(none_in_layer_two)
    with pytest.raises(SparsityError, match=r"`2.weight` at step 1: `NM\(2, 4\)` needs 2 weights.* has 0"):
        step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rest", [0.0, -torch.inf, torch.inf])
def test_one_nan_anywhere_is_seen(dtype, rest):
    """The least of scores is NaN where one of them is, in every lane and chunk of torch's reduction."""
    for size in (1, 9, 70, 40_000):
        score = torch.full((size, 1), rest, dtype=dtype)
        layer = sl.Layer("w", score, None, score > 0, {}, 7, torch.Generator())
        assert check_score(score, layer, "drop") is score
        for place in {0, size // 3, size // 2 + 1, size - 1} & set(range(size)):
            holed = score.clone()
            holed[place] = torch.nan
            with pytest.raises(SparsityError, match="drop criterion returned NaN for `w` at step 7"):
                check_score(holed, layer, "drop")
