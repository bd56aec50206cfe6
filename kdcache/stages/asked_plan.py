"""What the options of `precompute` say about its plan, and which paths they are refused.

The command asks before it imports torch (2 s): another dump on the same path, or somebody else's folder, is then an
answer of a fifth of a second. What the data set and the teacher add is compared when they are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.format.headers import NO_ONE_FILE
from kdcache.stages.precompute_options import PrecomputeOptions
from kdcache.stages.specs import recorded_spec
from kdcache.store.occupant import Occupant, occupant
from kdcache.store.posix import is_folder
from kdcache.store.removal import refuse_foreign
from kdcache.store.versions import versions
from kdcache.store.writer import dump_folder_of
from kdcache.train.pipeline_text import canonical
from kdcache.train.ranks import discover


def check_path(out: Path, options: PrecomputeOptions) -> None:
    """What can be refused by the options and the path alone.

    Args:
        out: a folder, or a name in `.h5`.
        options: their `teacher` is None where a module was passed in its stead.

    Raises:
        UsageError: `out` holds something that is not a cache; `overwrite` by one of several processes; factored rows
            in one file, or of an exported program.
        MismatchError: it holds another dump; the message names the field that differs, and a process at work on it.
    """
    folder, one_file = dump_folder_of(out)
    if one_file and is_folder(out):
        raise UsageError(f"{out} is a folder; a name in .h5 makes one file: choose another --out")
    if options.factored is not None:
        if one_file:
            raise UsageError(f"--factored goes with a folder only, not with {out}: {NO_ONE_FILE}")
        if (options.teacher or "").startswith("pt2:"):
            raise UsageError(
                f"--factored {options.factored} needs the teacher's modules, and an exported program (pt2:) has none: "
                "give the teacher as module:factory"
            )
    refuse_foreign(folder)
    if options.overwrite:
        if options.shard is not None or discover().world_size > 1:
            raise UsageError(
                "--overwrite goes with one process only: each of several would remove what the others have done; "
                f"remove {out} first"
            )
        return
    found = occupant(out)
    if found is not None:
        found.refuse_other(asked_plan(options, found))


def asked_plan(options: PrecomputeOptions, found: Occupant) -> dict[str, Any]:
    """The part of `plan.json` that the options decide.

    Args:
        options: of the command.
        found: the dump to compare with: whether it has more rows than `limit` leaves is known without the data.
    """
    precision: dict[str, Any] = {"amp": options.amp, "batch_size": options.batch_size}
    if options.threads is not None:
        precision["threads"] = options.threads
    if options.device != "auto":
        precision["device"] = options.device.partition(":")[0]
    provenance: dict[str, Any] = {
        "output_key": options.output_key,
        "teacher_seen": options.teacher_saw,
        "licence": options.licence,
        "precision": precision,
        "versions": versions(),
    }
    samples = found.field("samples")
    if type(samples) is int and options.limit is not None and options.limit < samples:
        provenance["data"] = {"dumped": options.limit}
    if options.teacher is not None:
        provenance["teacher"] = {
            "spec": recorded_spec(options.teacher),
            "weights": None if options.weights is None else _name_and_size(options.weights),
        }
    if options.augment is not None and ":" not in options.augment:
        provenance["views"] = {"augment": canonical(options.augment), "seed": options.seed}
    plan: dict[str, Any] = {
        "encoding": asked_encoding(options, found),
        "provenance": provenance,
        "views": list(range(options.views)),
    }
    if options.factored is not None:
        plan["encoding"] = {"name": "factored"}
        provenance["layer"] = options.factored
    if options.shard_rows is not None:
        plan["shard_rows"] = options.shard_rows
    return plan


def asked_encoding(options: PrecomputeOptions, found: Occupant) -> dict[str, Any]:
    """The part of `encoding` that the options decide; of a teacher with K classes or fewer all logits are kept."""
    if options.top_k is None:
        return {"name": "dense", "dtype": options.dtype}
    if found.field("encoding", "name") != "topk":
        return {"name": "topk"}  # the first thing to be said where the dump holds other rows
    shape, choice = found.field("encoding", "shape"), options.encoding
    classes = shape[0] if isinstance(shape, list) and shape else options.top_k
    kept = choice.of((max(2, classes),)).to_json()
    return {name: kept[name] for name in ("name", "dtype", "k", "temperatures")}


def _name_and_size(path: Path) -> dict[str, Any]:
    """What is known of a file without reading it; only its name where it is not there (loading it will tell)."""
    return {"name": path.name, **({"bytes": path.stat().st_size} if path.is_file() else {})}
