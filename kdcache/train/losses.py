"""The losses, as functions and as records that a weighted sum composes: everything that `kdcache.losses` offers.

    kdcache.losses.kd_loss(student_logits, teacher, labels, alpha=0.9, temperature=4.0)
    kdcache.DistillationLoss(alpha=0.5, temperature=4.0, losses=["dkd:beta=8", "dist*2"])

All take raw logits (N, C) or (N, C, ...), a teacher as `TeacherRows` or a tensor, and per-sample weights; rows without
a teacher, or without the label that a loss needs, do not count.
"""

from __future__ import annotations

from kdcache.train.binary import binary_kd
from kdcache.train.cross_entropy import NO_LABEL, Labels, cross_entropy
from kdcache.train.dist import dist_loss
from kdcache.train.divergence_losses import js_loss, reverse_kl_loss, soft_ce_loss, soft_target_kl
from kdcache.train.dkd import dkd_loss
from kdcache.train.feature_losses import FeatureMSE, feature_cosine, feature_mse, relational_distance, teacher_features
from kdcache.train.kd import hard_target_loss, kd_loss, loss_sums
from kdcache.train.kd_terms import loss_terms, sum_terms
from kdcache.train.logit_mse import logit_mse_loss
from kdcache.train.loss_records import (
    Dist,
    Dkd,
    JensenShannon,
    Kl,
    LogitMse,
    Loss,
    ReverseKl,
    SoftCrossEntropy,
    SpreadKl,
    StandardizedKl,
    WeightedLoss,
)
from kdcache.train.loss_settings import LossSettings
from kdcache.train.loss_text import parse_loss
from kdcache.train.reductions import Reduction, safe_mean
from kdcache.train.soft_targets import Teacher
from kdcache.train.spread import spread_kl_loss
from kdcache.train.standardized import standardized_kd_loss

__all__ = [
    "NO_LABEL",
    "Dist",
    "Dkd",
    "FeatureMSE",
    "JensenShannon",
    "Kl",
    "Labels",
    "LogitMse",
    "Loss",
    "LossSettings",
    "Reduction",
    "ReverseKl",
    "SoftCrossEntropy",
    "SpreadKl",
    "StandardizedKl",
    "Teacher",
    "WeightedLoss",
    "binary_kd",
    "cross_entropy",
    "dist_loss",
    "dkd_loss",
    "feature_cosine",
    "feature_mse",
    "hard_target_loss",
    "js_loss",
    "kd_loss",
    "logit_mse_loss",
    "loss_sums",
    "loss_terms",
    "parse_loss",
    "relational_distance",
    "reverse_kl_loss",
    "safe_mean",
    "soft_ce_loss",
    "soft_target_kl",
    "spread_kl_loss",
    "standardized_kd_loss",
    "sum_terms",
    "teacher_features",
]
