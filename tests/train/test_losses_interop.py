"""The loss against other people's, imported and never copied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcache.train.losses import kd_loss

STUDENT = 3 * torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
TEACHER = 3 * torch.randn(16, 10, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 10

# Both sides are float32 sums of the same terms in another order: 24 bits, some rounding steps.
RELATIVE = 1e-5


@pytest.mark.interop("torchdistill")
@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 4.0), (0.5, 1.0)])
def test_the_loss_is_that_of_torchdistill_whose_alpha_weighs_the_labels(alpha: float, temperature: float) -> None:
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    theirs = losses.KDLoss("head", "output", "head", "output", temperature=temperature, alpha=1 - alpha)
    expected = theirs({"head": {"output": STUDENT}}, {"head": {"output": TEACHER}}, LABELS)
    found = kd_loss(STUDENT, TEACHER, LABELS, alpha=alpha, temperature=temperature)
    assert found.item() == pytest.approx(expected.item(), rel=RELATIVE)


class Fixed(nn.Module):
    """A model that always gives the same logits, as timm's task wants one."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        self.num_classes, self.in_chans = logits.shape[1], 3
        self.register_buffer("logits", logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


@pytest.mark.interop("timm", "torchvision")
@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 4.0), (0.5, 1.0)])
def test_the_loss_is_that_of_timm(alpha: float, temperature: float) -> None:
    distillation = pytest.importorskip("timm.task.distillation")
    task = distillation.LogitDistillationTask(
        Fixed(STUDENT),
        Fixed(TEACHER),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=1 - alpha,
        temperature=temperature,
        verbose=False,
    )
    expected = task(torch.zeros(16, 3, 4, 4), LABELS)["loss"]
    found = kd_loss(STUDENT, TEACHER, LABELS, alpha=alpha, temperature=temperature)
    assert found.item() == pytest.approx(expected.item(), rel=RELATIVE)
