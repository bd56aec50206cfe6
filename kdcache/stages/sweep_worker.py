"""A process of a sweep: imports torch once, then does one task after another until its standard input ends.

    {"kind": "check" | "run" | "test", "worker": 0, "options": {...}, ...}   a line in
    {"ok": {...}} | {"error": "...", "exit_code": 5} | {"interrupted": true}  a line out

Started by `sweep_workers`. The end of the input means stop, in the middle of a run too: the run saves and can be
resumed. So nothing is left training when the sweep itself was killed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kdcache.errors import InterruptedRunError, KDCacheError, UsageError
from kdcache.stages import checkpoint
from kdcache.stages.data import DATA, LoadedData, load_data
from kdcache.stages.distill import distill, prepared_run
from kdcache.stages.distill_loop import batches_in_order
from kdcache.stages.distill_options import DistillOptions
from kdcache.stages.evaluate import evaluate
from kdcache.stages.label_fraction import labels_of
from kdcache.stages.loaded_data import NO_LABEL
from kdcache.stages.specs import PYTHON, one_line


def check(options: DistillOptions, task: Mapping[str, Any]) -> dict[str, Any]:
    """What `distill` would refuse is refused; gives what all runs of a sweep have in common."""
    with prepared_run(_alone(options), data=_loaded(options.data), val=_loaded(options.val)) as (job, _):
        facts = {name: job.identity.get(name) for name in ("data fingerprint", "data cache root", "val fingerprint")}
        return {
            **facts,
            "labels": {name: _labels_in(getattr(job, name).dataset) for name in task.get("asks_labels", ())},
            "total_steps": job.total_steps,
            "steps_per_epoch": job.trainer.order.steps_per_epoch,
        }


def run(options: DistillOptions, task: Mapping[str, Any]) -> dict[str, Any]:
    """Makes, finishes or finds a run in its folder."""
    distill(options, data=_built_in(options.data), val=_built_in(options.val))
    return {}


def test(options: DistillOptions, task: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a finished run on the data that `task` names under `test`."""
    asked = dataclasses.replace(_alone(options), val=task["test"], val_cache=())
    with prepared_run(asked, data=_loaded(options.data), val=_loaded(task["test"])) as (job, _):
        assert job.held_out is not None
        assert options.out is not None
        trainer = job.trainer
        trainer.student.load_state_dict(checkpoint.load(Path(options.out) / checkpoint.LAST_NAME))
        objective = dataclasses.replace(trainer.objective.at(0), hard_targets=False)
        batches = batches_in_order(job, job.held_out, job.held_out.positions)
        return evaluate(trainer, batches, objective, has_teacher=False)


KINDS: dict[str, Callable[[DistillOptions, Mapping[str, Any]], dict[str, Any]]] = {
    "check": check,
    "run": run,
    "test": test,
}


def answer(task: Mapping[str, Any]) -> dict[str, Any]:
    """What came of a task."""
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in task["options"].items()}
    options = DistillOptions(**plain)
    options = dataclasses.replace(options, device=_shared_device(options.device, task["worker"]))
    try:
        return {"ok": KINDS[task["kind"]](options, task)}
    except InterruptedRunError:
        return {"interrupted": True}
    except Exception as error:  # of a student or data set of the user's own: one run, not the sweep
        if os.environ.get("KDCACHE_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        is_ours = isinstance(error, KDCacheError)
        return {"error": str(error) if is_ours else one_line(error), "exit_code": getattr(error, "exit_code", 1)}


def main() -> None:
    """Reads tasks, writes answers; what a task prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    tasks: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    for task in iter(tasks.get, None):
        answers.write(json.dumps(answer(task)) + "\n")


def _read(tasks: queue.Queue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    tasks.put(None)
    os.kill(os.getpid(), signal.SIGTERM)  # a run notes it and saves; without one the process ends here


def _labels_in(dataset: Any) -> str:
    """Whether all rows have a label, `some` or `none`."""
    try:
        labels = labels_of(dataset, name="training")
    except UsageError:
        return "none"
    if labels is None or bool((labels != NO_LABEL).all()):
        return "all"
    return "some" if bool((labels != NO_LABEL).any()) else "none"


def _alone(options: DistillOptions) -> DistillOptions:
    return dataclasses.replace(options, out=None, resume=False, tensorboard=False)


def _shared_device(name: str, worker: int) -> str:
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{worker % torch.cuda.device_count()}"


@functools.lru_cache(maxsize=4)
def _loaded(spec: str | None) -> LoadedData | None:
    return None if spec is None else load_data(spec)


def _built_in(spec: str | None) -> LoadedData | None:
    """Loaded once for all runs of this process; what a factory draws at random must be drawn anew for every run."""
    return None if spec is None or DATA.parse(spec).scheme == PYTHON else _loaded(spec)


if __name__ == "__main__":
    main()
