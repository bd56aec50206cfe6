"""What a finished run measures of its student, once: what a report needs beside the metrics of each evaluation.

On the validation data all rows: accuracy by class, confusions, likelihood and calibration, and where they have a cache
the agreement with the teacher. On some of the training rows, in the view of the last epoch: accuracy and agreement. How
close a student gets to its teacher on rows that it was trained on says what it has room for; held-out rows add how well
that carries over. Both are of the weights at the end (last.pt).

The cost: one more pass over the validation data, and of the training rows at most 2,000 and at most one for 50 that
were trained on, forward only. Ranks share the rows, and every one ends with the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.stages import checkpoint
from kdcache.stages.amp import autocast
from kdcache.stages.batches import Batch, take_apart
from kdcache.stages.calling import call_model
from kdcache.stages.distill_inputs import Source
from kdcache.stages.distill_loop import RunJob, as_saved, batches_in_order
from kdcache.stages.objective import masked_kl
from kdcache.stages.order import permutation
from kdcache.stages.training import State, Trainer
from kdcache.train.calibration_metrics import Bins, equal_mass_bins, equal_width_bins
from kdcache.train.capability import Service, service
from kdcache.train.class_part import top_class_over
from kdcache.train.teacher_statistics import confusions

TRAINING_ROWS = 2000
TRAINED_FOR_ONE = 50  # rows that a run was trained on (each epoch anew) for one that is measured
_SAMPLE_EPOCH = 2**32 - 1  # no epoch that a run comes to
_ECE = ("equal_width", "equal_mass")
_DENSE = "the student's predictions are dense: more than one a row"
# What is kept of a row, in this order; -1 for no label or teacher, NaN for a divergence that cannot be told.
_COLUMNS = ("label", "top", "confidence", "nll", "brier", "agreeing", "teacher", "kl")


def final_measures(job: RunJob, state: State) -> dict[str, Any]:
    """The measures of a run whose training is done; every rank calls it. The student is left in its mode.

    Returns:
        `weights`, `last`; `val` and `train`, each as `summary` gives it, None where there is nothing to measure, and
        `missing` says why. Random generators are left as they were.
    """
    source, trainer = as_saved(job, state)  # of a cache in versions, the last one
    measures: dict[str, Any] = {"weights": "last", "val": None, "train": None, "missing": {}}
    trainer.team.copy_from_first(list(trainer.student.buffers()))
    was_training = trainer.student.training
    trainer.student.eval()
    try:
        with checkpoint.own_generators(job.options.seed, trainer.team.device), torch.no_grad():
            if job.held_out is None:
                measures["missing"]["val"] = "the run had no --val"
            else:
                found = _measure(job, trainer, job.held_out, job.held_out.positions)
                measures["val"] = found and summary(found, trainer.num_classes)
                if found is None:
                    measures["missing"]["val"] = _DENSE
            sample = training_sample(job)
            if not len(sample):
                measures["missing"]["train"] = f"fewer than {TRAINED_FOR_ONE} rows were trained on"
            else:
                if source.items is not None:
                    source.items.set_epoch(trainer.order.epoch(job.total_steps - 1))
                found = _measure(job, trainer, source, sample)
                measures["train"] = found and _of_training(found)
                if found is None:
                    measures["missing"]["train"] = _DENSE
    finally:
        trainer.student.train(was_training)
    return measures


def training_sample(job: RunJob) -> np.ndarray:
    """Which training rows are measured: positions in the data set, ascending, drawn by the seed of the run."""
    order, positions = job.trainer.order, job.trainer.order.positions
    epochs, steps = divmod(job.total_steps, order.steps_per_epoch)
    of_epoch = min(len(positions), order.steps_per_epoch * order.batch_size)
    trained = epochs * of_epoch + min(steps * order.batch_size, of_epoch)
    rows = min(TRAINING_ROWS, len(positions), trained // TRAINED_FOR_ONE)
    chosen: np.ndarray = np.sort(positions[permutation(job.options.seed, _SAMPLE_EPOCH, len(positions))[:rows]])
    return chosen


def summary(found: dict[str, np.ndarray], num_classes: int) -> dict[str, Any]:
    """What rows say together.

    Args:
        found: (N,) for each of the columns.
        num_classes: C.

    Returns:
        `rows`; of the labelled ones `labelled`, `accuracy`, `nll` (nats), `brier` (0 to 2), `ece` (`equal_width` and
        `equal_mass`), `confidence`, `reliability` (15 bins) and by class, in their order, `class_rows`,
        `class_correct` and `class_predicted`; `confusions`, the most frequent first; and what `_fidelity` adds.
    """
    labelled = found["label"] >= 0
    measured: dict[str, Any] = {"rows": len(labelled), "labelled": int(labelled.sum())}
    if labelled.any():
        label, top = found["label"][labelled].astype(np.int64), found["top"][labelled].astype(np.int64)
        right, sure = label == top, found["confidence"][labelled]
        measured |= {
            "accuracy": float(right.mean()),
            "nll": _finite(found["nll"][labelled].mean()),
            "brier": _finite(found["brier"][labelled].mean()),
            "confidence": _finite(sure.mean()),
            **_calibration(sure, right),
            "class_rows": np.bincount(label, minlength=num_classes).tolist(),
            "class_correct": np.bincount(label[right], minlength=num_classes).tolist(),
            "class_predicted": np.bincount(top, minlength=num_classes).tolist(),
            "confusions": confusions(label, top, num_classes, by="student"),
        }
    return measured | _fidelity(found)


def _of_training(found: dict[str, np.ndarray]) -> dict[str, Any]:
    labelled = found["label"] >= 0
    measured: dict[str, Any] = {"rows": len(labelled), "labelled": int(labelled.sum())}
    if labelled.any():
        measured["accuracy"] = float((found["label"] == found["top"])[labelled].mean())
    return measured | _fidelity(found)


def _fidelity(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """`taught` rows have a teacher; `agreement` is of them, `kl` of those whose rows can tell it (nats, at T = 1).

    A teacher that does not know all classes is agreed with among those that it knows, which its term is about too.
    """
    taught = found["teacher"] >= 0
    if not taught.any():
        return {}
    divergences = found["kl"][taught & np.isfinite(found["kl"])]
    return {
        "taught": int(taught.sum()),
        "agreement": float((found["teacher"] == found["agreeing"])[taught].mean()),
        "kl": float(divergences.mean()) if len(divergences) else None,
    }


def _calibration(sure: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """`ece` and `reliability`; a row whose logits are NaN has no confidence, and with it there is no ECE."""
    told = np.isfinite(sure)
    if not told.any():
        return {"ece": dict.fromkeys(_ECE), "reliability": []}
    width, mass = equal_width_bins(sure[told], right[told]), equal_mass_bins(sure[told], right[told])
    errors = (width.error, mass.error) if told.all() else (None, None)
    return {"ece": dict(zip(_ECE, errors, strict=True)), "reliability": _reliability(width)}


def _reliability(bins: Bins) -> list[dict[str, float]]:
    parts = zip(bins.edges[:-1], bins.edges[1:], bins.counts, bins.confidence, bins.accuracy, strict=True)
    names = ("low", "high", "rows", "confidence", "accuracy")
    return [dict(zip(names, part, strict=True)) for part in parts]


def _measure(job: RunJob, trainer: Trainer, source: Source, positions: np.ndarray) -> dict[str, np.ndarray] | None:
    """(N,) float64 for each column, over the ranks; None for dense predictions."""
    team, is_held_out = trainer.team, source is job.held_out
    teaching = trainer.held_out_teaching if is_held_out else trainer.teaching
    start = sum(len(share) for share in np.array_split(positions, team.world_size)[: team.rank])
    table = torch.zeros(len(positions), len(_COLUMNS), dtype=torch.float64)  # ranks fill their own rows
    is_dense = False
    for collated in batches_in_order(job, source, positions):
        batch = take_apart(collated, has_teacher=source.cache is not None)
        batch = batch.to(team.device, num_classes=trainer.num_classes)
        with autocast(trainer.amp, team.device):
            logits = call_model(trainer.student, batch.inputs, what="student")
        is_dense = logits.ndim > 2
        if is_dense:
            break
        if trainer.labels is not None and not is_held_out:  # labels that were not learnt do not count
            batch = trainer.labels.hide(batch, positions[start : start + len(logits)])
        columns = _columns(logits.float(), batch.taught(teaching, step=0)).cpu()
        table[start : start + len(columns)] = columns
        start += len(columns)
    if team.any([is_dense])[0]:
        return None
    if team.world_size > 1:
        table = team.sum(table.to(team.device)).cpu()
    return dict(zip(_COLUMNS, table.numpy().T, strict=True))


def _columns(logits: Tensor, batch: Batch) -> Tensor:
    """(N, columns) of logits (N, C)."""
    p = torch.softmax(logits, dim=1)
    confidence, top = p.max(dim=1)
    nothing = torch.full_like(confidence, -1)
    label = batch.labels if isinstance(batch.labels, Tensor) else None  # of mixed views no one class is right
    own = torch.zeros_like(top) if label is None else label.clamp(min=0)
    own_p = p.gather(1, own[:, None]).squeeze(1)
    teacher, divergence = nothing, torch.full_like(confidence, math.nan)
    if batch.teacher is not None:
        if service("top1", batch.teacher) is not Service.NO:
            found_class = batch.teacher.encoding.top_class(batch.teacher.arrays)
            teacher = torch.where(torch.as_tensor(batch.teacher.has_teacher, device=top.device), found_class, -1)
        found = masked_kl(logits, batch, temperature=1.0)
        if found is not None:
            divergence = torch.where(found[1], found[0], math.nan)
    parts = (
        nothing if label is None else label,
        logits.argmax(dim=1),
        confidence,
        -torch.log_softmax(logits, dim=1).gather(1, own[:, None]).squeeze(1),
        p.square().sum(dim=1) - 2 * own_p + 1,
        top_class_over(logits, batch.teacher_classes),
        teacher,
        divergence,
    )
    kind = torch.float32 if logits.device.type == "mps" else torch.float64
    return torch.stack([part.to(kind) for part in parts], dim=1)


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
