"""Conversion: what is swapped and why, with a clock of our own; nothing lost on the way back. Condensed training."""

import copy
import csv
import json
import math

import pytest
import torch
from torch import nn

import sparselearn as sl
from sparselearn import SparsityError
from sparselearn.modules import (
    CondensedConv2d,
    CondensedLinear,
    CsrLinear,
    MaskedDenseLinear,
    captured,
    convert,
    revert,
    rewire,
    update_condensed,
)
from sparselearn.modules.timing import interleaved, speedup
from sparselearn.structures import ConstantFanIn


class Block(nn.Module):
    """Nested names, a layer used twice, attention, a convolution, an unused and a tied layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.again = self.twice
        self.dropout = nn.Dropout()
        self.unused = nn.Linear(8, 8)
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.conv(image).flatten(2).mT  # [B, L, 8]
        x = x + self.dropout(self.body(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.again(self.twice(x)))


def sparse_block() -> tuple[Block, sl.Sparsifier]:
    torch.manual_seed(0)
    model = Block()
    return model, sl.Sparsifier(model, sl.static(structure=ConstantFanIn()), sparsity=0.5)


def clock(*medians: float, noise: float = 0.0):
    """A timer: the first function takes 1, the others what is given; two rounds of 15 are off by `noise`."""

    def timer(functions):
        assert len(functions) <= 1 + len(medians)
        factors = [1.0] * 13 + [1 + noise, 1 - noise]
        return [[t * f for f in factors] for t in [1.0, *medians][: len(functions)]]

    return timer


# ---- what is swapped -----------------------------------------------------------------------------------------


def test_forced_conversion_keeps_outputs_and_says_why_layers_stay():
    model, sparsifier = sparse_block()
    image = torch.randn(2, 1, 4, 4)
    model.eval()
    expected = model(image)
    model.train()
    report = convert(model, sparsifier, image, force=True)
    assert model.training
    assert report.swapped == ["conv", "body.0", "body.2", "twice"]
    assert type(model.conv) is CondensedConv2d
    assert type(model.body[0]) is type(model.twice) is CondensedLinear
    assert model.again is model.twice
    reasons = {row.layer: row.reason for row in report.rows if not row.swapped}
    assert reasons == {
        "attention": "no candidate replaces MultiheadAttention",
        "attention.out_proj": "MultiheadAttention reads the weight itself",
        "unused": "its forward is not called on the example",
        "embedding": "no candidate replaces Embedding",
    }
    torch.testing.assert_close(model.eval()(image), expected)
    assert next(row for row in report.rows if row.layer == "twice").inputs == "2·2x16x8"


def test_there_and_back_loses_nothing_and_training_goes_on():
    model, sparsifier = sparse_block()
    before, masks, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(sparsifier.masks), sparsifier.state_dict()
    image = torch.randn(2, 1, 4, 4)
    swapped = convert(model, sparsifier, image, force=True).swapped
    kept = revert(model)
    assert set(kept) == {f"{name}.weight" for name in swapped}
    assert all(torch.equal(mask, masks[name]) for name, mask in kept.items())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.again is model.twice
    resumed = sl.Sparsifier(model, sl.static(structure=ConstantFanIn()), sparsity=0.5, state_dict=saved)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), 0.1), resumed)
    model(image).sum().backward()
    optimizer.step()
    assert revert(model) == {}


def two_layers() -> tuple[nn.Sequential, dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    method = sl.static(structure=ConstantFanIn())
    sparsifier = sl.Sparsifier(model, method, sparsity=0.75, distribution=sl.distributions.uniform)
    return model, sparsifier.masks, torch.randn(5, 16)


@pytest.mark.parametrize(
    ("times", "noise", "least", "kind"),
    [
        ((0.5, 0.8), 0.0, 1.0, CondensedLinear),
        ((0.8, 0.5), 0.0, 1.0, CsrLinear),  # the fastest one, not the first
        ((2.0, 1.5), 0.0, 1.0, nn.Linear),
        ((1.0, 1.0), 0.0, 1.0, nn.Linear),  # a tie is no reason to swap
        ((0.5, 2.0), 0.0, 2.0, nn.Linear),  # must exceed min_speedup
        ((0.4, 2.0), 0.0, 2.0, CondensedLinear),
        ((0.5, 2.0), 0.9, 1.0, CondensedLinear),  # two outliers of 15 do not matter
    ],
)
def test_a_layer_is_swapped_where_it_is_faster(times, noise, least, kind):
    model, masks, x = two_layers()
    expected = model(x)
    report = convert(model, masks, x, timer=clock(*times, noise=noise), min_speedup=least)
    assert type(model[0]) is type(model[2]) is kind
    assert len(report.rows) == 4
    assert report.swapped == ([] if kind is nn.Linear else ["0", "2"])
    torch.testing.assert_close(model(x), expected)


def test_a_difference_within_the_noise_is_no_reason_to_swap():
    def noisy(functions):  # faster in 11 of 15 rounds, and in the median, but not for certain
        return [[1.0] * 15, [0.9] * 11 + [1.3] * 4]

    model, masks, x = two_layers()
    report = convert(model, masks, x, candidates=[CondensedLinear], timer=noisy)
    assert report.swapped == []
    row = report.rows[0]
    assert (row.speedup, row.low, row.high) == pytest.approx((1 / 0.9, 1 / 1.3, 1 / 0.9))
    assert row.reason == "not faster than 1x for certain"


def test_decisions_differ_by_layer_and_see_the_real_inputs():
    seen = []

    def timer(functions):
        seen.append(len(functions))
        [function() for function in functions]  # they run
        return [[1.0] * 15, [0.5 if len(seen) == 1 else 2.0] * 15]

    model, masks, x = two_layers()
    report = convert(model, masks, (x,), candidates=[CondensedLinear], timer=timer)
    assert seen == [2, 2]
    assert report.swapped == ["0"]
    assert type(model[2]) is nn.Linear
    assert [(row.inputs, row.shape, row.density) for row in report.rows] == [
        ("5x16", "12x16", 0.25),
        ("5x12", "4x12", 0.25),
    ]


def test_the_real_clock_runs():
    times = interleaved([lambda: sum(range(10)), lambda: sum(range(1000))], rounds=3, least=1e-5)
    assert [len(t) for t in times] == [3, 3]
    assert all(t > 0 for row in times for t in row)
    model, masks, x = two_layers()
    report = convert(model, masks, x, timer=lambda functions: interleaved(functions, 7, 1e-5))
    assert all(row.low <= row.speedup <= row.high for row in report.rows)


def test_speedup_by_hand():
    base, other = [12.0] * 9, [12.0, 6.0, 4.0, 3.0, 12 / 5, 2.0, 12 / 7, 1.5, 12 / 9]
    # ratios 1 to 9; P(Binomial(9, 1/2) < 2) = 10/512 <= 0.025 < 46/512: the 2nd lowest and highest
    assert speedup(base, other) == pytest.approx((2, 5, 8))
    assert speedup(base[:5], other[:5]) == pytest.approx((1, 3, 5))  # too few rounds: the whole range
    # n = 15: P(< 4) = 576/32768 <= 0.025 < P(< 5) = 1941/32768
    assert speedup([1.0] * 15, [1 / (i + 1) for i in range(15)]) == pytest.approx((4, 8, 12))


def test_masks_with_unequal_rows_go_to_csr_with_the_reason():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4))
    sparsifier = sl.Sparsifier(model, sl.static(), sparsity=0.75)
    x = torch.randn(5, 16)
    expected = model(x)
    report = convert(model, sparsifier, x, force=True)
    assert [row.candidate for row in report.rows] == ["CondensedLinear", "CsrLinear"] * 2
    assert "rows that all have K active weights" in report.rows[0].reason
    assert type(model[0]) is CsrLinear
    torch.testing.assert_close(model(x), expected)


def test_just_grown_zeros_stay_active():
    model, masks, x = two_layers()
    with torch.no_grad():
        model[0].weight.view(-1)[masks["0.weight"].view(-1).nonzero()[::2]] = 0.0
    masks = copy.deepcopy(masks)
    for candidate in (CondensedLinear, CsrLinear, MaskedDenseLinear):
        convert(model, masks, x, force=True, candidates=[candidate])
        assert model[0].nnz == int(masks["0.weight"].sum())
        back = revert(model)
        assert torch.equal(back["0.weight"], masks["0.weight"])


# ---- the report ----------------------------------------------------------------------------------------------


def test_table_is_readable_and_saved(tmp_path):
    model, masks, x = two_layers()
    path = tmp_path / "table.csv"
    report = convert(model, masks, x, timer=clock(0.5, 2.0), save_table=path)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "density", "input", "candidate", "dense", "us", "us", "speed-up", "decision"]  # fmt: skip  # noqa: E501
    assert lines[2].split() == ["0", "12x16", "0.2500", "5x16", "CondensedLinear", "1000000.0", "500000.0", "2.00", "(2.00", "to", "2.00)", "swapped"]  # fmt: skip  # noqa: E501
    assert lines[3].endswith("kept: not faster than 1x for certain")
    assert lines[-1].startswith(f"2 layers swapped; torch {torch.__version__}, ")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["swapped"] for row in rows] == ["True", "False", "True", "False"]
    assert float(rows[0]["speedup"]) == 2
    report.save(tmp_path / "table.json")
    saved = json.loads((tmp_path / "table.json").read_text())
    assert saved[0]["candidate"] == "CondensedLinear"
    assert saved[0]["torch"] == torch.__version__


# ---- refusals ------------------------------------------------------------------------------------------------


def test_mistakes_are_refused_before_anything_changes(tmp_path):
    model, masks, x = two_layers()
    with pytest.raises(SparsityError, match="needs an example input"):
        convert(model, masks)
    with pytest.raises(SparsityError, match=r"must end in \.csv or \.json; got 'table\.txt'"):
        convert(model, masks, x, save_table="table.txt")
    with pytest.raises(SparsityError, match=r"mask for `1\.weight`, which is no parameter .* Closest names: `"):
        convert(model, {"1.weight": masks["0.weight"]}, x)
    with pytest.raises(SparsityError, match=r"`0\.weight`: The mask must be bool and have the weight's shape"):
        convert(model, {"0.weight": masks["2.weight"]}, x)
    with pytest.raises(SparsityError, match="needs the plain model; got a"):
        convert(torch.compile(model), masks, x)
    with torch.no_grad():
        model[2].weight.fill_(1)
    with pytest.raises(SparsityError, match=r"`2\.weight`: .* would be lost"):
        convert(model, masks, x, force=True)
    assert type(model[0]) is nn.Linear


def test_layers_that_must_stay():
    model, masks, x = two_layers()
    model[0].register_forward_hook(lambda *_: None)
    report = convert(model, masks, x, force=True)
    assert [row.reason for row in report.rows] == ["it has hooks, which would be lost", "forced"]
    model[2].register_forward_hook(lambda *_: None)
    with pytest.raises(SparsityError, match="`2` has hooks"):
        revert(model)
    alone = nn.Linear(4, 3)
    mask = sl.Sparsifier(alone, sl.static(structure=ConstantFanIn()), sparsity=0.5).masks
    assert "nn.Sequential" in convert(alone, mask, torch.randn(2, 4), force=True).rows[0].reason

    model, masks, x = two_layers()
    model.append(nn.ReLU())
    model[2].bias = nn.Parameter(torch.zeros(4))
    model.extra = nn.Linear(4, 4)
    model.extra.bias = model[2].bias
    assert convert(model, masks, x, force=True).rows[1].reason == "its weight or bias is tied to `extra.bias`"

    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 3))
    sparsifier = sl.Sparsifier(model, sl.static(structure=ConstantFanIn()), sparsity=0.5)
    assert convert(model, sparsifier, torch.randn(2, 4), force=True).rows[0].reason == "no candidate replaces Own"


@pytest.mark.parametrize("fast", [True, False])
def test_transformer_layers_with_a_fast_path(fast):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    sparsifier = sl.Sparsifier(model, sl.static(structure=ConstantFanIn()), sparsity=0.5)
    x = torch.randn(2, 5, 8)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        report = convert(model, sparsifier, x, force=True)
        assert len(report.swapped) == (0 if fast else 4)
        with torch.no_grad():
            model.eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_a_model_that_breaks_is_put_back():
    class Reads(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.layer, self.how = nn.Linear(4, 4), how

        def forward(self, x):
            if self.how == "fails":
                return self.layer(x) * self.layer.weight.sum()
            return self.layer(x) * (1 if type(self.layer) is nn.Linear else 2)

    for how, message in [
        ("fails", "the model fails with AttributeError"),
        ("differs", r"the output differs by .* \(allowed: "),
    ]:
        model = Reads(how)
        sparsifier = sl.Sparsifier(model, sl.static(structure=ConstantFanIn()), sparsity=0.5)
        with pytest.raises(SparsityError, match=message):
            convert(model, sparsifier, torch.randn(2, 4), force=True)
        assert type(model.layer) is nn.Linear


# ---- training in condensed form ------------------------------------------------------------------------------


def mlp(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)


def batches(steps: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(16, 20, generator=generator, dtype=dtype), torch.randint(3, (16,), generator=generator)


def ablate_after(step: int, score):
    """A criterion that gives up the half of the neurons with the lowest weight norms from this step on."""

    def criterion(layer):
        worth = layer.weight.abs().sum(1)
        weak = worth <= worth.median()
        return score(layer).masked_fill(weak[:, None], -math.inf) if layer.step >= step else score(layer)

    return criterion


RULES = {
    "srigl": lambda: sl.srigl(stop=40, every=8, gamma=0.6),
    "rigl": lambda: sl.rigl(stop=40, every=8, structure=ConstantFanIn()),
    "rigl, no skipped step": lambda: sl.rigl(stop=40, every=8, structure=ConstantFanIn(), skip_step=False),
    "set": lambda: sl.DropGrow(grow=sl.criteria.random, updates=sl.UpdateSchedule(8, 40), structure=ConstantFanIn()),
    "ablation": lambda: sl.DropGrow(
        drop=ablate_after(16, sl.criteria.magnitude),
        grow=ablate_after(16, sl.criteria.gradient),
        updates=sl.UpdateSchedule(8, 40),
        structure=ConstantFanIn(),
    ),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_condensed_training_is_masked_dense_training(rule, optimizer, dtype):
    method, steps, layers = RULES[rule](), 30, ["0", "2"]
    dense = mlp(dtype)
    sparsifier = sl.Sparsifier(dense, method, sparsity=0.75, distribution=sl.distributions.uniform, exclude=["4"])
    model = copy.deepcopy(dense)
    convert(model, sparsifier, force=True)
    first = model[0].mask.clone()
    dense_optimizer = sl.SparseOptimizer(OPTIMIZERS[optimizer](dense.parameters()), sparsifier)
    sparse_optimizer = OPTIMIZERS[optimizer](model.parameters())
    budgets = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    updates, moved = 0, 0
    for step, (x, y) in enumerate(batches(steps, dtype)):
        dense_optimizer.zero_grad()
        nn.functional.cross_entropy(dense(x), y).backward()
        dense_optimizer.step()

        sparse_optimizer.zero_grad()
        due = method.due(step)
        with captured(model) as traffic:
            loss = nn.functional.cross_entropy(model(x), y)  # stays alive over the update, as in many loops
            loss.backward()
        if not (due and method.skip_step):
            sparse_optimizer.step()
        if due:
            grown = update_condensed(model, method, sparse_optimizer, traffic, step=step, nnz=budgets)
            assert grown == sparsifier.last_update["grown"]
            updates += 1
            moved += grown
        for name in layers:
            module, reference = model.get_submodule(name), dense.get_submodule(name)
            mask = sparsifier.masks[f"{name}.weight"]
            assert torch.equal(module.mask, mask)
            torch.testing.assert_close(module.scatter(module.values), reference.weight.detach(), rtol=1e-4, atol=1e-5)
            mine, theirs = sparse_optimizer.state[module.values], dense_optimizer.state[reference.weight]
            slots = [key for key, value in theirs.items() if value.shape == mask.shape]
            for key in slots:
                torch.testing.assert_close(module.scatter(mine[key]), theirs[key], rtol=1e-3, atol=1e-5)
    assert updates >= 3
    assert moved > 10
    assert slots
    assert not torch.equal(first, model[0].mask)
    if rule == "srigl":
        assert len(model[0].active) < 24
    if rule == "ablation":
        assert model[0].values.shape == (12, 10)  # from [24, 5]
    torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop", [16, 17, 24])
def test_condensed_training_resumes_exactly(stop):
    """Also where the saved layer has other [A, K] than the one it is loaded into."""
    method = RULES["ablation"]()

    def build():
        model = mlp(torch.float32)
        sparsifier = sl.Sparsifier(model, method, sparsity=0.75, distribution=sl.distributions.uniform, exclude=["4"])
        convert(model, sparsifier, force=True)
        return model, torch.optim.AdamW(model.parameters(), 1e-2)

    def train(model, optimizer, steps):
        for step, (x, y) in list(enumerate(batches(30, torch.float32)))[steps]:
            optimizer.zero_grad()
            with captured(model) as traffic:
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if method.due(step):
                update_condensed(model, method, optimizer, traffic, step=step)
        return model, optimizer

    whole, _ = train(*build(), slice(0, 30))
    half, half_optimizer = train(*build(), slice(0, stop))
    resumed, optimizer = build()
    resumed.load_state_dict(half.state_dict())
    optimizer.load_state_dict(half_optimizer.state_dict())
    resumed, _ = train(resumed, optimizer, slice(stop, 30))
    assert whole[0].fan_in == 10
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_rewire_by_hand():
    layer = nn.Linear(4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 0, 0], [0, 3, 0, 4], [0, 0, 0, 0]]))
    module = CondensedLinear.from_dense(layer, mask)
    optimizer = torch.optim.SGD(module.parameters(), 0.0, momentum=0.9)
    module.values.grad, module.bias.grad = torch.tensor([[10.0, 20], [30, 40]]), torch.zeros(3)
    optimizer.step()
    parameter = module.values
    # row 0 loses column 0 and grows 3; row 1 stays; nothing is ablated or revived
    assert rewire(module, torch.tensor([[0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]]).bool(), optimizer) == 1
    assert module.values is parameter
    assert module.values.tolist() == [[2, 0], [3, 4]]
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [[20, 0], [30, 40]]
    # row 0 is ablated, row 2 revives, K grows to 3
    assert rewire(module, torch.tensor([[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0]]).bool(), optimizer) == 4
    assert module.values is not parameter
    assert module.values.tolist() == [[0, 3, 4], [0, 0, 0]]
    assert module.active.tolist() == [1, 2]
    assert optimizer.state[module.values]["momentum_buffer"].tolist() == [[0, 30, 40], [0, 0, 0]]
    assert optimizer.param_groups[0]["params"][0] is module.values
    assert parameter not in optimizer.state
    with pytest.raises(SparsityError, match=r"must be bool of shape \[3, 4\]"):
        rewire(module, torch.ones(4, 3).bool())


def test_captured_gradient_is_the_dense_one():
    torch.manual_seed(0)
    dense = nn.Linear(6, 4)
    mask = sl.Sparsifier(dense, sl.static(structure=ConstantFanIn()), sparsity=0.5).masks["weight"]
    module = CondensedLinear.from_dense(dense, mask)
    seen = []
    method = sl.DropGrow(
        grow=lambda layer: seen.append(layer.grad.clone()) or layer.grad.abs(),
        updates=sl.UpdateSchedule(1, 10),
        structure=ConstantFanIn(),
    )
    x = [torch.randn(2, 3, 6), torch.randn(5, 6)]  # two micro-batches of different shapes
    with captured(module) as traffic:
        for part in x:
            module(part).square().sum().backward()
            dense(part).square().sum().backward()
    update_condensed(module, method, None, traffic, step=1)
    torch.testing.assert_close(seen[0], dense.weight.grad)
    assert not module._forward_hooks
    with pytest.raises(SparsityError, match="Growth by `gradient` found no gradient for `weight` at step 2"):
        update_condensed(module, RULES["rigl"](), None, {}, step=2)
    with pytest.raises(SparsityError, match="With ablation `nnz` must hold the budget of every layer"):
        update_condensed(module, RULES["srigl"](), None, traffic, step=2)
    with pytest.raises(SparsityError, match="no place for what a method remembers"):
        update_condensed(module, sl.DropGrow(grow=sl.criteria.random, optimizer_state="keep"), None, traffic, step=2)
