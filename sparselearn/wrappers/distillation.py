"""Self-distillation: the model before sparsity teaches the sparse one (CAST and AST)."""

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), logits [..., C], mean over all but the last dimension.

    >>> divergence(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log())  # 3/4·ln(3/2) + 1/4·ln(1/2)
    tensor(0.1308)
    """
    learned, wanted = (
        F.log_softmax(logits.flatten(0, -2).float() / temperature, dim=-1) for logits in (student, teacher)
    )
    return F.kl_div(learned, wanted, reduction="batchmean", log_target=True) * temperature**2


class SelfDistillation:
    """A mix-in for an `nn.Module`, a LightningModule for instance, that learns from what it was before sparse training.

        class Net(SelfDistillation, LightningModule):
            def __init__(self):
                super().__init__()
                self.net = pretrained()
                self.keep_teacher(self.net)

            def training_step(self, batch, index):
                x, y = batch
                logits = self.net(x)
                return self.distilled(F.cross_entropy(logits, y), logits, x)

    The teacher is frozen, in evaluation mode, and no part of `parameters()` or `state_dict()`: checkpoints do not hold
    it. Keep it in `__init__`, from the same weights each time, so that a resumed run has the same teacher.
    """

    def keep_teacher(self, teacher: nn.Module) -> None:
        """Keep a copy of `teacher` as it is now."""
        frozen = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.__dict__["_teacher"] = frozen  # past nn.Module's registration

    def distilled(
        self, loss: Tensor, logits: Tensor, *inputs: Tensor, weight: float = 2 / 3, temperature: float = 1.0
    ) -> Tensor:
        """(1 - weight)·loss + weight·`divergence` from the teacher's logits on the same inputs.

        The weight is that of AST's code (0.33 cross-entropy + 0.67 KL); CAST's own was not to be had.
        """
        teacher = cast(nn.Module, self.__dict__["_teacher"]).to(logits.device)
        with torch.no_grad():
            wanted = teacher(*inputs)
        return (1 - weight) * loss + weight * divergence(logits, wanted, temperature)
