"""Two students, each in a process of its own, that learn from each other's latest version (Zhang et al., 1706.00384).

    kdcache.distill(options, student=mine, refresh=Peer("runs/a", "runs/b", "digits:train", every=2))
    kdcache.distill(options, student=mine, refresh=Peer("runs/b", "runs/a", "digits:train", every=2))  # elsewhere

In the paper the students exchange their outputs at every step; here at every n epochs, and what each learns from is
older by up to n epochs. In exchange nothing is shared but two folders, and either may be stopped and resumed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, final

from torch import nn

from kdcache.errors import InterruptedRunError, KDCacheError
from kdcache.stages.data import load_data
from kdcache.stages.moving_teacher import Ema
from kdcache.stages.refresh import PathLike, refresh
from kdcache.stages.signals import graceful_signals
from kdcache.store.cache import Cache
from kdcache.store.version_folder import listed_versions, open_version, version_of_root

# The other student is one version ahead at most; a run killed before its checkpoint may need the one before the last.
_KEPT = 3
_POLL_SECONDS = 0.1


@final
class Peer:
    """One of two students; pass it to `kdcache.distill(refresh=...)`.

    Both runs take the same steps: a version is found by the step at which it was made, so that the result does not
    depend on which process is faster.

    Args:
        own: folder of this student's versions.
        other: that of the other student's.
        data: the training data of both: a SPEC, a data set, or what `load_data` gives.
        every: epochs between two versions, the same in both.
        wait_seconds: how long the other may take to come to the same epoch.
        **settings: fields of `PrecomputeOptions` for this student's versions.
    """

    ema: Ema | None = None

    def __init__(
        self,
        own: PathLike,
        other: PathLike,
        data: Any,
        *,
        every: int = 1,
        wait_seconds: float = 3600.0,
        **settings: Any,
    ) -> None:
        self.every = every
        self._own, self._other, self._wait_seconds = Path(own), Path(other), wait_seconds
        self._data = load_data(data) if isinstance(data, str) else data
        self._settings = {"teacher_saw": "yes", **settings}

    def next(self, epoch: int, student: nn.Module, *, step: int) -> Cache:
        """See `Refresh`: writes this student's version, then waits for the other's of the same step.

        Raises:
            InterruptedRunError: SIGINT or SIGTERM.
            KDCacheError: the other did not come in time, or has gone on without this one.
        """
        refresh(student, self._data, self._own, step=step, keep=_KEPT, **self._settings)
        until = time.monotonic() + self._wait_seconds
        with graceful_signals() as stop:
            while True:
                versions = listed_versions(self._other)
                for version in versions:
                    if version.step == step:
                        return open_version(self._other, version)
                if stop.requested:
                    raise InterruptedRunError(f"stopped by {stop.name} while the other student was awaited")
                if versions and (versions[0].step or 0) > step:
                    raise KDCacheError(
                        f"{self._other.name} has no version of step {step} any more, its first is of step "
                        f"{versions[0].step}: both runs need the same data, --batch-size and epochs between versions"
                    )
                if time.monotonic() > until:
                    raise KDCacheError(
                        f"the other student wrote no version for step {step} in {self._other.name} within "
                        f"{self._wait_seconds:g} s; start it, or start it again with --resume, and then this one"
                    )
                time.sleep(_POLL_SECONDS)

    def open(self, root: str) -> Cache:
        """See `Refresh`."""
        return version_of_root(self._other, root)
