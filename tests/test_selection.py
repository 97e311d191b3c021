"""Which weights become sparse, and under which names."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparselearn as sl
from sparselearn import SparseOptimizer, Sparsifier, SparsityError, rigl, static
from sparselearn.selection import clean_name, is_depthwise, select_weights


def names(model, select=None, exclude=()):
    return [w.name for w in select_weights(model, select, exclude)]


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.bilinear = nn.Bilinear(3, 4, 5)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.conv3 = nn.Conv3d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4)
        self.up1 = nn.ConvTranspose1d(4, 6, 3)
        self.up2 = nn.ConvTranspose2d(4, 6, 3)
        self.up3 = nn.ConvTranspose3d(4, 6, 3)
        self.embed = nn.Embedding(10, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.other_sizes = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm([3, 4]), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.scale = nn.Parameter(torch.ones(4))


DEFAULT = [
    "linear.weight",
    "bilinear.weight",
    "conv1.weight",
    "conv2.weight",
    "conv3.weight",
    "grouped.weight",
    "up1.weight",
    "up2.weight",
    "up3.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "other_sizes.q_proj_weight",
    "other_sizes.k_proj_weight",
    "other_sizes.v_proj_weight",
    "other_sizes.out_proj.weight",
]


def test_the_default():
    assert names(Zoo()) == DEFAULT


def test_every_kind_becomes_sparse():
    model = Zoo()
    # Attention starts its biases at zero, so count weights by the names that were chosen, and look at all others.
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in DEFAULT}
    sparsifier = Sparsifier(model, static(), sparsity=0.75)
    assert list(sparsifier.masks) == DEFAULT
    sizes = {n: model.get_parameter(n).numel() for n in DEFAULT}
    assert sparsifier.nnz == round(0.25 * sum(sizes.values()))
    for name, mask in sparsifier.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    for name, value in others.items():
        assert torch.equal(model.get_parameter(name), value)


def test_packed_attention_trains_sparse():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    sparsifier = Sparsifier(model, rigl(stop=9, every=2, skip_step=False), sparsity=0.5)
    optimizer = SparseOptimizer(torch.optim.AdamW(model.parameters()), sparsifier)
    assert sparsifier.masks["in_proj_weight"].shape == (24, 8)
    start = sparsifier.masks["in_proj_weight"].clone()
    nnz = {n: int(m.sum()) for n, m in sparsifier.masks.items()}
    for _ in range(4):
        x = torch.randn(2, 3, 8)
        optimizer.zero_grad()
        model(x, x, x)[0].square().sum().backward()
        optimizer.step()
    for name, mask in sparsifier.masks.items():
        assert int(mask.sum()) == nnz[name]
        assert not model.get_parameter(name)[~mask].any()
    assert not torch.equal(start, sparsifier.masks["in_proj_weight"])


def test_depthwise_is_dense_by_default_and_selectable():
    model = Zoo()
    assert is_depthwise(model.depthwise)
    assert not is_depthwise(model.grouped)
    assert not is_depthwise(nn.Conv2d(1, 4, 3))  # one input channel, but not grouped
    assert is_depthwise(nn.ConvTranspose1d(4, 4, 3, groups=4))
    assert names(model, ["depthwise"]) == ["depthwise.weight"]
    assert names(model, ["conv2.*", "depth*"]) == ["conv2.weight", "depthwise.weight"]


def test_patterns():
    model = Zoo()
    assert names(model, ["embed.*"]) == ["embed.weight"]
    assert names(model, ["up?"]) == ["up1.weight", "up2.weight", "up3.weight"]  # by module
    assert names(model, ["up[13].weight"]) == ["up1.weight", "up3.weight"]
    assert names(model, ["conv2", "conv1"]) == ["conv1.weight", "conv2.weight"]  # in the model's order
    assert names(model, ["*"]) == sorted(
        [*DEFAULT, "embed.weight", "depthwise.weight"], key=[n for n, _ in model.named_parameters()].index
    )
    assert names(model, ["attention*"]) == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert names(model, exclude=["*attention*", "other*", "up*", "conv?", "grouped"]) == DEFAULT[:2]
    assert names(model, ["*"], ["embed.weight", "depthwise*"]) == DEFAULT


def test_any_matrix_by_its_full_name():
    model = Zoo()
    assert names(model, ["position", "linear.weight"]) == ["position", "linear.weight"]
    assert names(model, ["norms.1.weight"]) == ["norms.1.weight"]
    assert names(model, ["norms.*", "linear"]) == ["linear.weight"]  # a wildcard does not reach norms


def test_frozen_weights_stay_as_they_are_by_default():
    model = Zoo()
    model.conv2.requires_grad_(False)
    assert names(model) == [n for n in DEFAULT if n != "conv2.weight"]
    assert names(model, ["conv2"]) == ["conv2.weight"]


def test_a_predicate():
    def wide_linear(name, module, parameter):
        return isinstance(module, nn.Linear) and parameter.shape[0] > 6 and "other" not in name

    assert names(Zoo(), wide_linear) == ["attention.out_proj.weight"]


@pytest.mark.parametrize(
    ("argument", "pattern", "text"),
    [
        (
            "select",
            "linaer.weight",
            "`select` pattern 'linaer.weight' matched no parameter. Closest names: `linear.weight`, `bilinear.weight`,",
        ),
        (
            "exclude",
            "classifer.*",
            "`exclude` pattern 'classifer.*' matched no parameter. Closest names: ",
        ),
        ("select", "scale", "`select` pattern 'scale' matched no parameter. Closest names: "),  # 1-D: never
        ("select", "linear.bias", "`select` pattern 'linear.bias' matched no parameter. Closest names: `linear."),
    ],
)
def test_a_pattern_that_matches_nothing(argument, pattern, text):
    with pytest.raises(SparsityError) as error:
        select_weights(Zoo(), **{argument: [pattern]})
    assert str(error.value).startswith(text)
    assert str(error.value).count("`") == 2 + 2 * 3  # three names
    assert str(error.value).endswith("`.")


def test_the_exact_text_for_a_small_model():
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 4))
    model.add_module("classifier", nn.Linear(4, 2))
    with pytest.raises(SparsityError) as error:
        Sparsifier(model, static(), sparsity=0.5, exclude=["classifer.*"])
    assert str(error.value) == (
        "`exclude` pattern 'classifer.*' matched no parameter. Closest names: `classifier.weight`, `body.weight`."
    )
    with pytest.raises(SparsityError) as error:
        Sparsifier(model, static(), sparsity=0.5, overrides={"head": 0.1})
    assert str(error.value) == (
        "`overrides` pattern 'head' matched no parameter. Closest names: `body.weight`, `classifier.weight`."
    )
    with pytest.raises(SparsityError) as error:
        select_weights(model, "body.*")
    assert str(error.value) == "`select` needs a list of patterns; got the string 'body.*'. Write ['body.*']."


@pytest.mark.parametrize(
    ("model", "options", "seen"),
    [
        (lambda: nn.Embedding(5, 4), {}, "1 parameters of two or more dimensions: weight."),
        (lambda: nn.LayerNorm(4), {}, "0 parameters of two or more dimensions: none."),
        (lambda: nn.Linear(4, 4), {"exclude": ["*"]}, "1 parameters of two or more dimensions: weight."),
        (lambda: nn.Linear(4, 4), {"select": lambda *_: False}, "1 parameters of two or more dimensions: weight."),
    ],
)
def test_nothing_selected(model, options, seen):
    with pytest.raises(SparsityError) as error:
        select_weights(model(), **options)
    assert str(error.value) == (
        "No weight was selected. Sparsified by default: trainable Linear, Conv, ConvTranspose and MultiheadAttention "
        f"weights; the model has {seen}"
    )


def test_weights_that_cannot_be_sparse():
    with pytest.raises(SparsityError) as error:
        select_weights(nn.Sequential(nn.LazyLinear(4)))
    assert str(error.value) == "`0.weight` is not initialised yet. Run one batch through the model first."
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SparsityError) as error:
        select_weights(model, ["weight"])
    assert str(error.value) == "`weight` is torch.int8; only floating-point weights are sparsified."


# ---- tied weights ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.body = nn.Linear(6, 6)
        self.again = self.body  # the same module under two names
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.again(self.body(self.embed(x)).tanh()))


def test_tied_weights_share_one_mask():
    torch.manual_seed(0)
    model = Tied()
    found = {w.name: w.aliases for w in select_weights(model)}
    assert found == {"embed.weight": ["head.weight"], "body.weight": ["again.weight"]}  # tied head: a Linear
    sparsifier = Sparsifier(model, rigl(stop=9, every=2), sparsity=0.5)
    assert sparsifier.nnz == round(0.5 * (12 * 6 + 6 * 6))  # counted once
    optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), sparsifier)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.arange(12)).square().sum().backward()
        optimizer.step()
        assert model.head.weight is model.embed.weight
        assert not model.head.weight[~sparsifier.masks["embed.weight"]].any()
        assert int(sparsifier.masks["embed.weight"].sum()) == sparsifier.state.layers["embed.weight"].nnz


def test_tied_weights_answer_to_every_name():
    assert names(Tied(), ["head"]) == ["embed.weight"]
    assert names(Tied(), exclude=["head.*"]) == ["body.weight"]
    assert names(Tied(), ["again"]) == ["body.weight"]
    sparsifier = Sparsifier(Tied(), static(), sparsity=0.5, overrides={"head": 0.0})
    assert sparsifier.densities["embed.weight"] == 1.0


# ---- wrappers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("0.weight", "0.weight"),
        ("module.0.weight", "0.weight"),
        ("_orig_mod.0.weight", "0.weight"),
        ("module._orig_mod.0.weight", "0.weight"),
        ("_orig_mod.module.0.weight", "0.weight"),
        ("0._orig_mod.weight", "0.weight"),
        ("module.module.weight", "module.weight"),
    ],
)
def test_clean_name(name, clean):
    assert clean_name(name) == clean


class HasModule(nn.Module):
    """A model with a child of its own called `module`, whose name must stay."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.module(x))


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_names_are_those_of_the_bare_model(group):
    bare = ["module.weight", "head.weight"]
    model = HasModule()
    wrapped = {
        "bare": model,
        "compiled": torch.compile(model),
        "ddp": DistributedDataParallel(model),
        "compiled ddp": torch.compile(DistributedDataParallel(model)),
        "ddp of compiled": DistributedDataParallel(torch.compile(model)),
    }
    for kind, outer in wrapped.items():
        assert names(outer) == bare, kind
        assert names(outer, ["module"]) == bare[:1], kind
    inner = HasModule()
    inner.module.compile()
    inner.head = torch.compile(inner.head)
    assert names(inner) == bare


def test_equal_masks_before_and_after_wrapping():
    a, b = HasModule(), HasModule()
    one = Sparsifier(a, static(), sparsity=0.5, seed=2)
    two = Sparsifier(torch.compile(b), static(), sparsity=0.5, seed=2)
    assert one.masks.keys() == two.masks.keys()
    assert all(torch.equal(one.masks[n], two.masks[n]) for n in one.masks)


def test_split_projections_are_masked_by_themselves_and_change_no_output() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 16)
    before = model(x)
    assert sl.split_projections(model) is model
    torch.testing.assert_close(model(x), before)
    assert sl.split_projections(model).self_attn.q_proj_weight is model.self_attn.q_proj_weight  # nothing left to split
    sparsifier = sl.Sparsifier(model, sl.rigl(stop=10, every=1), sparsity=0.75, distribution=sl.distributions.uniform)
    optimizer = sl.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sparsifier)
    for _ in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in "qkv":
        assert int(sparsifier.masks[f"self_attn.{name}_proj_weight"].sum()) == 64  # a quarter of 16 x 16 each
    sl.split_projections(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))  # split already: left as it is
