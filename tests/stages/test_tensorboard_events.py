"""TensorBoard events: read back by TensorBoard itself, and nothing of the machine in a name."""

from __future__ import annotations

import socket
import warnings
from pathlib import Path

import pytest

from kdcache.errors import StorageError
from kdcache.stages.metrics import MetricsLog

pytestmark = pytest.mark.interop("tensorboard")


def read(folder: Path) -> list[tuple[int, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def log_steps(folder: Path, steps: dict[int, float], *, after: int) -> None:
    log = MetricsLog(folder, tensorboard=True, step=after)
    for step, loss in steps.items():
        log.write({"step": step, "event": "train", "loss": loss})
    log.close()
    log.close()


def test_a_resumed_run_shows_each_step_once_and_keeps_the_one_it_resumed_from(tmp_path: Path) -> None:
    log_steps(tmp_path, {1: 0.5, 2: 0.25, 3: 8.0}, after=0)
    log_steps(tmp_path, {3: 4.0}, after=2)
    log_steps(tmp_path, {3: 0.125, 4: 2.0}, after=2)
    assert read(tmp_path / "tensorboard") == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 2.0)]


def test_the_names_of_event_files_hold_neither_host_nor_process(tmp_path: Path) -> None:
    log_steps(tmp_path, {1: 0.5}, after=0)
    log_steps(tmp_path, {2: 0.5}, after=1)
    names = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert names == ["events.out.tfevents.0000000000", "events.out.tfevents.0000000001"]
    assert socket.gethostname().encode() not in b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())


def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.0000000000").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"could not write .*tfevents.* the disk is full"):
        MetricsLog(tmp_path, tensorboard=True)
