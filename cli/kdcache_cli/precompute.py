"""`kdcache precompute`: run a teacher over a data set and store its logits."""

from __future__ import annotations

from typing import Any

import kdcache
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache_cli.command import define
from kdcache_cli.output import emit, is_first_process


@define(
    "precompute",
    record=PrecomputeOptions,
    examples=(
        "kdcache precompute --teacher networks:wide --weights wide.safetensors --data digits:train --out teacher.h5",
        "kdcache precompute --teacher pt2:wide.pt2 --data folder:photos --out teacher/ --device cuda --amp bf16",
        "kdcache precompute --teacher networks:wide --data npz:train.npz --out teacher/ --dry-run",
        "torchrun --nproc-per-node 8 -m kdcache precompute --config run.toml",
    ),
)
def command(as_json: bool, **options: Any) -> None:
    """Run a teacher once over a data set and store its raw logits.

    The same command goes on after an interruption, and may run in any number of processes at once: each takes the
    next free shard. Batch size and threads belong to the dump, ranks and workers do not.
    """
    from kdcache.stages.precompute import summary

    result = kdcache.precompute(options=PrecomputeOptions(**options))
    if is_first_process():
        emit(summary(result), as_json=as_json)
