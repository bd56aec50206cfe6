from __future__ import annotations

import pytest

from kdcache.errors import UsageError
from kdcache.train.ranks import Ranks, discover

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}


def test_a_process_alone_is_rank_0_of_1() -> None:
    assert discover({}) == Ranks(0, 1, 0, None)
    assert discover({}).is_first


def test_torchrun_and_slurm_are_understood() -> None:
    assert discover({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == Ranks(1, 2, 0, "torchrun")
    assert discover(SLURM) == Ranks(3, 8, 1, "SLURM")
    assert not discover(SLURM).is_first


def test_torchrun_inside_a_slurm_job_wins() -> None:
    assert discover({**SLURM, "RANK": "0", "WORLD_SIZE": "2"}) == Ranks(0, 2, 0, "torchrun")


def test_a_batch_script_of_slurm_without_ntasks_is_one_process() -> None:
    assert discover({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == Ranks(0, 1, 0, "SLURM")
    with pytest.raises(UsageError, match="rank 3 of 1"):
        discover({"SLURM_PROCID": "3"})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero', expected a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 of 2"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": ""}, "SLURM_NTASKS is ''"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "local_rank is -1"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        discover(environ)


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    assert discover().rank == 3
