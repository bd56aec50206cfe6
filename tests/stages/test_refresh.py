"""Versions of a teacher that changes: listed when complete, found again after a kill, removed when they are old."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdcache
from kdcache.errors import CorruptCacheError, IncompleteCacheError, MismatchError, UsageError
from kdcache.stages.refresh import current, refresh
from kdcache.store.version_folder import LIST_NAME, listed_versions, only_writer, remove_versions


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the child processes; one thread, as there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    import refresh_task

    yield refresh_task
    torch.set_num_threads(before)


def ended(target: Any, *arguments: Any) -> int | None:
    """The exit code of a call in a process of its own."""
    from precompute_runs import FORKS

    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def logits_of(cache: Any) -> np.ndarray:
    found: np.ndarray = cache.gather(np.arange(len(cache))).dense()
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_version_is_the_teachers_cache_and_says_whose(tmp_path: Path, task: Any) -> None:
    teacher = task.network(3).train()
    cache = refresh(teacher, task.Task(), tmp_path / "versions", step=7, dtype="float32", threads=1)
    assert all(module.training for module in teacher.modules())
    with torch.no_grad():
        expected = teacher.eval()(task.Task().inputs)
    assert np.array_equal(logits_of(cache), expected.numpy())
    assert (cache.path.name, cache.provenance["teacher"]["generation"], cache.provenance["teacher"]["step"]) == (
        "v000001",
        1,
        7,
    )
    (version,) = listed_versions(tmp_path / "versions")
    assert version.teacher == cache.provenance["teacher"]["state_sha256"]
    assert version.root == cache.root == kdcache.open(cache.path).root


def test_the_same_call_gives_the_version_that_is_there_and_any_other_a_new_one(tmp_path: Path, task: Any) -> None:
    out, net, data = tmp_path / "versions", task.network(3), task.Task()
    settings: dict[str, Any] = {"keep": None, "threads": 1}
    first = refresh(net, data, out, step=1, **settings)
    assert refresh(net, data, out, step=1, **settings).path == first.path
    assert refresh(net, data, out, step=2, **settings).path.name == "v000002"
    assert refresh(net, data, out, step=2, dtype="int8", **settings).path.name == "v000003"
    assert refresh(net, torch.utils.data.Subset(data, range(50)), out, step=2, **settings).path.name == "v000004"
    assert refresh(task.network(4), data, out, step=2, **settings).path.name == "v000005"
    assert refresh(net, data, out, step=1, **settings).path == first.path
    assert current(out).path.name == "v000005"


def test_old_versions_go_and_whoever_reads_one_reads_on(tmp_path: Path, task: Any) -> None:
    out, data = tmp_path / "versions", task.Task()
    first = refresh(task.network(0), data, out, step=0, shard_rows=25, dtype="float32", threads=1)
    beside = current(out)  # another reader, which has not looked at a row yet
    expected = logits_of(first)
    for step in range(1, 4):
        refresh(task.network(step), data, out, step=step, keep=2, threads=1)
    assert names(out) == ["v000003", "v000004", LIST_NAME]
    assert np.array_equal(logits_of(beside), expected)
    assert [version.number for version in listed_versions(out)] == [3, 4]


def test_a_refresh_draws_nothing_from_the_generators(tmp_path: Path, task: Any) -> None:
    net = task.network(2)
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    refresh(net, task.Task(), tmp_path / "versions")
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_a_kill_before_each_call_that_changes_the_disk_leaves_a_complete_version(
    tmp_path: Path, task: Any, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """By default before every seventh; one version is kept, so that the old one is removed as well."""
    undisturbed = tmp_path / "undisturbed"
    old, new = (task.refreshed(undisturbed, seed) for seed in (1, 2))
    expected = {cache.root: logits_of(cache) for cache in (old, new)}
    killed, seen = 0, set()
    for call in range(1, 1000, count(7, 1)):
        out = tmp_path / str(call)
        assert task.refreshed(out, 1).root == old.root
        code = ended(task.refresh_until_call, out, 2, call)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        found = current(out)
        seen.add(found.root)
        assert np.array_equal(logits_of(found), expected[found.root]), f"killed before call {call}"
        assert task.refreshed(out, 2).root == new.root
        assert names(out) == ["v000002", LIST_NAME], f"killed before call {call}"
    assert killed * count(7, 1) > 60
    assert seen == set(expected)  # kills before and after the switch
    proved("refresh", kills_right_before_a_call=killed)


def test_what_a_killed_refresh_of_another_teacher_left_is_replaced(tmp_path: Path, task: Any) -> None:
    out = tmp_path / "versions"
    task.refreshed(out, 1)
    assert ended(task.refresh_until_call, out, 2, 40) == -signal.SIGKILL
    assert names(out) == ["v000001", "v000002", LIST_NAME]
    other = task.refreshed(out, 3)
    assert np.array_equal(logits_of(other), logits_of(task.refreshed(tmp_path / "fresh", 3)))
    assert names(out) == ["v000002", LIST_NAME]


def test_a_version_that_lost_a_file_is_made_again_under_a_new_number(tmp_path: Path, task: Any) -> None:
    cache = task.refreshed(tmp_path / "versions", 1)
    next((cache.path / "shards").iterdir()).unlink()
    with pytest.raises(IncompleteCacheError):
        current(tmp_path / "versions")
    again = task.refreshed(tmp_path / "versions", 1)
    assert again.path.name == "v000002"
    assert np.array_equal(logits_of(again), logits_of(current(tmp_path / "versions")))


def test_what_cannot_be_is_refused(tmp_path: Path, task: Any) -> None:
    with pytest.raises(UsageError, match=r"takes the teacher as a module .*, found"):
        kdcache.refresh("x", task.Task(), tmp_path / "text")  # type: ignore[arg-type]
    data, net = task.Task(), task.network(0)
    with pytest.raises(IncompleteCacheError, match="no complete version"):
        current(tmp_path / "nothing")
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.txt.*choose another"):
        refresh(net, data, tmp_path / "somebody")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        remove_versions(tmp_path / "somebody")
    with pytest.raises(UsageError, match="keep must be at least 1"):
        refresh(net, data, tmp_path / "versions", keep=0)
    with pytest.raises(UsageError, match="does not take 'overwrite'"):
        refresh(net, data, tmp_path / "versions", overwrite=True)
    assert not (tmp_path / "versions").exists()
    with only_writer(tmp_path / "versions"), pytest.raises(MismatchError, match="is writing a version"):
        refresh(net, data, tmp_path / "versions")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not a folder"):
        refresh(net, data, tmp_path / "file")


def _reseal(content: dict[str, Any]) -> bytes:
    from kdcache.format.sealed import dump_sealed

    content.pop("seal")
    return dump_sealed(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", 0),
        ("number", True),
        ("number", 10**6),
        ("root", "../.."),
        ("step", -1),
        ("step", 1.5),
        ("asked", None),
    ],
)
def test_a_list_with_a_wrong_field_is_refused_and_nothing_is_opened(
    tmp_path: Path, task: Any, field: str, value: Any
) -> None:
    task.refreshed(tmp_path / "versions", 1)
    path = tmp_path / "versions" / LIST_NAME
    content = json.loads(path.read_bytes())
    content["versions"][0][field] = value
    path.chmod(0o644)
    path.write_bytes(_reseal(content))
    with pytest.raises(CorruptCacheError, match=r"versions\.json"):
        current(tmp_path / "versions")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(versions=[]),
        lambda content: content.update(kdcache_versions=2),
        lambda content: content.update(more=1),
        lambda content: content["versions"].append(content["versions"][0]),
        lambda content: content["versions"][0].pop("step"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, task: Any, change: Callable[[dict[str, Any]], Any]) -> None:
    task.refreshed(tmp_path / "versions", 1)
    path = tmp_path / "versions" / LIST_NAME
    content = json.loads(path.read_bytes())
    change(content)
    path.chmod(0o644)
    path.write_bytes(_reseal(content))
    with pytest.raises(CorruptCacheError, match=r"versions\.json"):
        current(tmp_path / "versions")


def test_an_edited_list_is_refused(tmp_path: Path, task: Any) -> None:
    task.refreshed(tmp_path / "versions", 1)
    path = tmp_path / "versions" / LIST_NAME
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"step":1', b'"step":2'))
    with pytest.raises(CorruptCacheError, match="seal"):
        current(tmp_path / "versions")
