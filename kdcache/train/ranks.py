"""Which process of a job this is, from the environment that torchrun or SLURM sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kdcache.errors import UsageError

_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world_size`, and number `local_rank` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} of {self.world_size} processes: expected 0 <= rank < world_size")
        if self.local_rank < 0:
            raise UsageError(f"local_rank is {self.local_rank}, expected 0 or above")

    @property
    def is_first(self) -> bool:
        """True for the process that prints and writes records."""
        return self.rank == 0


def discover(environ: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that torchrun (RANK, WORLD_SIZE, LOCAL_RANK) or SLURM (SLURM_PROCID ...) announces.

    torchrun wins where both are set (torchrun inside a SLURM job). A variable that is missing beside the rank
    is an error, not a guess, but for the local rank, which is 0 then, and for SLURM_NTASKS: a batch script without
    --ntasks has a rank (0) and no such variable, and is one process.

    Args:
        environ: the variables; `os.environ` if not given.

    Returns:
        One process alone (rank 0 of 1) where neither launcher has set its rank.

    Raises:
        UsageError: a variable that is not a number, or numbers that contradict each other.

    >>> discover({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    Ranks(rank=1, world_size=4, local_rank=1, launcher='torchrun')
    """
    environ = os.environ if environ is None else environ
    for launcher, rank, world_size, local_rank in _LAUNCHERS:
        if rank in environ:
            if world_size not in environ and launcher == "SLURM":
                environ = {**environ, world_size: "1"}
            if world_size not in environ:
                raise UsageError(f"{rank} is set, {world_size} is not: {launcher} sets both; unset {rank} to run alone")
            return Ranks(
                _number(environ, rank),
                _number(environ, world_size),
                _number(environ, local_rank) if local_rank in environ else 0,
                launcher,
            )
    return Ranks()


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UsageError(f"the environment variable {name} is {environ[name]!r}, expected a number") from None
