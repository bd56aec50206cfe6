"""Measures a student on held-out rows: accuracy, likelihood, and fidelity to the teacher.

Fidelity is not accuracy: a student can agree with its teacher where both are wrong. Both are reported,
on rows that neither the loss nor the order of training has seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.stages.amp import autocast
from kdcache.stages.batches import Batch, take_apart
from kdcache.stages.calling import call_model
from kdcache.stages.objective import Objective, masked_kl
from kdcache.stages.parallel import Team
from kdcache.stages.training import Trainer
from kdcache.train.capability import Service, service
from kdcache.train.class_part import top_class_over
from kdcache.train.cross_entropy import cross_entropy
from kdcache.train.row_weights import per_position

# What `evaluate` counts, in this order.
COUNTS = ("loss", "weight", "nll", "correct", "labelled", "kl", "agree", "taught", "measured")


def batches_of_rank(positions: np.ndarray, batch_size: int, team: Team) -> list[list[int]]:
    """This rank's share of the held-out rows, in order, cut into batches; may be empty."""
    share = np.array_split(positions, team.world_size)[team.rank]
    return [share[start : start + batch_size].tolist() for start in range(0, len(share), batch_size)]


def evaluate(trainer: Trainer, batches: Iterable[Any], objective: Objective, *, has_teacher: bool) -> dict[str, float]:
    """Metrics over the batches of all ranks; the student is left in training mode.

    Returns:
        `val_loss` (the training objective), and where rows have a label `val_nll` (nats) and
        `val_accuracy`, where they have a teacher `agreement` (share of rows with the same top class among those that
        the teacher knows) and `teacher_kl` (mean KL(teacher || student) at temperature 1, nats; of top-k rows that of
        the bucketed distributions, left out where they cannot tell). Dense prediction counts positions.
    """
    student, team = trainer.student.eval(), trainer.team
    counts = torch.zeros(len(COUNTS), dtype=torch.float32 if team.device.type == "mps" else torch.float64)
    counts = counts.to(team.device)
    with torch.no_grad():
        for collated in batches:
            batch = take_apart(collated, has_teacher=has_teacher).to(team.device, num_classes=trainer.num_classes)
            batch = batch.taught(trainer.held_out_teaching, step=0)
            with autocast(trainer.amp, team.device):
                logits = call_model(student, batch.inputs, what="student")
            counts += torch.stack(_counts(logits.float(), batch, objective)).to(counts.dtype)
    student.train()
    return _metrics(dict(zip(COUNTS, team.sum(counts).tolist(), strict=True)))


def _counts(logits: Tensor, batch: Batch, objective: Objective) -> list[Tensor]:
    zero = logits.new_zeros(())
    loss, weight = objective.sums(logits, batch)
    found = [loss, weight, *[zero] * 7]
    top = logits.argmax(dim=1)
    if batch.labels is not None:
        assert isinstance(batch.labels, Tensor)  # validation data are never mixed
        labelled = batch.labels >= 0
        found[2:5] = cross_entropy(logits, batch.labels).sum(), (top == batch.labels).sum(), labelled.sum()
    if batch.teacher is not None and service("top1", batch.teacher) is not Service.NO:
        agrees = top_class_over(logits, batch.teacher_classes) == batch.teacher.encoding.top_class(batch.teacher.arrays)
        taught = per_position(batch.teacher.has_teacher, agrees).expand(agrees.shape)
        found[6:8] = (agrees & taught).sum(), taught.sum()
    if batch.teacher is not None:
        divergence = masked_kl(logits, batch, temperature=1.0)
        if divergence is not None:
            found[5], found[8] = divergence[0].sum(), divergence[1].sum()
    return [value.to(torch.float32) for value in found]


def _metrics(counts: dict[str, float]) -> dict[str, float]:
    metrics = {}
    if counts["weight"]:
        metrics["val_loss"] = counts["loss"] / counts["weight"]
    if counts["labelled"]:
        metrics["val_nll"] = counts["nll"] / counts["labelled"]
        metrics["val_accuracy"] = counts["correct"] / counts["labelled"]
    if counts["taught"]:
        metrics["agreement"] = counts["agree"] / counts["taught"]
    if counts["measured"]:
        metrics["teacher_kl"] = counts["kl"] / counts["measured"]
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def is_better(metrics: dict[str, float], best: dict[str, float]) -> bool:
    """Whether an evaluation beats the best so far: by accuracy, without labels by agreement; a tie does not."""
    key = next((key for key in ("val_accuracy", "agreement") if key in metrics), None)
    if key is None:
        return bool(metrics) and not best
    return metrics[key] > best.get(key, -math.inf)
