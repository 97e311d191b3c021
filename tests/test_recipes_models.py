"""The recipes' networks: published sizes, shapes, and what makes them that network."""

import math

import pytest
import torch
from torch import nn

from sparselearn.recipes import models
from sparselearn.selection import select_weights


def count(network):
    return sum(p.numel() for p in network.parameters())


def wrn_by_hand(depth, width, classes=10):
    """Numbers of a wide ResNet, layer by layer (convolutions, shortcuts, two numbers a channel for batch norm)."""
    total, n_in = 3 * 9 * 16, 16
    for stage in range(3):
        n_out = 16 * width * 2**stage
        for _ in range((depth - 4) // 6):
            total += 9 * n_in * n_out + 9 * n_out * n_out + 2 * n_in + 2 * n_out + (n_in != n_out) * n_in * n_out
            n_in = n_out
    return total + 2 * n_in + n_in * classes + classes


@pytest.mark.parametrize(
    ("build", "options", "parameters"),
    [
        ("resnet18", {}, 11_173_962),  # 11.17M
        ("resnet18", {"classes": 100}, 11_220_132),
        ("resnet50", {}, 23_520_842),  # 23.52M
        ("wrn", {}, wrn_by_hand(22, 2)),  # 1.08M
        ("vgg19", {"classes": 100}, 20_081_188),  # 20.0M
        ("mobilenet_v1", {}, 4_231_976),  # 4.2M
        ("vit", {}, 2_693_184),
        ("torchvision.resnet50", {}, 25_557_032),  # 25.557M
        ("torchvision.mobilenet_v2", {}, 3_504_872),  # 3.5M
        ("torchvision.vit_b_16", {}, 86_567_656),  # 86.6M
    ],
)
def test_the_published_number_of_parameters(build, options, parameters):
    from torchvision import models as torchvision

    place = torchvision if build.startswith("torchvision") else models
    with torch.device("meta"):
        assert count(getattr(place, build.rpartition(".")[2])(**options)) == parameters


@pytest.mark.parametrize(("depth", "width", "millions"), [(22, 2, 1.08), (16, 4, 2.7), (40, 4, 8.9), (28, 10, 36.5)])
def test_wide_resnets_have_the_sizes_of_their_paper(depth, width, millions):
    with torch.device("meta"):
        assert count(models.wrn(depth, width)) == pytest.approx(millions * 1e6, rel=0.02)


@pytest.mark.parametrize(
    ("network", "shape", "outputs"),
    [
        (models.resnet18(), (2, 3, 32, 32), 10),
        (models.resnet50(classes=100), (2, 3, 32, 32), 100),
        (models.wrn(), (2, 3, 32, 32), 10),
        (models.vgg19(), (2, 3, 32, 32), 10),
        (models.mobilenet_v1(width=0.25), (2, 3, 224, 224), 1000),
        (models.vit(), (2, 3, 32, 32), 10),
        (models.vit(size=28, channels=1), (2, 1, 28, 28), 10),
    ],
)
def test_shapes(network, shape, outputs):
    with torch.no_grad():
        assert network.eval()(torch.randn(shape)).shape == (2, outputs)


def test_the_small_stem_keeps_the_resolution():
    network, shapes = models.resnet18(), []
    for layer in (network.layer1, network.layer4):
        layer.register_forward_hook(lambda module, args, output: shapes.append(output.shape[2:]))
    with torch.no_grad():
        network(torch.randn(2, 3, 32, 32))
    assert shapes == [(32, 32), (4, 4)]
    assert network.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)


def test_a_wide_residual_block_by_hand():
    torch.manual_seed(0)
    network = models.wrn(10, 1)
    x = torch.randn(2, 16, 8, 8)
    block = network[2].eval()  # 16 -> 32 channels, stride 2
    first = torch.relu(nn.functional.batch_norm(x, torch.zeros(16), torch.ones(16)))
    y = nn.functional.conv2d(first, block.conv1.weight, stride=2, padding=1)
    y = torch.relu(nn.functional.batch_norm(y, torch.zeros(32), torch.ones(32)))
    y = nn.functional.conv2d(y, block.conv2.weight, padding=1)
    torch.testing.assert_close(block(x), y + nn.functional.conv2d(first, block.shortcut.weight, stride=2))


def test_depthwise_convolutions_stay_dense_by_default():
    with torch.device("meta"):
        network = models.mobilenet_v1()
    chosen = select_weights(network)
    assert len(chosen) == 1 + 13 + 1  # the first convolution, the pointwise ones, the head
    assert all(weight.module.groups == 1 for weight in chosen if isinstance(weight.module, nn.Conv2d))


# ---- transformers ------------------------------------------------------------------------------------------------


def tiny_gpt(**options):
    torch.manual_seed(0)
    return models.gpt(context=8, width=16, depth=2, heads=2, **options).eval()


def test_gpt_sees_only_the_past():
    network, tokens = tiny_gpt(), torch.randint(256, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 256
    with torch.no_grad():
        a, b = network(tokens), network(changed)
    assert a.shape == (1, 8, 256)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert (a[:, 5:] != b[:, 5:]).any(2).all()
    torch.testing.assert_close(network(tokens[:, :3]), a[:, :3])  # shorter than the context


def test_attention_by_hand():
    attention = tiny_gpt().layers[0].attention
    x = torch.randn(1, 8, 16)
    q, k, v = (layer(x)[0].view(8, 2, 8) for layer in (attention.q, attention.k, attention.v))
    heads = []
    for head in range(2):
        score = q[:, head] @ k[:, head].T / math.sqrt(8)
        score = score.masked_fill(torch.triu(torch.ones(8, 8, dtype=torch.bool), 1), -torch.inf)
        heads.append(score.softmax(1) @ v[:, head])
    torch.testing.assert_close(attention(x)[0], attention.o(torch.cat(heads, 1)))


def test_q_k_v_and_o_are_sparse_on_their_own():
    names = [weight.name for weight in select_weights(tiny_gpt(), exclude=["head"])]
    assert names == [
        f"layers.{i}.{n}.weight"
        for i in (0, 1)
        for n in ("attention.q", "attention.k", "attention.v", "attention.o", "fc1", "fc2")
    ]


def test_a_tied_head_is_one_weight_and_can_be_excluded():
    tied, untied = tiny_gpt(tied=True), tiny_gpt()
    assert tied.head.weight is tied.embedding.weight
    assert count(untied) - count(tied) == 256 * 16
    assert len(select_weights(tied)) == 13
    assert len(select_weights(tied, exclude=["head"])) == 12


def test_gpt_2s_initialization():
    torch.manual_seed(0)
    layer = models.gpt(width=128, depth=8).layers[3]
    assert layer.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for residual in (layer.fc2, layer.attention.o):
        assert residual.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not layer.fc1.bias.any()


def test_vit_knows_where_a_patch_lies():
    torch.manual_seed(0)
    network, x = models.vit(width=32, depth=2, heads=2).eval(), torch.randn(1, 3, 32, 32)
    moved = x.roll(4, 3)  # by one patch
    with torch.no_grad():
        assert not torch.allclose(network(x), network(moved), atol=1e-5)
        network.positions.zero_()
        torch.testing.assert_close(network(x), network(moved))
