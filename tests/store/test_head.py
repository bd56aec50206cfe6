"""`head.h5`: written once, checked before any row is decoded, copied by merge; missing, damaged and hostile ones."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from kdcache.errors import CorruptCacheError, IncompleteCacheError, KDCacheError, LogitsError, StorageError, UsageError
from kdcache.format import known_heads
from kdcache.format.arrays import ArraySpec
from kdcache.format.factored import Factored
from kdcache.format.hdf5_header import build_layout
from kdcache.format.head import HEAD_FILE, HeadRecord, head_header
from kdcache.format.known_heads import forget_heads
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.store import posix
from kdcache.store.cache import open as open_cache
from kdcache.store.dump import open_dump
from kdcache.store.export import export
from kdcache.store.folder import read_manifest
from kdcache.store.head_writer import HeadContent, head_content, place_head
from kdcache.store.inspect import describe
from kdcache.store.merge import merge
from kdcache.store.plan import Plan
from kdcache.store.removal import remove_dump
from kdcache.store.verify import verify

ROWS, SHARD_ROWS, CLASSES, WIDTH = 100, 40, 200, 16
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((ROWS, WIDTH)).astype("<f4")
WEIGHT, BIAS = RNG.standard_normal((CLASSES, WIDTH)).astype("<f4"), RNG.standard_normal(CLASSES).astype("<f4")
LOGITS = INPUTS @ WEIGHT.T + BIAS


@pytest.fixture(autouse=True)
def no_heads_stay() -> Iterator[None]:
    forget_heads()
    yield
    forget_heads()


def write(folder: Path, content: HeadContent | None = None, *, views: tuple[int, ...] = (0,)) -> Path:
    """A factored cache as `precompute` makes one."""
    content = head_content(WEIGHT, BIAS) if content is None else content
    encoding = Factored((CLASSES,), WIDTH, content.record.sha256)
    schema = RowSchema(encoding, "<i8", has_labels=False, has_digests=False)
    plan = Plan(schema, ClassList.of(CLASSES, None), SHARD_ROWS, ROWS, {}, views, head=content.record)
    dump = open_dump(folder, plan)
    place_head(dump, content)
    for number in range(plan.shard_count):
        view, start, stop = plan.span(number)
        index = number % plan.shards_per_view
        if dump.claim(view, index):
            container = dump.container(view, index, start, stop)
            rows = {"sample_id": np.arange(start, stop), **encoding.encode_features(INPUTS[start:stop]).arrays}
            container.append(rows, view=view, positions=np.arange(start, stop))
            dump.commit(container, container.record(view=view, start=start, ids=(start, stop - 1)), index)
            dump.release(view, index)
    dump.finish(dump.all_records() or [], samples=ROWS)
    dump.leave()
    forget_heads()
    return folder


def hostile_head(weight: Any, bias: Any, *, classes: int = CLASSES, features: int = WIDTH) -> HeadContent:
    """A head with any arrays, and a record that says the truth about its bytes."""
    arrays = {"weight": np.asarray(weight), "bias": np.asarray(bias)}
    specs = [ArraySpec(name, a.dtype.str, a.shape[1:]) for name, a in arrays.items()]
    layout = build_layout(specs, len(arrays["bias"]), head_header(classes, features))
    data = bytearray(layout.size)
    for offset, piece in layout.metadata:
        data[offset : offset + len(piece)] = piece
    for name, a in layout.arrays.items():
        data[a.offset : a.stop] = arrays[name].tobytes()
    record = HeadRecord(layout.size, hashlib.sha256(data).hexdigest(), layout.arrays)
    return HeadContent(record, lambda: iter([bytes(data)]))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write(tmp_path / "cache")


def test_rows_decode_with_the_layer_that_lies_beside_them(cache: Path) -> None:
    with open_cache(cache) as opened:
        rows = opened.gather(np.arange(ROWS))
        assert np.abs(rows.dense() - LOGITS).max() < 0.01
        assert opened.gather([-1]).dense().tolist() == [[0.0] * CLASSES]


def test_plain_h5py_reads_it(cache: Path) -> None:
    with h5py.File(cache / HEAD_FILE) as file:
        assert np.array_equal(file["weight"][:], WEIGHT)
        assert np.array_equal(file["bias"][:], BIAS)
        assert file.attrs["kdcache"].decode() == head_header(CLASSES, WIDTH)
    assert (cache / HEAD_FILE).stat().st_mode & 0o777 == 0o444


def test_the_manifest_lists_it_and_the_root_covers_it(cache: Path, tmp_path: Path) -> None:
    manifest = read_manifest(cache)
    assert manifest.head is not None
    assert manifest.head.size == (cache / HEAD_FILE).stat().st_size
    assert manifest.head.sha256 == hashlib.sha256((cache / HEAD_FILE).read_bytes()).hexdigest()
    assert manifest.head.sha256 == manifest.schema.encoding.to_json()["head"]
    other = write(tmp_path / "other", head_content(WEIGHT, BIAS + 1))
    assert read_manifest(other).root != manifest.root
    assert describe(cache)["bytes"] == manifest.head.size + sum(s.size for s in manifest.shards)


def test_a_large_layer_is_read_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.store.head._BLOCK_BYTES", 1000)
    monkeypatch.setattr("kdcache.store.head_writer._BLOCK_BYTES", 777)
    with open_cache(write(tmp_path / "cache")) as opened:
        assert np.abs(opened.gather(np.arange(ROWS)).dense() - LOGITS).max() < 0.01


def damage(cache: Path, how: str) -> None:
    head = cache / HEAD_FILE
    data = head.read_bytes()
    head.unlink()
    at = 1 + data.index(WEIGHT.tobytes()[:16])
    changed = {"truncated": data[:-8], "grown": data + bytes(8), "flipped": data[:at] + b"?" + data[at + 1 :]}
    if how in changed:
        head.write_bytes(changed[how])
    elif how == "a link":
        (cache / "elsewhere").write_bytes(data)
        head.symlink_to(cache / "elsewhere")
    elif how == "a folder":
        head.mkdir()
    elif how == "swapped":
        other = head_content(WEIGHT[::-1], BIAS)
        head.write_bytes(b"".join(other.blocks()))
        forget_heads()


DAMAGES = {
    "missing": (IncompleteCacheError, "missing"),
    "truncated": (CorruptCacheError, "truncated"),
    "grown": (CorruptCacheError, "grown"),
    "flipped": (CorruptCacheError, "sha256"),
    "swapped": (CorruptCacheError, "sha256"),
    "a link": (CorruptCacheError, "symbolic link"),
    "a folder": (CorruptCacheError, "a folder"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("was_open", [False, True])
def test_damage_shows_before_any_row_is_decoded(cache: Path, tmp_path: Path, how: str, was_open: bool) -> None:
    if was_open:  # the layer is known in this process, and the damage shows all the same
        open_cache(cache).close()
    damage(cache, how)
    kind, message = DAMAGES[how]
    with pytest.raises(kind, match=message):
        open_cache(cache)
    report = verify(cache)
    assert len(report.problems) == 1
    assert HEAD_FILE in report.problems[0]
    assert report.missing == (how == "missing")
    with pytest.raises(kind):
        merge(cache, tmp_path / "merged")
    assert not (tmp_path / "merged" / "manifest.json").exists()
    with pytest.raises(kind):
        export(cache, tmp_path / "rows.npz")
    assert not (tmp_path / "rows.npz").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: hostile_head(np.full((CLASSES, WIDTH), np.nan, "<f4"), BIAS), "NaN"),
        (lambda: hostile_head(WEIGHT, np.full(CLASSES, np.inf, "<f4")), "NaN or infinity"),
        (lambda: hostile_head(WEIGHT, BIAS, classes=3), "header"),
        (lambda: hostile_head(WEIGHT, BIAS, features=3), "header"),
    ],
)
def test_a_hostile_head_whose_hashes_are_right_is_refused(
    tmp_path: Path, content: Callable[[], HeadContent], message: str
) -> None:
    path = write(tmp_path / "cache", content())
    with pytest.raises(CorruptCacheError, match=message):
        open_cache(path)
    assert not verify(path).ok


@pytest.mark.parametrize(
    "content",
    [
        lambda: hostile_head(WEIGHT[:, :8], BIAS),
        lambda: hostile_head(WEIGHT[:100], BIAS[:100]),
        lambda: hostile_head(WEIGHT.astype("<f2"), BIAS),
        lambda: hostile_head(WEIGHT, np.zeros((CLASSES, 2), "<f4")),
    ],
)
def test_a_manifest_with_a_head_of_another_shape_is_refused(tmp_path: Path, content: Callable[[], HeadContent]) -> None:
    with pytest.raises(CorruptCacheError, match=r"head: array (weight|bias) is"):
        write(tmp_path / "cache", content())


def test_a_record_whose_arrays_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    sound = head_content(WEIGHT, BIAS)
    weight = sound.record.arrays["weight"]
    moved = replace(sound.record, arrays={**sound.record.arrays, "weight": replace(weight, offset=weight.offset - 8)})
    path = write(tmp_path / "cache", HeadContent(moved, sound.blocks))
    with pytest.raises(CorruptCacheError, match=r"manifest says|misaligned"):
        open_cache(path)


def test_weights_that_are_not_finite_are_never_written() -> None:
    with pytest.raises(LogitsError, match="NaN"):
        head_content(np.full((2, 2), np.nan), np.zeros(2))


def test_the_kept_layer_is_a_copy() -> None:
    weight = WEIGHT.copy()
    content = head_content(weight, BIAS)
    weight[:] = 0
    assert np.array_equal(known_heads.head_of(content.record.sha256).weight, WEIGHT)


def test_merging_to_a_folder_copies_it_and_to_a_file_is_refused(cache: Path, tmp_path: Path) -> None:
    root = merge(cache, tmp_path / "merged")
    assert root == read_manifest(cache).root
    assert (tmp_path / "merged" / HEAD_FILE).read_bytes() == (cache / HEAD_FILE).read_bytes()
    assert verify(tmp_path / "merged").ok
    with pytest.raises(UsageError, match="no one-file form"):
        merge(cache, tmp_path / "merged.h5")
    assert not list(tmp_path.glob("merged.h5*"))


def test_fewer_views_keep_the_head(tmp_path: Path) -> None:
    cache = write(tmp_path / "cache", views=(0, 1))
    merge(cache, tmp_path / "one", views=[1])
    assert verify(tmp_path / "one").ok
    assert (tmp_path / "one" / HEAD_FILE).exists()


def test_an_export_is_decoded(cache: Path, tmp_path: Path) -> None:
    with np.load(export(cache, tmp_path / "rows.npz"), allow_pickle=False) as rows:
        assert np.abs(rows["logits"] - LOGITS).max() < 0.01


def test_overwriting_removes_it_too(cache: Path) -> None:
    remove_dump(cache)
    assert not (cache / HEAD_FILE).exists()


def test_a_dump_whose_head_was_removed_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = place_head

    def place_and_remove(dump: Any, content: HeadContent) -> None:
        placed(dump, content)
        (dump.folder / HEAD_FILE).unlink()

    monkeypatch.setattr(f"{__name__}.place_head", place_and_remove)
    with pytest.raises(IncompleteCacheError, match=HEAD_FILE):
        write(tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("call", ["create", "pwrite_all", "make_read_only", "fsync", "rename", "fsync_folder"])
def test_a_disk_that_fails_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    content = head_content(WEIGHT, BIAS)
    encoding = Factored((CLASSES,), WIDTH, content.record.sha256)
    schema = RowSchema(encoding, "<i8", has_labels=False, has_digests=False)
    plan = Plan(schema, ClassList.of(CLASSES, None), SHARD_ROWS, ROWS, {}, head=content.record)
    dump = open_dump(tmp_path / "cache", plan)

    def fail(*arguments: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(posix, call, fail)
        with pytest.raises(StorageError, match=HEAD_FILE):
            place_head(dump, content)
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith(".tmp")]
    place_head(dump, content)
    assert (tmp_path / "cache" / HEAD_FILE).read_bytes() == b"".join(content.blocks())


def test_a_reopened_cache_reads_it_only_when_a_row_is_decoded(cache: Path) -> None:
    with open_cache(cache) as opened:
        rows = opened.gather(np.arange(10))
        data = pickle.dumps(opened)
    forget_heads()
    damage(cache, "flipped")
    again = pickle.loads(data)
    assert np.array_equal(again.gather(np.arange(10)).arrays["features"], rows.arrays["features"])
    with pytest.raises(CorruptCacheError, match="sha256"):
        again.gather(np.arange(10)).dense()


def _decode_in_child(opened: Any, queue: Any) -> None:
    queue.put(float(opened.gather(np.arange(ROWS)).dense().sum()))


def test_another_process_decodes_what_it_opened_again(cache: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    with open_cache(cache) as opened:
        queue = context.Queue()
        child = context.Process(target=_decode_in_child, args=(opened, queue))
        child.start()
        assert queue.get(timeout=60) == pytest.approx(float(opened.gather(np.arange(ROWS)).dense().sum()), rel=1e-5)
        child.join()


def test_rows_travel_without_the_layer(cache: Path) -> None:
    with open_cache(cache) as opened:
        rows = opened.gather(np.arange(2))
    assert len(pickle.dumps(rows.encoding)) < 500
    gc.collect()
    assert np.abs(rows.dense() - LOGITS[:2]).max() < 0.01  # also when their cache is closed


def test_a_one_file_cache_that_claims_factored_rows_is_refused(cache: Path, tmp_path: Path) -> None:
    from kdcache.format.headers import FileHeader, parse_file_header

    manifest = read_manifest(cache)
    header = FileHeader(manifest.schema, manifest.classes, ROWS, (0,), None, {})
    with pytest.raises(UsageError, match="one-file"):
        header.dump()
    dense = replace(header, schema=RowSchema(Factored((CLASSES,), WIDTH, "0" * 64), "<i8", False, False))
    text = (
        '{"encoding":'
        + str(dense.schema.encoding.to_json()).replace("'", '"')
        + (',"format":1,"kind":"cache","id":"<i8","labels":false,"digests":false}')
    )
    with pytest.raises(CorruptCacheError, match="one-file"):
        parse_file_header(text, rows=ROWS, where="x")


def test_rows_that_no_writer_stores_fail_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Factored.encode_features

    def without_scale(self: Factored, inputs: np.ndarray) -> Any:
        encoded = encode(self, inputs)
        encoded.arrays["row_scale"][3] = 0
        return encoded

    monkeypatch.setattr(Factored, "encode_features", without_scale)
    report = verify(write(tmp_path / "cache"))
    assert any("row_scale" in problem for problem in report.problems)


def test_errors_are_ours(cache: Path) -> None:
    damage(cache, "missing")
    with pytest.raises(KDCacheError):
        open_cache(cache)
