"""`run:FOLDER`: the student of a finished run, as the next teacher or as the start of another run.

Built-in students only: a run's record may come from somebody else, and code that a file names is never run. For a
student of one's own the command says which code: `--teacher module:factory --weights FOLDER/last.pt`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.errors import KDCacheError, UsageError
from kdcache.stages.checkpoint import LAST_NAME
from kdcache.stages.models import built
from kdcache.stages.run_record import read_record
from kdcache.stages.weights import check_fits, load_strictly, read_state_dict

USAGE = "run:FOLDER"


@dataclass(frozen=True, eq=False)
class StudentOfRun:
    """A student that a run left.

    Attributes:
        module: with its weights.
        weights: the file that they are from.
        generation: 0 for one that learned from labels alone, 1 more than its teacher else.
    """

    module: nn.Module
    weights: Path
    generation: int


def student_of_run(folder: Path, *, weights: Path | None = None) -> StudentOfRun:
    """The student of a finished run.

    Args:
        folder: of the run.
        weights: instead of `last.pt`, for example its `best.pt`.

    Raises:
        UsageError: no run, one that is not finished, or a student that is not a built-in one.
        MismatchError: the weights are of another student, for example a pruned one.
        KDCacheError: a damaged record.
    """
    record = read_record(folder)
    if record.get("status") != "done":
        state = f"its status is {record['status']!r:.20}" if "status" in record else "there is no run.json"
        raise UsageError(f"run:{folder} names no finished run ({state}); give the folder of a finished `distill`")
    student, path = record.get("student"), weights or folder / LAST_NAME
    recipe = student.get("recipe") if isinstance(student, dict) else None
    if recipe is None:
        raise UsageError(
            f"the student of run:{folder} is not a built-in one, and a file never names code to run: give it as "
            f"module:factory with --weights {path} (a teacher) or --init {path} (a student)"
        )
    with torch.device("meta"):
        module = built(recipe)
    tensors = read_state_dict(path)
    check_fits(module, tensors, name=path.name)  # a record may name any size; memory is for what fits
    load_strictly(module.to_empty(device="cpu"), tensors, name=path.name)
    return StudentOfRun(module, path, _generation(record))


def _generation(record: dict[str, Any]) -> int:
    try:
        cache = record["data"].get("cache")
        teacher = {} if cache is None else cache["provenance"].get("teacher") or {}
        before = teacher.get("generation", 0)
    except (AttributeError, KeyError, TypeError) as error:
        raise KDCacheError("the record of the run is damaged: its data have no cache as `distill` writes it") from error
    return 0 if cache is None else 1 + (before if type(before) is int and before >= 0 else 0)
