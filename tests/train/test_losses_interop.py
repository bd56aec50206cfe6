"""The loss against other people's, imported and never copied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcache.train.losses import dist_loss, dkd_loss, kd_loss, standardized_kd_loss

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


def extremes() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random logits, large ones, nearly equal ones, and two classes."""
    return [
        (STUDENT, TEACHER),
        (30 * STUDENT, 30 * TEACHER),
        (STUDENT, STUDENT + 1e-2 * TEACHER),
        (STUDENT[:, :2], TEACHER[:, :2]),
    ]


def torchdistills(loss: nn.Module, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = loss({"head": {"output": student}}, {"head": {"output": teacher}}, LABELS % student.shape[1])
    return found


def agree(found: torch.Tensor, expected: torch.Tensor, student: torch.Tensor) -> None:
    """Values and gradients; theirs is computed in float64, since float32 would measure their rounding."""
    assert found.item() == pytest.approx(expected.item(), rel=RELATIVE, abs=RELATIVE)
    ours, theirs = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found, expected))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=RELATIVE)


@pytest.mark.interop("torchdistill")
@pytest.mark.parametrize(("student", "teacher"), extremes())
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_that_of_torchdistill_on_extreme_logits(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> None:
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    v = student.double().requires_grad_()
    theirs = losses.KDLoss("head", "output", "head", "output", temperature=temperature, alpha=0.3)
    found = kd_loss(v, teacher.double(), LABELS % v.shape[1], alpha=0.7, temperature=temperature)
    agree(found, torchdistills(theirs, v, teacher.double()), v)


@pytest.mark.interop("torchdistill")
@pytest.mark.parametrize(("student", "teacher"), extremes())
@pytest.mark.parametrize(("temperature", "beta", "gamma"), [(1.0, 1.0, 1.0), (4.0, 2.0, 0.5)])
def test_dist_is_that_of_torchdistill(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, beta: float, gamma: float
) -> None:
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    v = student.double().requires_grad_()
    theirs = losses.DISTLoss("head", "output", "head", "output", beta=beta, gamma=gamma, tau=temperature)
    found = dist_loss(v, teacher.double(), temperature=temperature, beta=beta, gamma=gamma)
    agree(found, torchdistills(theirs, v, teacher.double()), v)


@pytest.mark.interop("torchdistill")
@pytest.mark.parametrize(("student", "teacher"), extremes())
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_standardised_kd_is_that_of_torchdistill_which_divides_by_one_class_less(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> None:
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    v = student.double().requires_grad_()
    # Their alpha weighs the labels, and their beta the other term with its factor.
    theirs = losses.LogitStdKDLoss(
        "head", "output", "head", "output", temperature=temperature, alpha=0.5, beta=9.0, eps=0.0
    )
    soft = standardized_kd_loss(v, teacher.double(), temperature=temperature, ddof=1)
    found = 0.5 * nn.functional.cross_entropy(v, LABELS % v.shape[1]) + 9.0 * soft
    agree(found, torchdistills(theirs, v, teacher.double()), v)


@pytest.mark.interop("torchdistill")
def test_dkd_with_the_weight_that_couples_its_parts_is_the_kd_of_torchdistill() -> None:
    """No package here has DKD. By its definition (equation 4) alpha = 1 and beta = 1 - p_target make it plain KD."""
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    theirs = losses.KDLoss("head", "output", "head", "output", temperature=4.0, alpha=0.0)  # without the 16 then
    for row in range(16):
        v, z, label = STUDENT[row : row + 1].double(), TEACHER[row : row + 1].double(), LABELS[row : row + 1]
        left = 1 - torch.softmax(z / 4, dim=1)[0, label].item()
        expected = theirs({"head": {"output": v}}, {"head": {"output": z}}, label)
        found = dkd_loss(v, z, label, temperature=4.0, alpha=1.0, beta=left)
        assert found.item() == pytest.approx(16 * expected.item(), rel=RELATIVE)
