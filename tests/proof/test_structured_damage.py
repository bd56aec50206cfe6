"""Promise I2: rows, blocks and files that are lost, repeated, old or in the wrong place are found, all of them.

Found means: `verify` says so, and whoever reads the rows concerned gets a refusal or what was stored, bit by bit. The
exception is a forgery in which everything was computed anew: that is another cache, which the root hash alone tells.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structured
from damage import REFUSALS, Damage, Subject, Subjects, contents, wrong
from recipes import FILES, FOLDERS, LARGE, Recipe
from structured import Kind, effective

from kdcache.errors import MismatchError
from kdcache.store import cache as caches
from kdcache.store.verify import verify

EVERYWHERE = (*FOLDERS, *FILES, *LARGE)
SHARDS = tuple(recipe for recipe in EVERYWHERE if not recipe.one_file)
ROW_KINDS = (
    structured.swapped_rows,
    structured.zeroed_rows,
    structured.duplicated_rows,
    structured.stale_rows,
    structured.rows_moved_with_their_checksums,
)
CHUNK_KINDS = (
    structured.swapped_chunks,
    structured.zeroed_chunks,
    structured.duplicated_chunks,
    structured.stale_chunks,
)
CHUNKS = {"sector": 150, "page": 150, "half a MiB": 50, "MiB": 50, "chunk of 256 rows": 100}  # 500 of each kind
LENGTHS = 150  # random ones of each form, beside every boundary
SHARD_KINDS = (
    structured.swapped_shards,
    structured.missing_shards,
    structured.stale_shards,
    structured.manifests_of_another_dump,
    structured.misdirected_writes,
)
pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("damage"))


@pytest.fixture
def others(count: Callable[[int, int], int]) -> int:
    """How many dumps with the same headers there are of each form."""
    return count(1, 4)


def damage_and_check(chosen: list[Subject], kind: Kind, wanted: int) -> int:
    """Damages the caches in turn; returns how many rows the damages concerned."""
    rng = np.random.default_rng(sum(map(ord, str(kind))))
    concerned = 0
    for subject in itertools.islice(itertools.cycle(chosen), wanted):
        damage = effective(kind, subject, rng)
        rows = subject.affected(damage)
        if kind is not structured.manifests_of_another_dump:
            unharmed = subject.check(damage, rng, missing=kind is structured.missing_shards)
            assert not unharmed, f"rows {sorted(unharmed)} of {subject.recipe} were read"
        else:  # the cache says that it is the other dump: rows of it that are there are the right ones
            other = next(o for o in subject.others if o.files["manifest.json"] == damage["manifest.json"])
            subject.check(damage, rng, truth=other.rows)
        concerned += len(rows)
    return concerned


@pytest.mark.parametrize("kind", ROW_KINDS, ids=lambda kind: kind.__name__)
def test_rows_in_the_wrong_place_are_found_and_never_read(
    subjects: Subjects, kind: Kind, others: int, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    wanted = count(len(EVERYWHERE), 500)
    rows = damage_and_check([subjects.of(recipe, others=others) for recipe in EVERYWHERE], kind, wanted)
    assert rows >= wanted
    proved("I2", **{kind.__name__: wanted, "rows": rows})


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("kind", CHUNK_KINDS, ids=lambda kind: kind.__name__)
def test_blocks_in_the_wrong_place_are_found_and_never_read(
    subjects: Subjects, kind: Any, size: str, others: int, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    wanted = count(2, CHUNKS[size])
    large = LARGE if CHUNKS[size] < 150 else EVERYWHERE
    made = [subjects.of(recipe, others=others) for recipe in large]
    roomy = [subject for subject in made if structured.has_room(subject, size)]
    damage_and_check(roomy, partial(kind, size=size), wanted)
    proved("I2", **{f"{kind.__name__}_({size})": wanted})


def test_the_blocks_of_a_full_run_are_five_hundred_of_each_kind() -> None:
    assert sum(CHUNKS.values()) == 500
    assert set(CHUNKS) == set(structured.BLOCKS)


@pytest.mark.parametrize("kind", SHARD_KINDS, ids=lambda kind: kind.__name__)
def test_shards_in_the_wrong_place_are_found_and_never_read(
    subjects: Subjects, kind: Kind, others: int, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    wanted = count(len(SHARDS), 500)
    damage_and_check([subjects.of(recipe, others=others) for recipe in SHARDS], kind, wanted)
    proved("I2", **{kind.__name__: wanted})


def test_files_that_have_grown_are_found(
    subjects: Subjects, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    wanted = count(len(EVERYWHERE), 500)
    damage_and_check([subjects.of(recipe) for recipe in EVERYWHERE], structured.grown_files, wanted)
    proved("I2", grown_files=wanted)


def test_another_dump_has_equal_headers_and_other_rows(subjects: Subjects) -> None:
    """Else the stale rows, chunks and shards above would be told by their headers."""
    for recipe in FOLDERS:
        subject = subjects.of(recipe, others=1)
        other = subject.others[0].files
        assert any(subject.files[name] != other[name] for name in subject.containers)
        for name in subject.containers:
            assert len(subject.files[name]) == len(other[name])
            for start, stop in subject.regions_of(name)["header"]:
                assert subject.files[name][start:stop] == other[name][start:stop]


@pytest.mark.parametrize("recipe", [*FOLDERS, *FILES], ids=str)
def test_a_file_cut_at_any_length_is_found(
    subjects: Subjects, recipe: Recipe, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """At every boundary, and at random lengths: shards, one file, manifest, class names."""
    subject = subjects.of(recipe)
    rng = np.random.default_rng(1)
    every = [(name, length) for name in subject.files for length in structured.lengths(subject, name)]
    chosen = [every[n] for n in rng.permutation(len(every))[: count(12, len(every))]]
    for _ in range(count(4, LENGTHS)):
        name = str(rng.choice([*subject.files]))
        chosen.append((name, int(rng.integers(len(subject.files[name])))))
    for name, length in chosen:
        unharmed = subject.check({name: subject.files[name][:length]}, rng)
        assert not unharmed, f"rows {sorted(unharmed)} of {name}, cut to {length} bytes, were read"
    assert len(chosen) >= count(16, LENGTHS + len(every))
    proved("I2", truncations=len(chosen))


def test_the_random_lengths_of_a_full_run_are_a_thousand() -> None:
    assert LENGTHS * len([*FOLDERS, *FILES]) >= 1_000


@pytest.mark.parametrize("recipe", [FOLDERS[0], FOLDERS[2], FOLDERS[4], *FILES], ids=str)
def test_a_forgery_in_which_everything_was_computed_anew_is_told_by_its_root_hash_alone(
    subjects: Subjects, recipe: Recipe, proved: Callable[..., None]
) -> None:
    subject = subjects.of(recipe, others=1)
    assert verify(subject.path, expect_root=subject.root).ok
    subject.apply(subject.others[0].files)
    try:
        assert verify(subject.path).ok
        with caches.open(subject.path) as cache:
            everything = np.arange(subject.rows)
            assert wrong(cache.gather(everything), subject.truth, everything)
        with pytest.raises(MismatchError, match="expected"):
            verify(subject.path, expect_root=subject.root)
        with pytest.raises(MismatchError, match="it is another dump"):
            caches.open(subject.path, expect_root=subject.root)
        if recipe in (FOLDERS[0], FILES[0]):
            ended = command(subject.path, "--expect-root", subject.root)
            assert ended.returncode == 5
            assert subject.root in ended.stderr
            assert "Traceback" not in ended.stderr
    finally:
        subject.restore()
    proved("I2", forgeries=1)


@pytest.mark.parametrize("recipe", [FOLDERS[n] for n in (0, 1, 2, 4)], ids=str)
def test_rows_that_moved_are_told_by_their_own_checksums_where_all_digests_were_computed_anew(
    subjects: Subjects, recipe: Recipe, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """Two whole rows, ids and checksums among them, have changed places, and the manifest was made to fit.

    Not of several views with text ids: there the ids of the first view stand for all of them (`verify` compares them),
    so who forges the digests of its ids misleads a reader of the others.
    """
    subject = subjects.of(recipe)
    rng = np.random.default_rng(2)
    wanted = count(3, 100)
    for _ in range(wanted):
        damage = effective(structured.swapped_whole_rows, subject, rng)
        rows = subject.affected(damage)
        assert len(rows) == 2
        unharmed = subject.check({**damage, "manifest.json": structured.resealed(subject, damage)}, rng)
        assert not unharmed
    proved("I2", resealed_swaps=wanted)


def command(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "kdcache", "verify", str(path), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


FIRST, SECOND, FILE = "shards/v000-00000.h5", "shards/v000-00001.h5", "teacher.h5"
RECORDS = ("shards/v000-00000.json", "shards/v000-00001.json")


def test_what_is_stale_swapped_or_cut_in_a_dump_in_progress_never_becomes_part_of_a_sound_cache(
    tmp_path: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """The next run refuses, does the shard again, or lists shards that `verify` and readers then refuse."""
    from unfinished import Unfinished

    dump = Unfinished(tmp_path / "dump")
    (tmp_path / "stale").mkdir()
    dump.start(tmp_path / "stale" / "dump", 2)
    stale = contents(tmp_path / "stale" / "dump")
    damages: list[Damage] = [
        {a: dump.files[b], b: dump.files[a]} for a, b in ((FIRST, SECOND), RECORDS, (FIRST, RECORDS[0]))
    ]
    damages += [{RECORDS[0]: dump.files[RECORDS[1]]}, {FIRST: dump.files[SECOND]}]
    damages += [{name: stale[name]} for name in (*RECORDS, FIRST, SECOND) if stale[name] != dump.files[name]]
    damages += [{name: None} for name in (*RECORDS, FIRST, SECOND, "plan.json")]
    rng = np.random.default_rng(0)
    for name in (*RECORDS, FIRST, "plan.json"):
        every = range(len(dump.files[name]))
        chosen = rng.choice(every, min(count(2, 500), len(every)), replace=False).tolist()
        damages += [{name: dump.files[name][:length]} for length in chosen]
        damages += [{name: dump.files[name] + more} for more in (b"\n", dump.files[name])]
    found: Counter[str] = Counter()
    for damage in damages:
        outcome = dump.outcome(damage)
        found[outcome] += 1
        if outcome == "other bytes":
            assert verify(dump.path).problems
            with caches.open(dump.path) as cache, pytest.raises(REFUSALS):
                cache.gather(np.arange(len(cache)))
    assert set(found) == {"refused", "the same bytes", "other bytes"}
    proved("I2", damages_of_a_dump_in_progress=found.total())


COMMANDS: dict[str, tuple[Recipe, Callable[[Subject], Damage], int, str]] = {
    "a missing shard": (FOLDERS[0], lambda s: {SECOND: None}, 4, "v000-00001.h5 is missing"),
    "swapped shards": (
        FOLDERS[0],
        lambda s: {FIRST: s.files[SECOND], SECOND: s.files[FIRST]},
        3,
        "v000-00000.h5: its header describes another shard",
    ),
    "a stale shard": (
        FOLDERS[0],
        lambda s: {FIRST: s.others[0].files[FIRST]},
        3,
        "v000-00000.h5: bytes outside the payload",
    ),
    "the manifest of another dump": (
        FOLDERS[0],
        lambda s: {"manifest.json": s.others[0].files["manifest.json"]},
        3,
        "v000-00000.h5: bytes outside the payload",
    ),
    "a zeroed sector": (
        LARGE[0],
        lambda s: {FIRST: s.files[FIRST][:8192] + bytes(512) + s.files[FIRST][8704:]},
        3,
        "v000-00000.h5: its sha256",
    ),
    "a short shard": (FOLDERS[0], lambda s: {FIRST: s.files[FIRST][:-1]}, 3, "v000-00000.h5: 4"),
    "a grown shard": (FOLDERS[0], lambda s: {FIRST: s.files[FIRST] + b"x"}, 3, "truncated or grown"),
    "a short manifest": (FOLDERS[0], lambda s: {"manifest.json": s.files["manifest.json"][:-1]}, 3, "manifest.json: "),
    "no manifest": (FOLDERS[0], lambda s: {"manifest.json": None}, 4, "holds no manifest.json"),
    "no class names": (FOLDERS[4], lambda s: {"classes.json": None}, 4, "classes.json is missing"),
    "a short file": (FILES[0], lambda s: {FILE: s.files[FILE][:-1]}, 3, "teacher.h5: "),
    "a grown file": (FILES[0], lambda s: {FILE: s.files[FILE] + b"x"}, 3, "truncated or grown"),
    "rows of an older dump in one file": (FILES[0], lambda s: {FILE: stale_logits(s)}, 3, "sha256 of its payload"),
}


def stale_logits(subject: Subject) -> bytes:
    """One file with the logits of another dump, under its own header, ids and checksums."""
    (start, stop), *_ = subject.regions_of(FILE)["logits"]
    data = subject.files[FILE]
    return data[:start] + subject.others[0].files[FILE][start:stop] + data[stop:]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_names_the_file_and_what_is_wrong_and_exits_with_3_or_4(
    subjects: Subjects, name: str, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--long") and name not in ("a missing shard", "swapped shards"):
        pytest.skip("runs with --long")
    recipe, damage, code, message = COMMANDS[name]
    subject = subjects.of(recipe, others=1)
    subject.apply(damage(subject))
    try:
        ended = command(subject.path, "--json")
    finally:
        subject.restore()
    assert ended.returncode == code
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not json.loads(ended.stdout)["ok"]
