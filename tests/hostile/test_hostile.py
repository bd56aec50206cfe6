"""S1: every hostile cache is refused for its own reason, in under 1 s and 200 MiB; every valid one is accepted.

By default every second attack goes through one of the doors, in turn; with --long every one through all of them, each
in a child process of its own. Seconds are those of the processor in the child, so that a busy machine does not matter;
a child that waits for a FIFO uses none, and is killed after 30 s. Memory is what the child may write to beyond what it
was born with (RLIMIT_DATA), and its peak of resident memory (ru_maxrss) beyond that at its birth.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_base import ROWS, create, edited, put_file, put_folder, put_shard, sound_file
from hostile_cases import INCOMPLETE, Case, all_cases, readme
from hostile_doors import COMMANDS, LIBRARY, MEMORY_BYTES, NEVER

from kdcache.errors import UsageError
from kdcache.format.hdf5_parser import parse
from kdcache.store.card import write_card
from kdcache.store.inspect import describe

HERE = Path(__file__).parent
Knock = Callable[..., dict[str, Any]]
CASES = all_cases()
HOSTILE = [case for case in CASES if case.at != "accepted"]
REFUSED = [case for case in HOSTILE if case.at != "shown"]
SOUND = [case for case in CASES if case.at in ("accepted", "shown")]
WRITERS = ("resume", "overwrite")
READERS = [door for door in LIBRARY if door not in WRITERS]
ROW_READERS = {"open", "pread", "verify", "merge", "export"}
OURS = (sys.prefix, sys.base_prefix, str(HERE.parents[1] / "kdcache"), str(HERE.parents[1] / "cli"), "/proc/self/")
FRONT_MATTER = ["license", "tags", "pretty_name", "configs"]
WRITING = 0x3 | 0x40  # O_WRONLY, O_RDWR, O_CREAT


def doors_of(case: Case, every: bool) -> list[str]:
    """All doors of a case; by default one, another for each case."""
    if case.at == "later":
        doors = ["open", "pread"]
    elif case.at == "dump":
        doors = [*READERS, *COMMANDS, *WRITERS] if every else ["resume"]  # last: replacing a dump may succeed
    else:
        doors = [*READERS, *COMMANDS]
    return doors if every else [doors[CASES.index(case) // 2 % len(doors)]]


@pytest.fixture
def every_door(count: Callable[[int, int], int]) -> bool:
    return bool(count(0, 1))


@pytest.fixture
def visit(knock: Knock, every_door: bool) -> Callable[..., list[dict[str, Any]]]:
    """What each door of a case made of a path; with --long, each in a process of its own."""

    def go(path: Path, doors: list[str]) -> list[dict[str, Any]]:
        results = []
        for group in [[door] for door in doors] if every_door else [doors]:
            answer = knock(path, group)
            assert "failed" not in answer, answer["failed"]
            assert answer["growth"] < MEMORY_BYTES, f"{group}: {answer['growth'] >> 20} MiB"
            results += answer["results"]
        return results

    return go


# --------------------------------------------------------------------------- what every door must do


def name_of(result: dict[str, Any]) -> str:
    return str(result["door"])


def word_of(door: str) -> str:
    """`kdcache merge` and `merge` notice the same things."""
    return door.removeprefix("kdcache ").removesuffix(" --json")


def check_manners(result: dict[str, Any], path: Path) -> None:
    """No traceback, nothing that a terminal would obey, no file touched outside, nothing written by a reader."""
    assert not result["crash"], result["crash"]
    shown = result["message"] + result["printed"]
    assert "Traceback" not in shown
    assert "internal error" not in shown
    assert shown.replace("\n", "").isprintable(), [c for c in shown if not (c.isprintable() or c == "\n")]
    here = str(path.parents[0])
    for event, touched, flags in result["touched"]:
        assert not event.startswith(NEVER), f"{name_of(result)}: {event} {touched}"
        where = Path(touched)
        if not where.is_absolute():
            where = path.parent / touched  # by the descriptor of a folder that was opened before
        if event.startswith(("open", "os.listdir", "os.scandir")) and str(where).startswith(OURS):
            continue  # Python importing
        inside = str(where).startswith((here, result["work"])) or result["work"].startswith(str(where))  # to sync it
        assert inside or touched == "/dev/zero", f"{name_of(result)}: {event} {touched}"
        if event == "open" and flags & WRITING:
            assert word_of(result["door"]) in ("merge", "export", *WRITERS), f"{event} {touched} for writing"


def check_refusal(result: dict[str, Any], case: Case, path: Path, *, reason: str, code: int) -> None:
    check_manners(result, path)
    message = result["message"] or result["printed"]
    assert result["code"] == code, f"{name_of(result)}: {result['code']} {message[:500]}"
    assert re.search(reason, message), f"{name_of(result)}: {message[:500]}"
    assert path.name in message or "/dev/zero" in message, message[:500]
    assert len(message) < 2500 + 4 * len(str(path)), len(message)
    assert result["seconds"] < 1, f"{name_of(result)}: {result['seconds']:.2f} s"
    assert result["left"] == [], f"{name_of(result)} left {result['left']}"


def check_accepted(result: dict[str, Any], path: Path) -> None:
    check_manners(result, path)
    assert result["code"] == 0, f"{name_of(result)}: {result['message']}{result['printed']}"[:500]


def check(result: dict[str, Any], case: Case, path: Path) -> None:
    """One door against what a case expects of it."""
    word = word_of(result["door"])
    if word in WRITERS:
        check_writer(result, case, path)
    elif case.at == "dump":
        check_refusal(result, case, path, reason="not finished|holds no manifest", code=INCOMPLETE)
    elif case.at == "rows" and word not in ROW_READERS:
        check_accepted(result, path)
    elif case.at == "verify" and word != "verify":
        if result["code"] or result["error"]:  # looking an id up may notice as well
            check_refusal(result, case, path, reason=case.reason, code=case.code)
        else:
            check_accepted(result, path)
    else:
        reason = case.verify_reason if word == "verify" else case.reason
        if word in ("merge", "export"):  # rows in order: what `verify` finds in them, they find in the same words
            reason = f"{case.reason}|{case.verify_reason}"
        check_refusal(result, case, path, reason=reason, code=case.code)


def check_writer(result: dict[str, Any], case: Case, path: Path) -> None:
    """A dump may not be gone on with; it may be replaced, or that is refused too."""
    if result["door"] == "resume":
        check_refusal(result, case, path, reason=case.reason, code=case.code)
    else:
        check_manners(result, path)


# --------------------------------------------------------------------------- the promise


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "hostile_case" in metafunc.fixturenames:
        step = 1 if metafunc.config.getoption("--long") else 2
        metafunc.parametrize("hostile_case", REFUSED[::step], ids=lambda case: case.name)


def test_a_hostile_cache_is_refused_for_its_own_reason(
    hostile_case: Case, tmp_path: Path, visit: Callable[..., list[dict[str, Any]]], every_door: bool
) -> None:
    case = hostile_case
    path = case.build(tmp_path)
    before = outside(tmp_path, path)
    for result in visit(path, doors_of(case, every_door)):
        check(result, case, path)
    if case.at != "later":
        assert outside(tmp_path, path) == before


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_a_valid_cache_is_accepted(
    case: Case, tmp_path: Path, visit: Callable[..., list[dict[str, Any]]], every_door: bool
) -> None:
    path = case.build(tmp_path)
    for result in visit(path, doors_of(case, every_door)):
        check_accepted(result, path)
    if not path.is_file():
        path.chmod(0o755)  # for pytest, which removes it


def outside(folder: Path, path: Path) -> dict[str, int]:
    """Files beside a cache, with their sizes: what a case put there for a door to read, remove or write to."""
    found = [p for p in folder.rglob("*") if not p.is_relative_to(path) and not p.is_dir()]
    return {str(p): p.lstat().st_size for p in found}


# --------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("case", [case for case in CASES if case.at == "shown"], ids=lambda case: case.name)
def test_what_a_cache_says_of_itself_is_shown_harmlessly_and_in_full(case: Case, tmp_path: Path, knock: Knock) -> None:
    path = case.build(tmp_path)
    as_json, card = knock(path, ["kdcache inspect --json", "kdcache card"])["results"]
    check_accepted(as_json, path)
    check_accepted(card, path)
    assert json.loads(as_json["printed"])["provenance"] == describe(path)["provenance"]
    head, _, body = card["printed"].removeprefix("---\n").partition("\n---\n")
    assert [line.split(":")[0] for line in head.splitlines() if line[0] not in " -"] == FRONT_MATTER
    table = body.partition("```")[0]
    assert not re.search(r"[<>\[\]!]", table), table
    assert all(line.count("|") == 3 for line in table.splitlines() if line.startswith("|"))


def test_a_card_takes_the_place_of_a_link_and_leaves_alone_what_it_leads_to(tmp_path: Path) -> None:
    path = put_folder(tmp_path)
    (tmp_path / "diary").write_text("mine")
    (path / "README.md").symlink_to(tmp_path / "diary")
    with pytest.raises(UsageError, match="exists"):
        write_card(path)
    write_card(path, overwrite=True)
    assert (tmp_path / "diary").read_text() == "mine"
    assert not (path / "README.md").is_symlink()


# --------------------------------------------------------------------------- other ways in


HDF5 = [case for case in HOSTILE if case.topic.startswith("hostile_hdf5")]


def test_hdf5_attacks_are_found_in_the_shards_of_a_folder_too(
    tmp_path: Path, knock: Knock, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    tried = 0
    for case in HDF5[:: count(10, 1)]:
        folder = tmp_path / case.name
        folder.mkdir()
        data = case.build(folder)
        if 48_000 < data.stat().st_size < 2 << 20:  # others are refused by their size alone
            path = put_shard(folder, data.read_bytes())
            (result,) = knock(path, ["verify"])["results"]
            check_refusal(result, case, path, reason=f"v000-00000.h5: .*{case.reason}", code=case.code)
            tried += 1
    assert tried >= count(9, 90)
    proved("S1", shards=tried)


def test_what_libhdf5_makes_as_our_writer_does_is_parsed() -> None:
    data = edited(create)  # so it is the change that is refused in the cases that change one thing about this array
    assert (
        parse(lambda offset, length: data[offset : offset + length], len(data), name="x").arrays["logits"].rows == ROWS
    )


def test_reading_a_cache_never_loads_libhdf5_whatever_it_asks_for(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "unknown_filter")
    script = """
