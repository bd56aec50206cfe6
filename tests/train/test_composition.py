"""Losses as records, as text, and as a weighted sum in the place of the KL."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from kdcache.errors import UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.criterion import DistillationLoss
from kdcache.train.loss_records import LOSSES
from kdcache.train.loss_settings import LossSettings
from kdcache.train.loss_text import as_losses, parse_loss
from kdcache.train.losses import (
    Dist,
    Dkd,
    JensenShannon,
    Kl,
    LogitMse,
    ReverseKl,
    StandardizedKl,
    WeightedLoss,
    cross_entropy,
    dist_loss,
    dkd_loss,
    js_loss,
    kd_loss,
    logit_mse_loss,
    loss_terms,
    reverse_kl_loss,
    safe_mean,
    standardized_kd_loss,
    sum_terms,
)
from kdcache.train.schedules import Course, parse_course

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (2 * torch.randn(8, 5, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def settings(*losses: Any, alpha: float = 0.6, temperature: float = 3.0, **more: Any) -> LossSettings:
    return LossSettings(alpha, temperature, losses=as_losses(losses), **more)


def value(found: LossSettings, labels: torch.Tensor | None = LABELS, teacher: Any = TEACHER) -> torch.Tensor:
    terms, total = loss_terms(STUDENT, teacher, labels, found)
    return safe_mean(terms.sum(), total)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl", kd_loss(STUDENT, TEACHER, alpha=1.0, temperature=3.0)),
        ("kl:temperature=5", kd_loss(STUDENT, TEACHER, alpha=1.0, temperature=5.0)),
        ("kl*2", 2 * kd_loss(STUDENT, TEACHER, alpha=1.0, temperature=3.0)),
        ("reverse_kl", reverse_kl_loss(STUDENT, TEACHER, temperature=3.0)),
        ("js:beta=0.2*0.5", 0.5 * js_loss(STUDENT, TEACHER, temperature=3.0, beta=0.2)),
        ("dkd:alpha=2,beta=4", dkd_loss(STUDENT, TEACHER, LABELS, temperature=3.0, alpha=2.0, beta=4.0)),
        ("dist:gamma=2", dist_loss(STUDENT, TEACHER, gamma=2.0)),
        ("standardized_kd:temperature=4", standardized_kd_loss(STUDENT, TEACHER, temperature=4.0)),
        ("mse:centred=true", logit_mse_loss(STUDENT, TEACHER, centred=True)),
    ],
)
def test_a_loss_by_name_is_its_function(text: str, expected: torch.Tensor) -> None:
    found = value(settings(text))
    ce = cross_entropy(STUDENT, LABELS).mean()
    assert found.item() == pytest.approx((0.4 * ce + 0.6 * expected).item(), rel=1e-12)


def test_losses_add_up_with_their_weights() -> None:
    parts = [value(settings(text, alpha=1.0)) for text in ("kl", "dist", "mse")]
    found = value(settings(Kl(), WeightedLoss(Dist(), 0.5), "mse*0.1", alpha=1.0))
    assert found.item() == pytest.approx((parts[0] + 0.5 * parts[1] + 0.1 * parts[2]).item(), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda v: sum_terms(v, TEACHER, LABELS, settings("kl", "dkd*0.5", "js"))[0], (STUDENT.clone().requires_grad_(),)
    )


def test_a_sum_of_one_kl_with_weight_1_is_the_loss_as_it_always_was() -> None:
    plain = kd_loss(STUDENT, TEACHER, LABELS, alpha=0.6, temperature=3.0)
    assert value(settings("kl")) == plain
    assert DistillationLoss(0.6, 3.0, losses="kl")(STUDENT, TEACHER, LABELS) == plain


def test_the_criterion_takes_records_and_text_and_prints_them() -> None:
    criterion = DistillationLoss(0.5, 2.0, losses=[Dkd(beta=2), "js*0.5"])
    assert criterion(STUDENT, TEACHER, LABELS) == value(settings("dkd:beta=2", "js*0.5", alpha=0.5, temperature=2.0))
    assert repr(criterion) == (
        "DistillationLoss(0.5*CE + 0.5*(4*DKD(1*TCKD + 2*NCKD) + 0.5*4*JS(beta 0.5)) at temperature 2)"
    )


def test_the_criterion_masks_classes_and_moves_the_mask_along() -> None:
    mask = torch.tensor([True, True, True, True, False])
    criterion = DistillationLoss(0.5, 2.0, class_mask=mask)
    labels = LABELS.clamp(max=3)
    expected = kd_loss(STUDENT[:, :4], TEACHER[:, :4], labels, alpha=0.5, temperature=2.0)
    assert criterion(STUDENT, TEACHER, labels).item() == pytest.approx(expected.item(), rel=1e-12)
    assert not criterion.state_dict()
    assert criterion.to("meta").class_mask.device.type == "meta"


def test_the_scale_of_two_weights_is_kept() -> None:
    found = value(settings("kl", alpha=0.75, scale=4.0))
    assert found.item() == pytest.approx(4 * value(settings("kl", alpha=0.75)).item(), rel=1e-12)
    assert settings("kl", alpha=0.75, scale=4.0).formula == (
        "4*[0.25*CE + 0.75*9*KL(teacher || student)] at temperature 3"
    )


def test_a_row_without_the_label_that_its_only_loss_needs_has_no_term_at_all() -> None:
    labels = LABELS.clone()
    labels[:3] = -1
    terms, total = loss_terms(STUDENT, TEACHER, labels, settings("dkd"))
    assert total == 5
    assert (terms[:3] == 0).all()
    assert (terms[3:] != 0).all()
    terms, total = loss_terms(STUDENT, TEACHER, labels, settings("dkd", "js"))
    assert total == 8
    expected = js_loss(STUDENT[:3], TEACHER[:3], temperature=3.0, reduction="none")
    assert torch.allclose(terms[:3], expected)  # a_i = 1, and the dkd part has nothing to say


def test_without_any_label_dkd_is_0_and_the_others_stay() -> None:
    terms, total = sum_terms(STUDENT, TEACHER, None, settings("dkd", alpha=1.0))
    assert (terms.item(), total.item()) == (0, 0)
    found = value(settings("dkd", "js", alpha=1.0), labels=None)
    assert found.item() == pytest.approx(js_loss(STUDENT, TEACHER, temperature=3.0).item(), rel=1e-12)


@pytest.mark.parametrize("losses", [("kl",), ("kl", "dkd*0.5", "js:beta=0.1*2"), ("standardized_kd", "mse")])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_pieces_with_unequal_numbers_of_labels_and_teachers_sum_up_to_the_whole(
    losses: tuple[str, ...], alpha: float
) -> None:
    """What ranks and accumulation steps do: sums over pieces, one division."""
    labels = LABELS.clone()
    labels[[0, 1, 2, 6]] = -1
    has = torch.tensor([True, True, False, True, True, True, False, False])
    rows = replace(TeacherRows.from_dense(TEACHER.float()), has_teacher=has)
    chosen = settings(*losses, alpha=alpha)
    whole = value(chosen, labels, rows)
    pieces = [slice(0, 3), slice(3, 4), slice(4, 8)]
    sums = [sum_terms(STUDENT[piece], rows.take(piece), labels[piece], chosen) for piece in pieces]
    numerator, denominator = (torch.stack(part).sum() for part in zip(*sums, strict=True))
    assert (numerator / denominator).item() == pytest.approx(whole.item(), rel=1e-12)


def test_only_the_loss_of_a_batch_changes_when_the_batch_is_cut() -> None:
    for kind in LOSSES:
        chosen = settings(kind(), alpha=1.0)
        whole = value(chosen)
        sums = [sum_terms(STUDENT[piece], TEACHER[piece], LABELS[piece], chosen) for piece in (slice(4), slice(4, 8))]
        numerator, denominator = (torch.stack(part).sum() for part in zip(*sums, strict=True))
        is_same = (numerator / denominator).item() == pytest.approx(whole.item(), rel=1e-9)
        assert is_same != kind.is_of_batch, kind


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("kl", WeightedLoss(Kl())),
        (" dist : beta = 2 , gamma = 0.5 * 3 ", WeightedLoss(Dist(beta=2.0, gamma=0.5), 3.0)),
        ("mse:centred=false*1e-2", WeightedLoss(LogitMse(), 0.01)),
        ("js:temperature=2,beta=0.9", WeightedLoss(JensenShannon(temperature=2.0, beta=0.9))),
    ],
)
def test_a_text_names_a_loss(given: str, expected: WeightedLoss) -> None:
    assert parse_loss(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "'' is not known; choose one of kl, reverse_kl"),
        ("kd", "'kd' is not known"),
        ("kl:beta=1", "'beta=1' is no option of kl, expected key=value with one of: temperature"),
        ("dkd:beta", "'beta' is no option of dkd"),
        ("dkd:", "'' is no option of dkd"),
        ("dkd:beta=two", "beta is 'two', expected a number"),
        ("dkd:beta=1,beta=2", "a key is given twice"),
        ("mse:centred=1", "centred is '1', expected true or false"),
        ("kl*", "the weight is '', expected a number"),
        ("kl*0", "the weight of kl is 0.0"),
        ("kl*-1", "the weight of kl is -1.0"),
        ("kl*nan", "the weight of kl is nan"),
        ("kl:temperature=0", "temperature of kl is 0.0"),
        ("dist:temperature=-2", "temperature of dist is -2.0"),
        ("standardized_kd:temperature=inf", "temperature of standardized_kd is inf"),
        ("js:beta=1", "beta of js is 1.0"),
        ("dkd:alpha=-1", "alpha of dkd is -1.0"),
        ("dist:gamma=-1", "gamma of dist is -1.0"),
    ],
)
def test_a_text_that_names_no_loss_is_refused(given: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        parse_loss(given)


def test_a_sum_of_nothing_and_of_something_else_is_refused() -> None:
    with pytest.raises(UsageError, match="losses is empty"):
        DistillationLoss(losses=[])
    with pytest.raises(UsageError, match="a loss is a record"):
        DistillationLoss(losses=[3])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="scale is 0"):
        settings("kl", scale=0.0)
    with pytest.raises(UsageError, match="tail_tolerance is -1"):
        settings("kl", tail_tolerance=-1.0)


def test_every_record_says_its_formula_and_whose_temperature_it_takes() -> None:
    shown = {kind.name: kind().formula(4.0, None) for kind in LOSSES}
    assert shown == {
        "kl": "16*KL(teacher || student)",
        "reverse_kl": "16*KL(student || teacher)",
        "soft_ce": "16*CE(teacher, student)",
        "js": "16*JS(beta 0.5)",
        "dkd": "16*DKD(1*TCKD + 8*NCKD)",
        "dist": "1*DIST(1*inter + 1*intra) at temperature 1",
        "standardized_kd": "4*KL(z-scores) at base temperature 2",
        "mse": "MSE(logits)",
        "spread_kl": "16*KL(teacher, tail spread || student)",
    }
    assert settings(ReverseKl(temperature=2.0)).formula == "0.4*CE + 0.6*4*KL(student || teacher) at temperature 2"
    assert settings(StandardizedKl()).formula == "0.4*CE + 0.6*4*KL(z-scores) at base temperature 2"


def test_what_is_asked_for_is_checked_without_torch() -> None:
    code = "import kdcache.train.loss_text, kdcache.train.loss_settings, kdcache.train.schedules, sys"
    code += "; kdcache.train.loss_text.parse_loss('dkd:beta=2*3'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_course_starts_and_ends_exactly_and_never_turns(kind: str) -> None:
    course = Course(kind, 0.1)
    values = [course.at(step, 100, start=0.9) for step in range(100)]
    assert (values[0], values[-1]) == (0.9, 0.1)
    assert values == sorted(values, reverse=True)
    assert values[50] == pytest.approx(0.5, abs=0.02)
    assert course.at(0, 1, start=0.9) == 0.9


def test_a_course_by_name() -> None:
    assert parse_course("constant", what="x").at(7, 10, start=0.3) == 0.3
    assert parse_course("cosine:2", what="x") == Course("cosine", 2.0)
    for text in ("step:1", "linear", "constant:1", "linear:", "linear:x", "cosine:inf", ""):
        with pytest.raises(UsageError, match="x '"):
            parse_course(text, what="x")
