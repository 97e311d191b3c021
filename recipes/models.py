"""The recipes' networks. ImageNet's ResNet-50, MobileNet-v2 and ViT-B/16 are torchvision's own, under its names."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(sizes: Sequence[int] = (64, 256, 256, 10)) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet5(classes: int = 10) -> nn.Sequential:
    """LeNet-5-Caffe for 28x28 images: conv 20, conv 50, fc 500 (431k weights)."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, classes),
    )  # fmt: skip


class _Residual(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(depth: int = 20, width: int = 16, channels: int = 1, classes: int = 10) -> nn.Sequential:
    """The CIFAR ResNet of He et al. (arXiv 1512.03385, §4.2), depth = 6n + 2, with 1x1 shortcuts: 272k weights."""
    n = (depth - 2) // 6
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    n_in = width
    for stage in range(3):
        for block in range(n):
            n_out = width * 2**stage
            layers.append(_Residual(n_in, n_out, 2 if stage > 0 and block == 0 else 1))
            n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes))


def _he(network: nn.Module) -> None:
    """He initialization of the convolutions (arXiv 1502.01852) by fan-out, as torchvision's ResNet has it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _small_stem(network: nn.Module) -> nn.Module:
    """torchvision's ResNet for images of 32x32: the stem is one 3x3 convolution, without stride and pooling."""
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    _he(network.conv1)
    return network


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 (arXiv 1512.03385) with the stem for 32x32 images: 11.17M parameters."""
    from torchvision import models

    return _small_stem(models.resnet18(num_classes=classes))


def resnet50(classes: int = 10) -> nn.Module:
    """ResNet-50 (arXiv 1512.03385) with the stem for 32x32 images: 23.52M parameters."""
    from torchvision import models

    return _small_stem(models.resnet50(num_classes=classes))


class _Wide(nn.Module):
    """BN-ReLU-conv twice with dropout between; a changed shape takes a 1x1 shortcut from the first ReLU."""

    def __init__(self, n_in: int, n_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(n_in), nn.BatchNorm2d(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if n_in != n_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(self.dropout(torch.relu(self.norm2(self.conv1(y)))))
        return y + skip  # type: ignore[no-any-return]


def wrn(depth: int = 22, width: int = 2, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """Wide ResNet (arXiv 1605.07146), depth = 6n + 4: WRN-22-2 has 1.08M parameters, WRN-28-10 36.5M."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    n_in = 16
    for stage in range(3):
        for block in range((depth - 4) // 6):
            n_out = 16 * width * 2**stage
            layers.append(_Wide(n_in, n_out, 2 if stage > 0 and block == 0 else 1, dropout))
            n_in = n_out
    head = [nn.BatchNorm2d(n_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes)]
    network = nn.Sequential(*layers, *head)
    _he(network)
    return network


VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512)  # 0 halves the size


def vgg19(classes: int = 10) -> nn.Sequential:
    """VGG-19 (arXiv 1409.1556) for 32x32 images: batch norm, one linear layer; 20.0M parameters."""
    layers: list[nn.Module] = []
    n_in = 3
    for n_out in VGG19:
        if n_out == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(n_in, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
            n_in = n_out
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes))
    _he(network)
    return network


MOBILENET_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def mobilenet_v1(classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    """MobileNet-v1 (arXiv 1704.04861, Table 1): depthwise 3x3 and pointwise convolutions; 4.23M parameters.

    Differs: widths are rounded down to whole channels, not to multiples of 8 (equal for width = 1).
    """

    def conv(n_in: int, n_out: int, size: int, stride: int, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(n_in, n_out, size, stride, size // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(n_out), nn.ReLU()]

    n_in = int(32 * width)
    layers = conv(3, n_in, 3, 2)
    for channels, stride in MOBILENET_V1:
        n_out = int(channels * width)
        layers += conv(n_in, n_in, 3, stride, groups=n_in) + conv(n_in, n_out, 1, 1)
        n_in = n_out
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes))
    _he(network)
    return network


class _Attention(nn.Module):
    """Multi-head attention with a Linear layer each for q, k, v and o, so that each is sparse on its own."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, width]
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """A pre-norm transformer layer; the hidden layer is four times as wide."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, causal)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)))))  # type: ignore[no-any-return]


class _Transformer(nn.Module):
    """Learned positions, layers, a final norm and a head. GPT-2's initialization (see `gpt`)."""

    def __init__(
        self, tokens: int, width: int, depth: int, heads: int, outputs: int, causal: bool, dropout: float
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.layers = nn.Sequential(*(_Layer(width, heads, causal, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith((".o", ".fc2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if residual else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] of embedded tokens of the same shape."""
        return self.norm(self.layers(x + self.positions[: x.shape[1]]))  # type: ignore[no-any-return]


class _ViT(_Transformer):
    def __init__(self, patch: int, channels: int, tokens: int, width: int, **options: int | float | bool) -> None:
        super().__init__(tokens, width, **options)  # type: ignore[arg-type]
        self.patches = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.patches(x).flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


def vit(
    size: int = 32, patch: int = 4, channels: int = 3, classes: int = 10, width: int = 192, depth: int = 6,
    heads: int = 3, dropout: float = 0.0,
) -> nn.Module:  # fmt: skip
    """A small vision transformer (arXiv 2010.11929) for images of 28x28 or 32x32: 2.7M parameters.

    Differs: the mean over the patches takes the place of the class token; initialization as `gpt`.
    """
    return _ViT(
        patch, channels, (size // patch) ** 2, width, depth=depth, heads=heads, outputs=classes, causal=False,
        dropout=dropout,
    )  # fmt: skip


class _GPT(_Transformer):
    def __init__(self, vocabulary: int, context: int, width: int, tied: bool, **options: int | float | bool) -> None:
        super().__init__(context, width, outputs=vocabulary, causal=True, **options)  # type: ignore[arg-type]
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(self.embedding(tokens)))  # type: ignore[no-any-return]


def gpt(
    vocabulary: int = 256, context: int = 256, width: int = 512, depth: int = 6, heads: int = 8, dropout: float = 0.0,
    tied: bool = False,
) -> nn.Module:  # fmt: skip
    """A small GPT: int64 tokens [batch, <= context] to logits [batch, tokens, vocabulary].

    Pre-norm, learned positions, GELU, causal attention; weights from N(0, 0.02²), those that write to the residual
    stream from N(0, 0.02² / 2·depth) (GPT-2, Radford et al. 2019, §2.3). 18.9M weights in the layers by default.

    Args:
        tied: the head shares the embedding's weight.
    """
    return _GPT(vocabulary, context, width, tied, depth=depth, heads=heads, dropout=dropout)
