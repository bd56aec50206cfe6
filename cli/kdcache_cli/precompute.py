"""`kdcache precompute`: run a teacher over a data set and store its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kdcache
from kdcache.errors import UsageError
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
    asked = PrecomputeOptions(**options)  # usage errors come before torch is imported
    if asked.out is None:
        raise UsageError("--out is needed: a folder for the cache, or a name ending in .h5 for one file")
    from kdcache.stages.asked_plan import check_path

    check_path(asked.out, asked)  # so does the refusal of a path that holds another dump
    from kdcache.stages.precompute import summary

    result = summary(kdcache.precompute(options=asked))
    if is_first_process(slurm=True):
        emit(result, as_json=as_json, text=cost_text(result) if asked.dry_run else done_text(result))


def done_text(result: Mapping[str, Any]) -> str:
    """What was done, for people."""
    times = f" x {result['views']} views" if result["views"] > 1 else ""
    lines = [
        f"{result['path']}: {result['samples']:,} samples{times}, {size_text(result['bytes'])}",
        f"computed here: {result['computed']:,} rows in {time_text(result['seconds'])} "
        f"({result['rows_per_second']:,.0f} rows/s)"
        if result["computed"]
        else "computed here: nothing, all of it was there",
    ]
    lines += [f"note: {note}" for note in result["notes"]]
    if result["growth"] is not None:
        lines.append(growth_text(result["growth"]))
    if result["finished"]:
        lines.append(f"root hash: {result['root']}")
    else:
        lines.append("not finished: the shards of this process are done, others (--shard) are not")
    return "\n".join(lines)


def growth_text(growth: Mapping[str, Any]) -> str:
    """What came to a cache, and labels that changed meanwhile, for people."""
    text = f"added {growth['samples_added']:,} samples to the {growth['samples_before']:,} that were there"
    if not growth["labels_changed"]:
        return text
    more = ", ..." if growth["labels_changed"] > len(growth["changed_ids"]) else ""
    return (
        f"{text}\nlabels changed: {growth['labels_changed']:,} of the {growth['labels_compared']:,} compared "
        f"({', '.join(map(str, growth['changed_ids']))}{more}). The cache keeps the labels that it has, and a run "
        "stops at a sample whose two labels differ; `kdcache convert --labels FILE.csv` makes one with the new labels"
    )


def cost_text(result: Mapping[str, Any]) -> str:
    """What a dump would cost, for people."""
    students = result["break_even_students"]
    lines = "\n".join(
        [
            "nothing was written (--dry-run)",
            f"size:      {size_text(result['bytes'])} for {result['rows']:,} rows of {result['bytes_per_row']:,} bytes",
            f"shards:    {result['shards']:,}",
            f"free disk: {size_text(result['free_bytes'])}",
            f"speed:     {result['rows_per_second']:,.0f} rows/s in this process, loading included",
            f"time:      about {time_text(result['seconds'])} for one process",
            f"pays off:  after {result['break_even_epochs']:.3g} epochs with a live teacher, that is with student "
            f"number {students} of {result['epochs']} epochs",
        ]
    )
    for one in result["captured"]:
        share = 100 * one["kl_share"][0]
        lines += (
            f"\ncaptured:  {100 * one['mass']:.3g} % of the mass, {share:.3g} % of the KL at T = {one['temperature']:g}"
        )
    if any(one["kl_share"][0] < 0.9 for one in result["captured"]):
        lines += "\nbetter:    --dtype int4 (float16 below 30 classes) or a larger --top-k, for those below 90 %"
    if result["factored"] is not None:
        lines += f"\nsmaller:   --factored {result['factored']} stores the input of that layer, and the layer once"
    return lines


def size_text(count: int) -> str:
    """Bytes for people, in powers of 1,000."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.4g} {unit}"


def time_text(seconds: float) -> str:
    """A duration for people."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
