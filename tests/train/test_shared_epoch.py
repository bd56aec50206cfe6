from __future__ import annotations

import multiprocessing
import pickle
from typing import Any

import pytest

from kdcache.errors import UsageError
from kdcache.train.shared_epoch import SharedEpoch


def follow(epoch: SharedEpoch, pipe: Any) -> None:
    while pipe.recv():
        pipe.send(epoch.get())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_process_sees_the_epoch_that_is_told_after_its_start(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    epoch = SharedEpoch()
    ours, theirs = context.Pipe()
    process = context.Process(target=follow, args=(epoch, theirs), daemon=True)
    process.start()
    try:
        for told in (None, 0, 7, 3):
            if told is not None:
                epoch.set(told)
            ours.send(True)
            assert ours.poll(60)
            assert ours.recv() == told
    finally:
        ours.send(False)
        process.join(60)
    assert process.exitcode == 0


def test_a_plain_pickle_is_a_copy_with_the_epoch_of_its_time() -> None:
    epoch = SharedEpoch()
    epoch.set(3)
    copy = pickle.loads(pickle.dumps(epoch))
    epoch.set(4)
    assert (epoch.get(), copy.get()) == (4, 3)


def test_an_epoch_below_0_is_refused() -> None:
    epoch = SharedEpoch()
    with pytest.raises(UsageError, match="an epoch is 0 or more, found -1"):
        epoch.set(-1)
    assert epoch.get() is None
