"""FLOPs accounting: hand-worked layers, PyTorch's own counter, and the cost of whole runs."""

import pytest
import torch
from torch import nn

from sparselearn.flops import TrainingFlops, layer_flops, model_flops


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
    flops.step({"a": 0.25}, dense_gradient=True)  # RigL's update step: 2 * 40 + 100
    assert flops.fraction == pytest.approx((120 + 180) / 600)


def test_dense_training_costs_one():
    flops = TrainingFlops({"a": 80.0}, 100.0)
    flops.step({})
    flops.step({"a": 1.0}, dense_gradient=True)
    assert flops.fraction == 1.0
