"""A teacher that changes while its student trains: the student's own average over time, or any module made from it.

    teacher = MovingTeacher("runs/a/teacher", "digits:train", every=2, decay=0.99)
    kdcache.distill(options, refresh=teacher)

Every n epochs the teacher is run once over the data, and the run goes on with that cache; between two passes it costs
an average of the weights after each step. Teachers of the student's own size are cheap; a live one would cost a forward
pass at every step instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from kdcache.errors import MismatchError, UsageError
from kdcache.stages.data import load_data
from kdcache.stages.refresh import PathLike, refresh
from kdcache.store.cache import Cache
from kdcache.store.version_folder import version_of_root

LEAST_KEPT = 2  # a run that is killed right after a new version may go on from a checkpoint of the one before


class Refresh(Protocol):
    """What `distill(refresh=...)` asks for another cache.

    Attributes:
        every: epochs between two versions, at least 1.
        ema: an average of the student that the run updates after each step and saves; None for none.
    """

    every: int
    ema: Ema | None

    def next(self, epoch: int, student: nn.Module, *, step: int) -> Cache | None:
        """The cache for the epochs from `epoch` on; None to go on with the one there is.

        Called by the first rank only, before the first step of an epoch; the student must be left as it is. A run that
        was killed asks again for the same epoch with the same student.
        """
        ...

    def open(self, root: str) -> Cache:
        """The cache of an earlier call by its root hash, when a run is resumed.

        Raises:
            IncompleteCacheError: it is gone.
        """
        ...


@final
class Ema:
    """The average of a student's weights and buffers over the steps of a run (Tarvainen & Valpola, 1703.01780).

    After step t (from 1) average = d * average + (1 - d) * student with d = min(decay, 1 - 1/t): the first steps are
    averaged evenly, so that the random initial weights leave no trace. Integer buffers are copied.

    Args:
        decay: share of the average that stays at a step, at least 0 and below 1.

    Raises:
        UsageError: another decay.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"the decay of an average of the student must be at least 0 and below 1, found {decay}")
        self.decay = decay
        self.steps = 0
        self._module: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The average as a module in eval mode, to be run and not to be changed.

        Raises:
            UsageError: no run has begun yet.
        """
        if self._module is None:
            raise UsageError("there is no average before a run begins; `distill(refresh=...)` begins it")
        return self._module

    def begin(self, student: nn.Module) -> None:
        """Starts anew from a copy of the student."""
        # What pruning or another reparametrisation computes is no leaf, which deepcopy refuses; hooks compute it anew.
        computed = {
            id(value): value.detach().clone()
            for module in student.modules()
            for value in vars(module).values()
            if isinstance(value, Tensor) and not value.is_leaf
        }
        self._module = copy.deepcopy(student, computed).eval().requires_grad_(False)
        self.steps = 0

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Takes in the student after one more step."""
        self.steps += 1
        rate = max(1 - self.decay, 1 / self.steps)
        for mine, its in zip(_tensors(self.module), _tensors(student), strict=True):
            if mine.is_floating_point():
                mine.lerp_(its.to(mine.dtype), rate)
            else:
                mine.copy_(its)

    def state_dict(self) -> dict[str, Any]:
        """The average's tensors (copies on the CPU) and the number of steps."""
        return {"steps": self.steps, "tensors": [tensor.cpu().clone() for tensor in _tensors(self.module)]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            MismatchError: it is of another student.
        """
        mine = _tensors(self.module)
        if [tensor.shape for tensor in mine] != [tensor.shape for tensor in state["tensors"]]:
            raise MismatchError("the saved average is of a student with other tensors; repeat the run's options")
        for tensor, saved in zip(mine, state["tensors"], strict=True):
            tensor.copy_(saved)
        self.steps = int(state["steps"])


@final
class MovingTeacher:
    """Versions of a teacher that follows the student; pass it to `kdcache.distill(refresh=...)`.

    Args:
        out: folder of the versions (see `refresh`).
        data: the run's training data: a SPEC, a data set, or what `load_data` gives.
        every: epochs between two versions.
        decay: the teacher is the average of the student with this decay; see `Ema`.
        teacher: instead of `decay`: makes the teacher from the student at that moment, as a module of its own.
        keep: complete versions that stay on the disk, at least 2; None for all.
        **settings: fields of `PrecomputeOptions`, such as `dtype="int8"`; `teacher_saw` is "yes" by itself.

    Raises:
        UsageError: `every` or another number out of range, or not one of `decay` and `teacher`.
    """

    def __init__(
        self,
        out: PathLike,
        data: Any,
        *,
        every: int = 1,
        decay: float | None = None,
        teacher: Callable[[nn.Module], nn.Module] | None = None,
        keep: int | None = LEAST_KEPT,
        **settings: Any,
    ) -> None:
        check_every(every)
        if (decay is None) == (teacher is None):
            raise UsageError("a moving teacher is the average of its student (decay=) or made from it (teacher=)")
        if keep is not None and keep < LEAST_KEPT:
            raise UsageError(
                f"keep must be at least {LEAST_KEPT}, found {keep}: a resumed run may need the version before the last"
            )
        self.every = every
        self.ema = None if decay is None else Ema(decay)
        self._out, self._teacher, self._keep = Path(out), teacher, keep
        self._data = load_data(data) if isinstance(data, str) else data
        self._settings = {"teacher_saw": "yes", **settings}

    def next(self, epoch: int, student: nn.Module, *, step: int) -> Cache:
        """See `Refresh`: one pass of the teacher over the data, unless this version is there."""
        teacher = self._teacher(student) if self._teacher is not None else self._average()
        return refresh(teacher, self._data, self._out, step=step, keep=self._keep, **self._settings)

    def open(self, root: str) -> Cache:
        """See `Refresh`."""
        return version_of_root(self._out, root)

    def _average(self) -> nn.Module:
        assert self.ema is not None
        return self.ema.module


def check_every(every: Any) -> None:
    """Refuses a number of epochs between two versions that cannot be meant.

    Raises:
        UsageError: not an integer, or below 1.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise UsageError(f"a teacher is refreshed every n epochs (every=), n at least 1; found {every!r:.80}")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
