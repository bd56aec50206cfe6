"""What to do with rows where teacher and label conflict, or where the teacher is not sure: a function of the batch.

A row disagrees where it has a label and a teacher, the teacher's most likely class is another one, and p(label) is
below a threshold. A row is unconfident where it has a teacher whose largest p is below a bound: it may lie outside of
what the teacher has learnt. p is softmax(z) at temperature 1, of calibrated logits if the rows are calibrated.

What follows are weights and missing labels or teachers, which every loss takes. Weights stand in the numerator and in
the denominator of the mean, so that it stays exact over ranks and accumulation pieces, and a row of weight 0 is as good
as absent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.store.rows import TeacherRows
from kdcache.train.cross_entropy import NO_LABEL, Labels
from kdcache.train.distributions import is_topk, log_softmax
from kdcache.train.mixed_labels import MixedLabels
from kdcache.train.policy_names import CONFIDENCE_POLICIES, DISAGREEMENT_POLICIES, RowPolicies
from kdcache.train.row_weights import per_position
from kdcache.train.soft_targets import Teacher, pseudo_labels, teacher_signal
from kdcache.train.sparse_metrics import Measured, confidence, label_log_prob
from kdcache.train.tail import DEFAULT_TAIL_TOLERANCE


@final
@dataclass(frozen=True, eq=False)
class PolicyRows:
    """What a policy makes of N rows.

    Attributes:
        chosen: (N, ...) bool, the rows that it is about.
        sample_weight: (N, ...) float32 in [0, 1]; None where all stay 1.
        labels: (N, ...) int64, -1 where the label is to be ignored; None where the labels stay.
        has_teacher: (N,) bool, False where the teacher is to be ignored; None where the rows stay.
    """

    chosen: Tensor
    sample_weight: Tensor | None = None
    labels: Tensor | None = None
    has_teacher: Tensor | None = None


@final
@dataclass(frozen=True, eq=False)
class PolicyBatch:
    """A batch after all policies: what the loss takes, and () int64 how many rows each was about."""

    teacher: TeacherRows
    labels: Labels | None
    sample_weight: Tensor | None
    disagree: Tensor
    unconfident: Tensor


def disagreement_weights(
    rows: Teacher, labels: Labels, policy: str, threshold: float = 1.0, *, among: Tensor | None = None
) -> PolicyRows:
    """Rows whose label the teacher contradicts: another class is the most likely, and p(label) < threshold.

    `keep` changes nothing. `drop` gives the row weight 0: it counts nowhere. `downweight` gives it the weight p(label),
    for both of its terms. `trust-teacher` takes its label away: it learns the teacher alone, with weight 1.

    Args:
        rows: N teacher rows, or raw logits (N, C, ...).
        labels: (N, ...) int64, -1 = none.
        policy: keep, drop, downweight or trust-teacher.
        threshold: above 0 to 1. An outvoted label has at most 0.5, so from there on all disagreement counts.
        among: (N, ...) bool, rows that may be chosen; all by default.

    Returns:
        What the loss has to be given.

    Raises:
        UsageError: a policy or threshold that cannot be meant, or labels of mixed inputs.
        MismatchError: `topk` rows that do not keep the logit of a label (where p(label) is needed).

    >>> logits = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    >>> disagreement_weights(logits, torch.tensor([0, 0]), "downweight").sample_weight
    tensor([0.1192, 1.0000])
    """
    if policy not in DISAGREEMENT_POLICIES:
        raise UsageError(f"disagreement {policy!r:.80} is not known; choose one of {', '.join(DISAGREEMENT_POLICIES)}")
    RowPolicies(threshold=threshold)
    if isinstance(labels, MixedLabels) or (isinstance(rows, TeacherRows) and rows.label_b is not None):
        raise UsageError("rows of mixed inputs have two labels: a teacher that names one of them contradicts nothing")
    top = pseudo_labels(rows)
    chosen = (labels != NO_LABEL) & (top != NO_LABEL) & (top != labels)
    if among is not None:
        chosen = chosen & among
    own = None
    if threshold < 1 or policy == "downweight":
        own = _label_probability(rows, labels.masked_fill(top == NO_LABEL, NO_LABEL))
        chosen = chosen & (own < threshold) if threshold < 1 else chosen
    if policy == "drop":
        return PolicyRows(chosen, sample_weight=(~chosen).float())
    if policy == "downweight":
        assert own is not None
        return PolicyRows(chosen, sample_weight=torch.where(chosen, own, 1.0).float())
    return PolicyRows(chosen, labels=labels.masked_fill(chosen, NO_LABEL) if policy == "trust-teacher" else None)


def confidence_weights(rows: Teacher, below: float, policy: str) -> PolicyRows:
    """Rows that the teacher is not sure of: its largest p is below a bound.

    `drop` gives the row weight 0: it counts nowhere. `downweight` gives it its largest p as weight, for both of its
    terms. `trust-label` takes its teacher away: it learns its label alone, with weight 1, or nothing without one.

    Args:
        rows: N teacher rows, or raw logits (N, C, ...).
        below: above 0 to 1.
        policy: drop, downweight or trust-label.

    Returns:
        What the loss has to be given.

    Raises:
        UsageError: a policy or bound that cannot be meant, or `trust-label` in dense prediction.

    >>> confidence_weights(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), 0.9, "drop").sample_weight
    tensor([0., 1.])
    """
    if policy not in CONFIDENCE_POLICIES:
        raise UsageError(
            f"confidence policy {policy!r:.80} is not known; choose one of {', '.join(CONFIDENCE_POLICIES)}"
        )
    RowPolicies(confidence_below=below)
    largest = _largest_probability(rows)
    taught = _taught(rows, largest)
    chosen = taught & (largest < below)
    if policy == "drop":
        return PolicyRows(chosen, sample_weight=(~chosen).float())
    if policy == "downweight":
        return PolicyRows(chosen, sample_weight=torch.where(chosen, largest, 1.0).float())
    if chosen.ndim > 1:
        raise UsageError("trust-label takes the teacher away from whole rows; in dense prediction use drop")
    return PolicyRows(chosen, has_teacher=taught & ~chosen)


def apply_policies(policies: RowPolicies, rows: TeacherRows, labels: Labels | None) -> PolicyBatch:
    """A batch with both policies applied; a row that the teacher is not sure of cannot disagree.

    Args:
        policies: what to do.
        rows: N teacher rows, of tensors.
        labels: (N, ...) int64, -1 = none, MixedLabels, or None.
    """
    none = torch.zeros((), dtype=torch.int64, device=rows.has_teacher.device)
    weight, disagree, unconfident, sure = None, none, none, None
    if policies.confidence_below is not None:
        found = confidence_weights(rows, policies.confidence_below, policies.confidence_policy)
        weight, sure, unconfident = found.sample_weight, ~found.chosen, found.chosen.sum()
        if found.has_teacher is not None:
            rows = replace(rows, has_teacher=found.has_teacher)
    is_mixed = isinstance(labels, MixedLabels) or rows.label_b is not None
    if labels is not None and not (is_mixed and policies.disagreement == "keep"):
        found = disagreement_weights(rows, labels, policies.disagreement, policies.threshold, among=sure)
        disagree = found.chosen.sum()
        labels = labels if found.labels is None else found.labels
        if found.sample_weight is not None:
            weight = found.sample_weight if weight is None else weight * found.sample_weight
    return PolicyBatch(rows, labels, weight, disagree, unconfident)


def _label_probability(rows: Teacher, labels: Tensor) -> Tensor:
    """(N, ...) p(label), 1 where there is none."""
    if isinstance(rows, TeacherRows) and is_topk(rows):
        return _close_enough(label_log_prob(rows.tensors(), 1.0, labels=labels)).exp()
    log_p = log_softmax(teacher_signal(rows).logits, 1.0)
    own = log_p.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1).exp()
    return torch.where(labels >= 0, own, 1.0)


def _largest_probability(rows: Teacher) -> Tensor:
    """(N, ...)."""
    if isinstance(rows, TeacherRows) and is_topk(rows):
        return _close_enough(confidence(rows.tensors(), 1.0))
    return log_softmax(teacher_signal(rows).logits, 1.0).amax(dim=1).exp()


def _close_enough(found: Measured) -> Tensor:
    """The value, where its error is none that matters.

    Raises:
        UsageError: temperature 1 was not stored, and the bounds at it are wide.
    """
    if found.error is not None and float(found.error.mean()) > DEFAULT_TAIL_TOLERANCE:
        raise UsageError(
            f"these topk rows tell probabilities at temperature 1 only to {float(found.error.mean()):.2g} on the mean "
            f"(at most {DEFAULT_TAIL_TOLERANCE} is taken): make them with 1 among --temperatures"
        )
    return found.value


def _taught(rows: Teacher, like: Tensor) -> Tensor:
    """(N, ...) bool, which have a teacher."""
    if isinstance(rows, TeacherRows):
        return per_position(rows.tensors().has_teacher, like).expand(like.shape)
    return torch.ones_like(like, dtype=torch.bool)
