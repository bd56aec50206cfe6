"""Promise I1: one flipped bit, wherever it is, is found by `verify`, and no row that it touches is ever read.

Where: every array, header and slack of shards and one-file caches, the manifest, `classes.json`, and the plan and
commit records of a dump in progress (there "found" means that the next run refuses, or ends in equal bytes).
Not part of a cache, and so not covered: its card, its lock file, and names that the manifest does not list.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import REFUSALS, Subject, Subjects, bits_of, contents, flipped, put, regions
from recipes import FILES, FOLDERS, Recipe

from kdcache.errors import KDCacheError
from kdcache.store import cache as caches
from kdcache.store.verify import verify
from kdcache.store.writer import Writer

RECIPES = pytest.mark.parametrize("recipe", [*FOLDERS, *FILES], ids=str)
FLIPS = 1_300  # of each form
pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("flips"))


def flip_and_check(subject: Subject, name: str, region: str, bit: int, rng: np.random.Generator) -> None:
    """One flip: found by `verify`, and at read time where a reader looks."""
    damage = {name: flipped(subject.files[name], bit)}
    subject.apply(damage)
    try:
        assert verify(subject.path).problems
        rows = subject.affected(damage)
        others = rng.integers(subject.rows, size=2)
        read = np.unique([*rows, *others]).astype(np.int64)
        refused = subject.read(read, access=("mmap", "pread")[bit % 2])
        if name not in subject.containers:
            assert refused == set(read.tolist())  # a manifest or head that does not open gives no row at all
        elif region in ("header", "slack"):
            # Slack of one file is zero, which `verify` alone compares; its rows are the right ones.
            names = {part.path.name for part in subject.parts_of(name)}
            expected = {r for r in read.tolist() if part_of(subject, r).path.name in names}
            assert refused == (set() if subject.recipe.one_file and region == "slack" else expected)
        else:
            assert len(rows) == 1
            assert refused.issuperset(rows.tolist())
    finally:
        subject.restore()


def part_of(subject: Subject, row: int) -> Any:
    return next(p for p in subject.catalog.parts if 0 <= row - subject.first_row(p) < p.rows)


@RECIPES
def test_a_flipped_bit_anywhere_is_found_by_verify_and_when_its_row_is_read(
    subjects: Subjects, recipe: Recipe, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """In turn an array, the header and the slack of every file, and the manifest; which bit is random."""
    subject = subjects.of(recipe)
    rng = np.random.default_rng(len(recipe.name))
    places = [(name, region) for name in subject.files for region in subject.regions_of(name)]
    rng.shuffle(places)
    wanted = count(25, FLIPS)
    done: Counter[str] = Counter()
    for name, region in itertools.islice(itertools.cycle(places), wanted):
        spans = subject.regions_of(name)[region]
        flip_and_check(subject, name, region, next(bits_of(spans, 1, rng)), rng)
        done[region] += 1
    assert done.total() == wanted
    arrays = {a for part in subject.catalog.parts for a in part.arrays}
    files = set() if recipe.one_file else {"manifest.json", *(["classes.json"] if recipe.names else [])}
    files |= set() if recipe.features is None else {"weight", "bias"}
    assert wanted < len(places) or set(done) == {*arrays, *files, "header", "slack"}
    proved("I1", flips=done.total(), regions=len(done))
    assert verify(subject.path).ok


def test_the_random_flips_of_a_full_run_are_ten_thousand() -> None:
    assert FLIPS * len([*FOLDERS, *FILES]) >= 10_000


SMALL = Recipe("one shard", rows=8, shard_rows=8, classes=3, digests=True)
SMALL_FILE = Recipe("a small file", rows=8, classes=3, digests=True, one_file=True)


@pytest.mark.parametrize(
    ("recipe", "name", "region"),
    [
        (SMALL, "shards/v000-00000.h5", "header"),
        (SMALL, "shards/v000-00000.h5", "slack"),
        (SMALL, "manifest.json", "manifest.json"),
        (SMALL_FILE, "teacher.h5", "header"),
        (SMALL_FILE, "teacher.h5", "slack"),
    ],
    ids=lambda value: str(value).replace("/", " "),
)
def test_every_single_bit_outside_the_rows_is_found(
    subjects: Subjects, recipe: Recipe, name: str, region: str, request: pytest.FixtureRequest, proved: Any
) -> None:
    subject = subjects.of(recipe)
    spans = subject.regions_of(name)[region]
    rng = np.random.default_rng(0)
    some = None if request.config.getoption("--long") else 30
    flips = 0
    for bit in bits_of(spans, some, rng):
        flip_and_check(subject, name, region, bit, rng)
        flips += 1
    assert flips == (some or sum(stop - start for start, stop in spans) * 8)
    proved("I1", **{f"bits_of_the_{region.partition('.')[0]}_of_{recipe.name.replace(' ', '_')}": flips})


@pytest.fixture
def unfinished(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """A dump in progress of the kind asked for."""
    import unfinished

    return getattr(unfinished, request.param)(tmp_path)


QUICK = ["Unfinished", "UnfinishedWriter"]
ALL_KINDS = [*QUICK, "UnfinishedFile", "UnfinishedPrecompute", "UnfinishedPrecomputeFile"]


@pytest.mark.parametrize("name", ["plan.json", "shards/v000-00001.json"], ids=["plan", "commit record"])
@pytest.mark.parametrize("unfinished", ALL_KINDS, indirect=True)
def test_a_bit_of_a_dump_in_progress_is_refused_or_does_not_matter(
    unfinished: Any, name: str, request: pytest.FixtureRequest, proved: Callable[..., None]
) -> None:
    """Every single bit, in the two kinds of run that take a millisecond; some hundred in those of the three others."""
    kind, data = type(unfinished).__name__, unfinished.files[name]
    some = (None if kind in QUICK else 300) if request.config.getoption("--long") else (30 if kind in QUICK else 4)
    found: Counter[str] = Counter()
    for bit in bits_of([(0, len(data))], some, np.random.default_rng(0)):
        found[unfinished.outcome({name: flipped(data, bit)})] += 1
    assert found.total() == (some or len(data) * 8)
    assert set(found) <= {"refused", "the same bytes"}
    assert found["refused"]
    what = "plan" if name == "plan.json" else "commit_record"
    proved("I1", **{f"bits_of_a_{what}_in_progress": found.total()})
    assert unfinished.outcome({}) == "the same bytes"


@pytest.mark.parametrize("unfinished", ALL_KINDS, indirect=True)
def test_the_advice_about_a_damaged_commit_record_mends_the_dump(unfinished: Any) -> None:
    name = "shards/v000-00000.json"
    unfinished.reset({name: flipped(unfinished.files[name], 100)})
    with pytest.raises(KDCacheError, match=r"v000-00000\.json: .*; remove it and run the same command again"):
        unfinished.finish(unfinished.path)
    put(unfinished.parts / name, None)
    assert unfinished.run_again({}) == "the same bytes"


@pytest.mark.parametrize("unfinished", ALL_KINDS, indirect=True)
def test_a_damaged_shard_of_a_dump_in_progress_never_becomes_part_of_a_sound_cache(
    unfinished: Any, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    """The next run refuses, or lists the shard as it was made: then `verify` and readers find what became of it."""
    rng = np.random.default_rng(0)
    name = "shards/v000-00001.h5"
    flips = 0
    for spans in regions(name, unfinished.files[name]).values():
        for bit in bits_of(spans, count(1, 12), rng):
            outcome = unfinished.outcome({name: flipped(unfinished.files[name], bit)})
            flips += 1
            if outcome == "other bytes":
                assert not unfinished.ending  # a merge reads every row
                assert contents(unfinished.path)["manifest.json"] == unfinished.whole["manifest.json"]
                assert any("v000-00001.h5" in problem for problem in verify(unfinished.path).problems)
                with caches.open(unfinished.path) as cache, pytest.raises(REFUSALS):
                    cache.gather(np.arange(25, 50))
    proved("I1", flips_of_a_shard_in_progress=flips)


def test_a_wrong_id_of_a_committed_shard_is_refused_before_a_writer_tells_which_samples_are_done(
    tmp_path: Path,
) -> None:
    """A caller who skips what is done would lose the sample that the damaged id has turned into."""
    from unfinished import UnfinishedWriter

    dump = UnfinishedWriter(tmp_path)
    name = "shards/v000-00000.h5"
    (start, _), *_ = regions(name, dump.files[name])["sample_id"]
    damaged = dump.files[name][: start + 6] + b"9" + dump.files[name][start + 7 :]  # image 0 becomes image 9
    dump.reset({name: damaged})
    with pytest.raises(KDCacheError, match=r"v000-00000\.h5: its header"):
        Writer(dump.path, classes=4, resume=True)


def test_what_is_not_part_of_a_cache_may_change_and_is_noted(subjects: Subjects) -> None:
    """The card, the lock file, names that begin with a dot, and shards that the manifest does not list."""
    subject = subjects.of(FOLDERS[0])
    shard = subject.files["shards/v000-00000.h5"]
    extras = {
        "README.md": b"# A card",
        ".lock": b"x",
        ".nfs0001": b"x",
        "shards/.tmp-v000-00000.h5-1-0123abcd": shard[:100],
        "shards/v000-00007.h5": flipped(shard, 5),
        "shards/v000-00001.json": b"{}",
        "plan.json": b"{",
    }
    subject.apply(extras)
    try:
        report = verify(subject.path)
        assert report.ok
        names = [".tmp-v000-00000.h5-1-0123abcd", "v000-00001.json", "v000-00007.h5", "plan.json"]
        assert list(report.unlisted) == names
        assert report.to_json()["unlisted"] == names
        assert subject.read(np.arange(subject.rows)) == set()
    finally:
        subject.restore()
    assert verify(subject.path).unlisted == ()


COMMAND = [sys.executable, "-m", "kdcache", "verify"]


@pytest.mark.parametrize(
    ("recipe", "name", "region", "message"),
    [
        (FOLDERS[0], "shards/v000-00000.h5", "logits", "v000-00000.h5: its sha256"),
        (FOLDERS[0], "shards/v000-00002.h5", "header", "v000-00002.h5: "),
        (FOLDERS[0], "shards/v000-00001.h5", "slack", "v000-00001.h5: bytes outside the payload"),
        (FOLDERS[2], "shards/v003-00001.h5", "row_crc", "v003-00001.h5: bytes outside the payload"),
        (FOLDERS[0], "manifest.json", "manifest.json", "manifest.json: "),
        (FOLDERS[4], "classes.json", "classes.json", "classes.json: the class names do not match"),
        (FILES[0], "teacher.h5", "logits", "teacher.h5: the sha256 of its payload"),
        (FILES[0], "teacher.h5", "header", "teacher.h5: "),
        (FILES[0], "teacher.h5", "slack", "teacher.h5: bytes between its arrays"),
        (FILES[1], "teacher.h5", "sample_id", "teacher.h5: its ids or row checksums"),
    ],
    ids=lambda value: None if isinstance(value, str) and ":" in value else str(value).replace("/", " "),
)
def test_the_command_exits_with_3_and_names_the_file_and_what_is_wrong_with_it(
    subjects: Subjects,
    recipe: Recipe,
    name: str,
    region: str,
    message: str,
    request: pytest.FixtureRequest,
) -> None:
    if not request.config.getoption("--long") and region not in ("logits", "manifest.json"):
        pytest.skip("runs with --long")
    subject = subjects.of(recipe)
    bit = next(bits_of(subject.regions_of(name)[region], 1, np.random.default_rng(1)))
    subject.apply({name: flipped(subject.files[name], bit)})
    try:
        ended = subprocess.run([*COMMAND, str(subject.path), "--json"], capture_output=True, text=True, timeout=60)
    finally:
        subject.restore()
    assert ended.returncode == 3
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not json.loads(ended.stdout)["ok"]
