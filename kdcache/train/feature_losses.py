"""Losses on features: the student's against the inputs of the teacher's last layer, which factored rows hold.

Where a student has another width than its teacher, `FeatureMSE` learns a projection, and `relational_distance` compares
distances between samples, which need none. Teachers' features come without a gradient, and a row without a teacher does
not count. Arithmetic is in float32 whatever the autocast (float64 stays float64).

Sources: Romero et al., FitNets, 2015 (arXiv:1412.6550), for the projected mean square; Park et al., Relational
Knowledge Distillation, 2019 (arXiv:1904.05068), for the distances.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcache.errors import MismatchError, UsageError
from kdcache.format.factored import Factored
from kdcache.store.rows import TeacherRows
from kdcache.train.reductions import Reduction, RowTerms, reduce_rows
from kdcache.train.row_weights import weight_per_position
from kdcache.train.soft_targets import Teacher


def teacher_features(teacher: Teacher, *, dtype: torch.dtype = torch.float32) -> RowTerms:
    """The inputs of the teacher's last layer, detached, and which rows have a teacher.

    Args:
        teacher: TeacherRows of a factored cache, or a plain (N, D) tensor (a live teacher's).
        dtype: float32, or float64 where the student computes in float64.

    Returns:
        (N, D) values.

    Raises:
        UsageError: rows of another encoding, which hold no features; not floats (N, D).

    >>> teacher_features(torch.ones(2, 3)).values.shape
    torch.Size([2, 3])
    """
    if isinstance(teacher, TeacherRows):
        encoding = teacher.encoding
        if not isinstance(encoding, Factored):
            raise UsageError(
                f"feature losses need the inputs of the teacher's last layer, and {encoding.name} {encoding.dtype} "
                "rows hold logits, of which no `kdcache convert` makes features: dump with `kdcache precompute "
                "--factored LAYER`"
            )
        rows = teacher.tensors()
        values: Tensor = encoding.inputs(rows.arrays)
        return RowTerms(values.to(dtype), rows.has_teacher)
    if not isinstance(teacher, Tensor) or teacher.ndim != 2 or not teacher.is_floating_point():
        shape = f" of {teacher.dtype} {tuple(teacher.shape)}" if isinstance(teacher, Tensor) else ""
        raise UsageError(
            f"a teacher's features are TeacherRows of a factored cache or floats (N, D), found a "
            f"{type(teacher).__name__}{shape}"
        )
    return RowTerms(teacher.detach().to(dtype))


def feature_cosine(
    student_features: Tensor,
    teacher: Teacher,
    *,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """1 - cos(student, teacher) of each row: directions alone, so that the two may differ in scale.

    Args:
        student_features: (N, D) floats, as wide as the teacher's.
        teacher: TeacherRows of a factored cache, or (N, D) floats.
        sample_weight: (N,) weights, not negative; all 1 by default.
        reduction: "mean" divides by the weights of the rows with a teacher, "sum" does not divide, "none" gives
            weighted rows (N,).

    Returns:
        A scalar in [0, 2], or (N,). A row whose features are all 0, on either side, has no direction: its value is 1.

    Raises:
        UsageError: rows that hold no features, or wrong shapes.
        MismatchError: widths or numbers of rows that differ.

    >>> feature_cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor(1.)
    """
    student, taught = _same_width(student_features, teacher)
    return _reduced(1 - functional.cosine_similarity(student, taught.values, dim=1), taught, sample_weight, reduction)


def feature_mse(
    student_features: Tensor,
    teacher: Teacher,
    *,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean over the features of (student - teacher)**2; arguments, shapes and errors are those of `feature_cosine`.

    >>> feature_mse(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
    tensor(5.)
    """
    student, taught = _same_width(student_features, teacher)
    return _reduced((student - taught.values).square().mean(dim=1), taught, sample_weight, reduction)


def relational_distance(
    student_features: Tensor,
    teacher: Teacher,
    *,
    sample_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """RKD-D: Huber loss between the pairwise distances of student and teacher, each divided by its mean over the batch.

    loss = mean over pairs i != j of huber(d_ij / mean d (student), d_ij / mean d (teacher)), with delta 1. Only rows
    with a teacher make pairs; the weight of a pair is the product of its rows'. (Code by the authors averages over
    i = j too, whose terms are 0: its value is smaller by (N - 1) / N.) Unlike losses of single rows it depends on how a
    batch is cut into steps or ranks.

    Args:
        student_features: (N, D') floats, of any width.
        teacher: TeacherRows of a factored cache, or (N, D) floats.
        sample_weight: (N,) weights, not negative; all 1 by default.
        reduction: "mean" over pairs; "none" gives (N,) each row's weighted mean over its partners, "sum" their sum.

    Returns:
        A scalar, or (N,); 0 where fewer than two rows have a teacher.

    Raises:
        UsageError: rows that hold no features, or wrong shapes.
        MismatchError: numbers of rows that differ.

    >>> square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> relational_distance(7 * square, square).round(decimals=6)
    tensor(0.)
    """
    student, taught = _checked(student_features, teacher)
    count = len(student)
    weight = student.new_ones(count)
    if sample_weight is not None:
        weight = weight_per_position(sample_weight, weight).to(student.dtype)
    if taught.counts is not None:
        weight = weight * taught.counts
    pairs = weight[:, None] * weight
    pairs = pairs - torch.diag(pairs.diagonal())
    huber = functional.smooth_l1_loss(_relative(student, pairs), _relative(taught.values, pairs), reduction="none")
    of_row = pairs.sum(dim=1)
    values = (huber * pairs).sum(dim=1) / torch.where(of_row > 0, of_row, 1.0)
    if reduction != "mean":
        return reduce_rows(RowTerms(values, of_row > 0), sample_weight=weight, reduction=reduction)
    total = of_row.sum()
    return (values * of_row).sum() / torch.where(total > 0, total, 1.0)


@final
class FeatureMSE(nn.Module):
    """`feature_mse` behind a learned linear map from the student's width to the teacher's.

    Its parameters train with the student's: pass them to the optimizer as well.

    Args:
        student_width: D' of the student's features.
        teacher_width: D of the teacher's.

    Raises:
        UsageError: a width below 1.

    >>> criterion = FeatureMSE(8, 16)
    >>> criterion(torch.zeros(2, 8), torch.zeros(2, 16)).shape
    torch.Size([])
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        if min(student_width, teacher_width) < 1:
            raise UsageError(f"widths of features must be at least 1, found {student_width} and {teacher_width}")
        self.projection = nn.Linear(student_width, teacher_width)

    def forward(
        self,
        student_features: Tensor,
        teacher: Teacher,
        *,
        sample_weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """The mean square of (projected student - teacher); arguments are those of `feature_mse`, errors too.

        Args:
            student_features: (N, D') floats.
            teacher: TeacherRows of a factored cache, or (N, D) floats.
            sample_weight: (N,).
            reduction: "mean", "sum" or "none".
        """
        if student_features.ndim != 2 or student_features.shape[1] != self.projection.in_features:
            raise UsageError(
                f"student features have shape {tuple(student_features.shape)}, expected "
                f"(N, {self.projection.in_features}) as the projection was made for"
            )
        projected = self.projection(student_features)
        return feature_mse(projected, teacher, sample_weight=sample_weight, reduction=reduction)


def _relative(features: Tensor, pairs: Tensor) -> Tensor:
    """(N, N) distances divided by their mean over the pairs; the gradient at distance 0 is 0."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    total = pairs.sum()
    mean = (distances * pairs).sum() / torch.where(total > 0, total, 1.0)
    return distances / torch.where(mean > 0, mean, 1.0)


def _reduced(values: Tensor, taught: RowTerms, sample_weight: Tensor | None, reduction: Reduction) -> Tensor:
    return reduce_rows(RowTerms(values, taught.counts), sample_weight=sample_weight, reduction=reduction)


def _same_width(student_features: Tensor, teacher: Teacher) -> tuple[Tensor, RowTerms]:
    student, taught = _checked(student_features, teacher)
    if student.shape != taught.values.shape:
        raise MismatchError(
            f"the student has {student.shape[1]} features, the teacher {taught.values.shape[1]}: use FeatureMSE, which "
            "learns a projection, or relational_distance, which needs none"
        )
    return student, taught


def _checked(student_features: Tensor, teacher: Teacher) -> tuple[Tensor, RowTerms]:
    """Both as floats of one type, (N, D') and (N, D)."""
    if student_features.ndim != 2 or not student_features.is_floating_point():
        raise UsageError(
            f"student features must be floats (N, D), found {student_features.dtype} {tuple(student_features.shape)}"
        )
    student = student_features if student_features.dtype == torch.float64 else student_features.float()
    taught = teacher_features(teacher, dtype=student.dtype)
    if len(taught.values) != len(student):
        raise MismatchError(f"student features of {len(student)} rows, teacher features of {len(taught.values)}")
    if taught.values.device != student.device:
        raise UsageError(
            f"student features are on {student.device}, the teacher's on {taught.values.device}: move the batch first, "
            "teacher.to(device, non_blocking=True)"
        )
    return student, taught
