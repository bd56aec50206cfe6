"""What a run says of itself: the content of run.json when it begins and ends, and the lines before the first step."""

from __future__ import annotations

import sys
from typing import Any

import torch

from kdcache.stages.class_maps import novel_record
from kdcache.stages.distill_loop import RunJob
from kdcache.stages.distill_options import portable
from kdcache.stages.loss_options import needs_teacher
from kdcache.stages.models import CNN, MLP
from kdcache.stages.policy_options import policy_record
from kdcache.stages.run_record import describe_source, now
from kdcache.stages.student_views import views_line
from kdcache.stages.switching import shown
from kdcache.stages.training import State
from kdcache.store.versions import versions


def new_record(job: RunJob) -> dict[str, Any]:
    """The content of run.json when a run begins."""
    trainer = job.trainer
    return {
        "status": "running",
        "started": now(),
        "options": portable(job.options),
        "formula": trainer.objective.formula,
        "calibration": None if job.source.calibration is None else job.source.calibration.describe(),
        **({} if job.source.classes is None else {"classes": job.source.classes.describe()}),
        "student": {
            "spec": portable(job.options)["student"] or type(trainer.student).__name__,
            "classes": trainer.num_classes,
            "parameters": sum(parameter.numel() for parameter in trainer.student.parameters()),
            "recipe": trainer.student.recipe if isinstance(trainer.student, MLP | CNN) else None,
        },
        "data": describe_source(job.source),
        **({} if job.source.labels is None else {"labels": job.source.labels.describe()}),
        "val": None if job.held_out is None else describe_source(job.held_out),
        "total_steps": job.total_steps,
        "steps_per_epoch": trainer.order.steps_per_epoch,
        "world_size": trainer.team.world_size,
        "device": trainer.team.device.type,
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "torch": torch.__version__},
        "identity": job.identity,
    }


def results(job: RunJob, state: State) -> dict[str, Any]:
    """What came out so far, which the record gets when a run ends or is stopped."""
    found = {"steps": state.step, "train_seconds": round(state.seconds, 3), "last": state.last, "best": state.best}
    return {
        **found,
        **policy_record(job.trainer.policies, state.policy_rows),
        **novel_record(job.source, state.novel_rows),
        **shown(state.versions, job.refresh),
    }


def announce(job: RunJob, state: State) -> None:
    """Says on stderr what is about to be trained; the first rank does, unless it is to be quiet."""
    if not job.trainer.team.is_first or job.options.quiet:
        return
    order, lines = job.trainer.order, [f"loss = {job.trainer.objective.formula}"]
    lines += job.trainer.objective.notes(world_size=job.trainer.team.world_size)
    lines += [] if job.trainer.policies is None else job.trainer.policies.notes
    calibration = job.source.calibration
    if calibration is not None:
        divisor = calibration.calibration.temperature
        lines.append(f"the teacher's logits are calibrated first ({calibration.method}): divided by {divisor:.4g}")
    lines += [] if job.source.teachers is None else job.source.teachers.notes
    lines += [] if job.source.classes is None else [job.source.classes.note]
    lines += job.tail
    if job.refresh is not None:
        first = "; labels alone until then" if job.source.cache is None else ""
        lines.append(f"another version of the teacher every {job.refresh.every} epochs{first}")
    lines += [] if job.source.labels is None else [job.source.labels.note]
    if not needs_teacher(job.options) and job.source.cache is not None and not job.options.hard_targets:
        lines.append("rows without a label learn from the teacher all the same; leave out --cache for labels only")
    lines.append(
        f"{len(order.positions):,} rows, {order.steps_per_epoch:,} steps an epoch, {job.total_steps:,} steps in all"
        + (f"; going on after step {state.step:,}" if state.step else "")
    )
    lines += [] if job.source.views is None else [views_line(job.source.views, job.source.cache)]
    print("\n".join(lines), file=sys.stderr, flush=True)
