"""FLOPs accounting: hand-worked layers, PyTorch's own counter, and the cost of whole runs."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparselearn as sl
from sparselearn import criteria, distributions
from sparselearn.flops import TrainingFlops, gradient_densities, layer_flops, model_flops, stored_megabytes
from sparselearn.methods import DropGrow
from sparselearn.structures import NM


class Attention(nn.Module):
    """Self-attention, called with positions or with keywords."""

    def __init__(self, keywords: bool = False) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.keywords = keywords

    def forward(self, x):
        if self.keywords:
            return self.inner(query=x, key=x, value=x, need_weights=False)[0]
        return self.inner(x, x, x, need_weights=False)[0]


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(288, 10)
    )


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(10, 20), (5, 10), 2 * 10 * 20),
        (nn.Linear(10, 20), (5, 7, 10), 2 * 10 * 20 * 7),  # applied to 7 tokens
        (nn.Conv2d(3, 8, 3), (5, 3, 10, 10), 2 * (8 * 3 * 9) * 64),  # 8 x 8 positions
        (nn.Conv2d(4, 8, 3, groups=2), (5, 4, 10, 10), 2 * (8 * 2 * 9) * 64),  # half the inputs per filter
        (nn.ConvTranspose2d(3, 8, 2, stride=2), (5, 3, 4, 4), 2 * (3 * 8 * 4) * 16),  # 16 input positions
    ],
)
def test_one_layer_by_hand(layer, shape, expected):
    assert layer_flops(nn.Sequential(layer), torch.ones(shape)) == {"0.weight": expected}


@pytest.mark.parametrize("batch", [1, 4])
def test_layers_add_up_to_pytorchs_count(batch):
    example = torch.ones(batch, 3, 8, 8)
    assert sum(layer_flops(convnet(), example).values()) == model_flops(convnet(), example)


def test_a_layer_used_twice_counts_twice():
    layer = nn.Linear(6, 6)
    assert layer_flops(nn.Sequential(layer, layer), torch.ones(2, 6)) == {"0.weight": 2 * 2 * 36}


@pytest.mark.parametrize("keywords", [False, True])
def test_attention_counts_both_projections(keywords):
    flops = layer_flops(Attention(keywords), torch.ones(2, 5, 8))
    assert flops == {"inner.in_proj_weight": 2 * 192 * 5, "inner.out_proj.weight": 2 * 64 * 5}


def test_attention_is_counted_in_evaluation_mode():
    example = torch.ones(2, 5, 8)
    assert model_flops(Attention().eval(), example) == model_flops(Attention(), example) > 0


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    layer_flops(model, torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    model_flops(model, torch.ones(2, 1, 6, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model] == [True, True, False]


def test_training_fraction_by_hand():
    flops = TrainingFlops({"a": 80.0}, 100.0)  # 20 in parts that stay dense
    assert flops.fraction == 0.0
    flops.step({"a": 0.25})  # sparse forward: 80 * 0.25 + 20 = 40, a step 3 * 40
    assert flops.fraction == pytest.approx(120 / 300)
    flops.step({"a": 0.25}, gradients={})  # RigL's update step: 2 * 40 + 100
    assert flops.fraction == pytest.approx((120 + 180) / 600)


def test_dense_training_costs_one():
    flops = TrainingFlops({"a": 80.0}, 100.0)
    flops.step({})
    flops.step({"a": 1.0}, gradients={})
    assert flops.fraction == 1.0


def test_backward_costs_twice_forward_by_pytorchs_own_count():
    """Except that nothing asks for the gradient of the first layer's input. (It counts grouped ones too high.)"""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 10))
    example = torch.ones(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(example).sum().backward()
    first = layer_flops(model, example)["0.weight"]
    assert counter.get_total_flops() / 2 == 3 * model_flops(model, example) - first


D = {"a": 0.25}


@pytest.mark.parametrize(
    ("method", "quiet", "update"),
    [
        (sl.static(), D, D),
        (sl.set_(stop=200), D, D),
        (sl.gmp(stop=200), D, D),
        (sl.rigl(stop=200), D, {}),
        (sl.methods.itop(stop=200, every=10, grow=criteria.random), D, D),
        (DropGrow(grow=lambda layer: layer.weight), D, {}),  # unknown: it may look at the gradient
        (DropGrow(grow=criteria.random, drop=criteria.magnitude_gradient(0.1)), D, {}),
        (DropGrow(grow=criteria.random, grow_init=criteria.gradient_sign()), D, {}),
        (DropGrow(grow=criteria.average_gradient()), {}, {}),  # a running mean, on every step
        (DropGrow(grow=criteria.momentum, optimizer_state="keep"), {}, {}),
        (sl.methods.sr_ste(NM(2, 4)), {}, {}),
        (sl.methods.top_kast(exploration=0.25), {"a": 0.5}, {"a": 0.5}),
    ],
)
def test_which_steps_need_the_dense_gradient(method, quiet, update):
    assert gradient_densities(method, D, 50, updated=False) == quiet
    assert gradient_densities(method, D, 50, updated=True) == update


# ---- the published table: ResNet-50 on ImageNet (google-research/rigl, README) -----------------------------------


@pytest.fixture(scope="module")
def resnet50():
    from torchvision.models import resnet50 as build

    model, example = build(), torch.zeros(1, 3, 224, 224)
    return model, layer_flops(model, example), model_flops(model, example)


def sparse(resnet50, sparsity, distribution, **options):
    """Forward operations / dense, and the masks."""
    model, layers, total = resnet50
    sparsifier = sl.Sparsifier(model, sl.static(), sparsity=sparsity, distribution=distribution, **options)
    return TrainingFlops(layers, total).forward(sparsifier.densities) / total, sparsifier.masks


def test_published_size_and_operations_of_the_dense_resnet50(resnet50):
    assert resnet50[2] == pytest.approx(8.2e9, abs=0.05e9)
    assert sum(resnet50[1].values()) == resnet50[2]
    assert stored_megabytes(resnet50[0]) == pytest.approx(102.122, abs=0.0005)


ERK = [(0.8, 0.42, 23.683), (0.9, 0.24, 13.499), (0.95, 0.12, 8.399)]


@pytest.mark.parametrize(("sparsity", "fraction", "size"), ERK)
def test_published_operations_and_sizes_of_erk(resnet50, sparsity, fraction, size):
    found, masks = sparse(resnet50, sparsity, distributions.erk)
    assert found == pytest.approx(fraction, abs=0.01)
    assert stored_megabytes(resnet50[0], masks) == pytest.approx(size, rel=0.002)


def test_published_operations_of_erk_at_99_percent_with_a_dense_first_layer(resnet50):
    found, _ = sparse(resnet50, 0.99, distributions.erk, exclude=["conv1"])
    assert found == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(("sparsity", "fraction"), [(0.8, 0.23), (0.9, 0.13), (0.95, 0.08)])
def test_published_operations_of_uniform_with_a_dense_first_layer(resnet50, sparsity, fraction):
    found, _ = sparse(resnet50, sparsity, partial(distributions.uniform, first_dense=True))
    assert found == pytest.approx(fraction, abs=0.01)


def test_size_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))
    full, half = torch.ones(4, 3, 3, 3).bool(), torch.zeros(10, 4).bool()
    half[:, :2] = True
    # 108 weights and 4 biases of the norm; 20 of 40 weights, 40 bits of mask and 10 biases.
    assert stored_megabytes(model, {"0.weight": full, "3.weight": half}) == (4 * (108 + 4 + 20 + 10) + 5) / 1e6
    assert stored_megabytes(model) == 4 * (108 + 4 + 40 + 10) / 1e6