import sys, numpy as np, kdcache
from kdcache.store.inspect import describe
with kdcache.open(sys.argv[1]) as cache:
    cache.gather(np.arange(len(cache)))
describe(sys.argv[1])
try:
    kdcache.open(sys.argv[2])
except kdcache.CorruptCacheError:
    with open("/proc/self/maps") as maps:
        assert "hdf5" not in maps.read().lower()
    assert "h5py" not in sys.modules and "torch" not in sys.modules
    print("refused")
"""
    (tmp_path / "libevil.so").write_bytes(b"")
    paths = [put_file(tmp_path, sound_file(), "sound.h5"), case.build(tmp_path)]
    command = [sys.executable, "-W", "error", "-c", script, *map(str, paths)]
    variables = {**os.environ, "HDF5_PLUGIN_PATH": str(tmp_path)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_commands_exit_with_the_documented_code_and_no_traceback(
    tmp_path: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    cases = [case for case in REFUSED if case.at != "later"][:: count(150, 4)]
    for case in cases:
        folder = tmp_path / case.name
        folder.mkdir()
        command = [sys.executable, "-m", "kdcache", "verify", str(case.build(folder))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == (INCOMPLETE if case.at == "dump" else case.code), case.name
        assert done.stderr.startswith("Error: ")
        assert "Traceback" not in done.stderr
    proved("S1", real_processes=len(cases))


# --------------------------------------------------------------------------- the zoo itself


def test_there_are_enough_cases_and_the_page_lists_them(proved: Callable[..., None]) -> None:
    accepted = [case for case in CASES if case.at == "accepted"]
    assert len(REFUSED) >= 40
    assert len(accepted) >= 20
    assert all(len(case.text) > 10 for case in CASES)
    assert (HERE / "README.md").read_text(encoding="utf-8") == readme(), "run make_hostile.py --readme"
    doors = len(READERS) + len(COMMANDS)
    proved("S1", hostile_files=len(HOSTILE), valid_files=len(accepted), doors=doors, reasons=len(reasons()))


def reasons() -> set[str]:
    return {case.reason for case in REFUSED}


def test_no_two_attacks_share_a_reason_unless_they_are_the_same_thing() -> None:
    by_reason: dict[str, list[Case]] = defaultdict(list)
    for case in REFUSED:
        by_reason[case.reason].append(case)
    for reason, cases in by_reason.items():
        assert reason
        first, *others = [case.name for case in cases if not case.alike] or [""]
        assert first, f"{cases[0].alike}, whose reason {cases[0].name} has, is another one"
        assert not others, f"{first} and {others} are refused with {reason!r}"
        assert all(case.alike == first for case in cases if case.alike)


@pytest.mark.long
def test_a_reason_fits_no_other_attack(tmp_path: Path, knock: Knock, proved: Callable[..., None]) -> None:
    messages = {}
    for case in REFUSED:
        folder = tmp_path / case.name
        folder.mkdir()
        door = {"verify": "verify", "dump": "resume"}.get(case.at, "open")
        messages[case.name] = knock(case.build(folder), [door])["results"][0]["message"]
    others = {}
    for case in REFUSED:
        fits = {name for name, message in messages.items() if re.search(case.reason, message)}
        alike = {other.name for other in REFUSED if (other.alike or other.name) == (case.alike or case.name)}
        others[case.name] = fits - alike
    assert not any(others.values()), {name: fits for name, fits in others.items() if fits}
    proved("S1", reasons_compared=len(messages) ** 2)


def test_what_no_door_may_do_is_noticed(tmp_path: Path, knock: Knock) -> None:
    path = put_file(tmp_path, sound_file())
    greedy, busy, curious, trusting = knock(path, ["greedy", "busy", "curious", "trusting"])["results"]
    assert "MemoryError" in greedy["crash"]
    assert busy["seconds"] > 0.2
    with pytest.raises(AssertionError, match="curious: open /etc/hostname"):
        check_manners(curious, path)
    with pytest.raises(AssertionError, match=r"trusting: pickle\.find_class"):
        check_manners(trusting, path)


def test_a_door_that_hangs_is_noticed(tmp_path: Path, knock: Knock) -> None:
    answer = knock(put_file(tmp_path, sound_file()), ["hanging"], seconds=1)
    assert answer["failed"] == "killed by signal 14"
