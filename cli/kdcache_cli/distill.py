"""`kdcache distill`: train a student from a cache."""

from __future__ import annotations

from typing import Any

import kdcache
from kdcache.errors import UsageError
from kdcache.stages.distill_options import DistillOptions, resolve
from kdcache_cli.command import define
from kdcache_cli.output import emit, is_first_process


@define(
    "distill",
    record=DistillOptions,
    examples=(
        "kdcache distill --cache teacher.h5 --student mlp:64-32-10 --data digits:train --val digits:test --out runs/a",
        "kdcache distill --student mlp:64-32-10 --data digits:train --alpha 0 --out runs/labels-only",
        "kdcache distill --config run.toml --ce-weight 1 --kd-weight 1 --loss dkd:beta=8 --loss 'js:beta=0.1*0.5'",
        "kdcache distill --config run.toml --classes map.json --novel restricted",
        "torchrun --nproc-per-node 2 -m kdcache distill --config run.toml",
    ),
)
def command(as_json: bool, **options: Any) -> None:
    """Train a student on labels and the teacher's stored logits; the teacher is not loaded.

    The loss is (1-alpha)*CE + alpha*temperature^2*KL(teacher || student), or with --loss other losses in the place of
    the KL: kl, reverse_kl, soft_ce, js, dkd, dist, standardized_kd, mse, spread_kl. The same command with --resume
    goes on after an interruption, with the same weights as a run without one.
    """
    asked = resolve(DistillOptions(**options))  # usage errors come before torch is imported
    if asked.out is None:
        raise UsageError("--out is needed: a folder for the student, its metrics and its record")
    result = kdcache.distill(asked)
    if is_first_process(slurm=False):
        summary = {"out": result.out, "steps": result.steps, "last": result.last, "best": result.best}
        emit(summary, as_json=as_json)
