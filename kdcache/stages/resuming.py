"""Saving a run between two steps and going on from there, exactly.

A checkpoint holds the student, the optimiser, the loss scaler, every random generator of every rank, the
number of the step and the length of the metrics file. The order of rows and the learning rate follow
from the step. Given deterministic items and as many ranks, the resumed run has the same weights, bit
for bit on a CPU, as one that was never stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdcache.errors import KDCacheError, MismatchError
from kdcache.stages import checkpoint
from kdcache.stages.distill_inputs import Source
from kdcache.stages.distill_options import RESUMABLE, DistillOptions, portable
from kdcache.stages.specs import one_line
from kdcache.stages.training import State, Trainer

FORMAT = 1


def identity(options: DistillOptions, train: Source, held_out: Source | None, *, total_steps: int) -> dict[str, Any]:
    """What two processes must agree on to be parts of one run; plain values by the name of the option."""
    facts = {name: value for name, value in portable(options).items() if name not in RESUMABLE}
    for name, source in (("data", train), ("val", held_out)):
        if source is not None:
            facts[f"{name} fingerprint"] = source.fingerprint
            facts[f"{name} cache root"] = None if source.cache is None else source.cache.root
    if train.teachers is not None:
        facts["teachers"] = train.teachers.identity()
    if train.calibration is not None:
        facts["calibration"] = train.calibration.describe()["seal"]
    if train.classes is not None:
        facts["classes"] = train.classes.sha256
    if train.views is not None:
        facts["views of the data"] = train.views
    return {**facts, "total steps": total_steps}


def check_same_run(found: dict[str, Any], wanted: dict[str, Any], *, out: Path) -> None:
    """Refuses to go on with a run that was something else.

    Raises:
        MismatchError: naming the first field that differs.
    """
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise MismatchError(
                f"the run in {out.name} has {name} = {found.get(name)!r}, this call has {wanted.get(name)!r}: --resume "
                "goes on with the same run only; repeat its options, or choose another --out"
            )


def save_run(path: Path, trainer: Trainer, state: State, *, identity: dict[str, Any], metrics_bytes: int) -> None:
    """Writes the checkpoint; every rank calls it, rank 0 writes."""
    team = trainer.team
    generators = {name: team.gather(tensor) for name, tensor in checkpoint.rng_state(team.device).items()}
    if not team.is_first:
        return
    window = torch.stack(state.window).cpu() if state.window else torch.zeros(0, 2)  # no rows: the width says nothing
    content = {
        "format": FORMAT,
        "identity": identity,
        "world_size": team.world_size,
        "student": checkpoint.state_dict(trainer.student),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "generators": generators,
        "step": state.step,
        "seconds": state.seconds,
        "signal_rows": state.signal_rows,
        "window": window,
        "window_rows": state.window_rows,
        "window_seconds": state.window_seconds,
        "last": state.last,
        "best": state.best,
        "policy_rows": state.policy_rows,
        "novel_rows": state.novel_rows,
        "versions": state.versions,
        "ema": None if trainer.ema is None else trainer.ema.state_dict(),
        "metrics_bytes": metrics_bytes,
    }
    checkpoint.save(path, content)


def restore_run(path: Path, trainer: Trainer, *, identity: dict[str, Any]) -> tuple[State, int]:
    """Puts a run back to its checkpoint: its state, and the length of the metrics file then.

    With another number of ranks the generators (dropout) start anew: nothing else depends on it.

    Raises:
        MismatchError: another run, or a student with other tensors.
        KDCacheError: not a checkpoint of this version.
    """
    content = checkpoint.load(path)
    found = content.get("format")
    if type(found) is not int or found != FORMAT:
        raise KDCacheError(f"{path.name} has the format {found!r:.50}, expected {FORMAT}; start anew with --overwrite")
    try:
        check_same_run(content["identity"], identity, out=path.parent)
        return _put_back(path, content, trainer)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise KDCacheError(
            f"{path.name} in {path.parent} is damaged, or was not written by kdcache ({one_line(error)}); use "
            "--overwrite to start anew"
        ) from error


def _put_back(path: Path, content: dict[str, Any], trainer: Trainer) -> tuple[State, int]:
    team = trainer.team
    try:
        trainer.student.load_state_dict(content["student"])
        trainer.optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise MismatchError(f"{path.name} was written for another student: {error!s:.500}") from error
    trainer.scaler.load_state_dict(content["scaler"])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(content["ema"])
    if content["world_size"] == team.world_size:
        own = {name: tensors[team.rank] for name, tensors in content["generators"].items()}
        checkpoint.set_rng_state(own, team.device)
    state = State(
        step=content["step"],
        seconds=content["seconds"],
        signal_rows=content["signal_rows"],
        window=list(content["window"].to(team.device)),
        window_rows=content["window_rows"],
        window_seconds=content["window_seconds"],
        last=content["last"],
        best=content["best"],
        policy_rows=content.get("policy_rows", []),  # older checkpoints have none
        novel_rows=content.get("novel_rows", []),
        versions=content.get("versions", []),
    )
    return state, content["metrics_bytes"]
