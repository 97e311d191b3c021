"""Structures on a CUDA device choose the masks that they choose on the CPU (`pytest -m gpu`)."""

import math

import pytest
import torch

from sparselearn.structures import NM, VNM, Block, ConstantFanIn, HierarchicalNM, TransposableNM, Unstructured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
VALUES = torch.tensor([-1.0, -0.0, 0.0, 0.5, 2.0, 2.0])
STRUCTURES = [
    Unstructured(),
    NM(2, 4),
    NM(3, 7, remainder="dense"),
    NM(1, 32, dim=0),
    HierarchicalNM((3, 4), (2, 4)),
    VNM(16, 2, 8),
    Block(4, 8),
    ConstantFanIn(),
    ConstantFanIn(group=5),
    TransposableNM(2, 4),
    TransposableNM(4, 8),
    TransposableNM(3, 8, exact=True),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize("shape", [(64, 96), (32, 64, 3, 3)])
def test_equal_masks_on_cpu_and_gpu(structure, shape):
    g = torch.Generator().manual_seed(0)
    tied = VALUES[torch.randint(len(VALUES), shape, generator=g)]
    for score in (torch.randn(shape, generator=g), tied, torch.zeros(shape)):
        nnz = structure.budget(score.shape, 0.3)
        keep = structure.topk(torch.rand(shape, generator=g), nnz) & (torch.rand(shape, generator=g) < 0.7)
        for kept in (None, keep):
            expected = structure.topk(score, nnz, kept)
            mask = structure.topk(score.cuda(), nnz, None if kept is None else kept.cuda())
            assert mask.is_cuda
            structure.check(mask, nnz)
            assert torch.equal(mask.cpu(), expected)
        assert torch.equal(structure.pool(score.cuda()).cpu(), structure.pool(score))


def test_forbidden_weights_on_the_gpu():
    score = torch.randn(64, 64)
    support = TransposableNM(4, 8).topk(torch.rand(64, 64), 2048)
    mask = TransposableNM(4, 8).topk(score.masked_fill(~support, -math.inf).cuda(), 2048)
    assert torch.equal(mask.cpu(), support)
