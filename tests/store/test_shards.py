"""The container writer: the bytes h5py would read, hashed on the way, in pieces of any size."""

from __future__ import annotations

import hashlib
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.format.checksums import file_sha256, payload_sha256, row_crcs
from kdcache.format.dense import Dense
from kdcache.format.schema import RowSchema
from kdcache.store import shards
from kdcache.store.shards import ContainerWriter, remove_temporaries

SCHEMA = RowSchema(Dense((3,), "float16"), "|S4", has_labels=True, has_digests=False)
ROWS = 30


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "logits": rng.normal(size=(ROWS, 3)).astype("<f2"),
        "row_max": rng.normal(size=ROWS).astype("<f4"),
        "sample_id": np.array([b"%d" % n for n in range(ROWS)], "S4"),
        "label": np.arange(ROWS) % 3,
    }


def append(writer: ContainerWriter, rows: dict[str, np.ndarray], start: int, stop: int) -> None:
    piece = {n: a[start:stop] for n, a in rows.items()}
    writer.append(piece, view=2, positions=np.arange(start, stop) + 1000, clamped=stop - start)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, ROWS), max_size=6), block=st.sampled_from([7, 100, 1 << 20]))
def test_pieces_of_any_size_give_the_bytes_that_the_record_describes(
    tmp_path: Path, rows: dict[str, np.ndarray], cuts: list[int], block: int
) -> None:
    path = tmp_path / "v002-00000.h5"
    path.unlink(missing_ok=True)
    before, shards._BLOCK_BYTES = shards._BLOCK_BYTES, block
    try:
        writer = ContainerWriter(path, SCHEMA, ROWS, '{"format":1}')
        edges = [0, *sorted(cuts), ROWS]
        for start, stop in pairwise(edges):
            append(writer, rows, start, stop)
        record = writer.record(view=2, start=1000, ids=None)
    finally:
        shards._BLOCK_BYTES = before
    assert writer.publish()
    data = path.read_bytes()
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert (record.size, record.clamped, record.rows, record.file) == (len(data), ROWS, ROWS, path.name)
    with h5py.File(path, "r") as file:
        for name, array in rows.items():
            np.testing.assert_array_equal(file[name][...], array)
        expected = row_crcs([rows[n] for n in SCHEMA.crc_names], view=2, positions=np.arange(ROWS) + 1000)
        np.testing.assert_array_equal(file["row_crc"][...], expected)
        assert set(file["view"][...].tolist()) == {2}


def test_hashes_of_files_are_those_of_their_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 100)
    data = (folder / "shards" / "v000-00000.h5").read_bytes()
    assert file_sha256(lambda o, n: data[o : o + n], len(data)) == hashlib.sha256(data).hexdigest()


def test_the_payload_hash_leaves_padding_out(one_file: Path) -> None:
    from kdcache.store.cache import open as open_cache

    catalog = open_cache(one_file).catalog
    data = one_file.read_bytes()
    arrays = sorted(catalog.parts[0].arrays.values(), key=lambda a: a.offset)
    expected = hashlib.sha256(b"".join(data[a.offset : a.stop] for a in arrays)).hexdigest()
    assert payload_sha256(lambda o, n: data[o : o + n], catalog.parts[0].arrays) == expected
    assert catalog.header is not None
    assert catalog.header.payload_sha256 == expected


def test_rows_can_be_copied_into_a_shorter_container(
    tmp_path: Path, rows: dict[str, np.ndarray], monkeypatch: Any
) -> None:
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 100)
    full = ContainerWriter(tmp_path / "full.h5", SCHEMA, 1000, "{}")
    append(full, rows, 0, ROWS)
    short = ContainerWriter(tmp_path / "short.h5", SCHEMA, ROWS, "{}")
    short.copy_from(full, view=2, start=1000)
    full.abandon()
    direct = ContainerWriter(tmp_path / "direct.h5", SCHEMA, ROWS, "{}")
    append(direct, rows, 0, ROWS)
    assert short.finish() == direct.finish()
    for writer in (short, direct):
        assert writer.publish()
    assert (tmp_path / "short.h5").read_bytes() == (tmp_path / "direct.h5").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["direct.h5", "short.h5"]


def test_an_abandoned_container_leaves_nothing_and_twice_is_fine(tmp_path: Path, rows: dict[str, np.ndarray]) -> None:
    writer = ContainerWriter(tmp_path / "x.h5", SCHEMA, ROWS, "{}")
    append(writer, rows, 0, 5)
    assert len(os.listdir(tmp_path)) == 1
    writer.abandon()
    writer.abandon()
    assert os.listdir(tmp_path) == []


def test_a_container_that_is_not_full_is_never_finished(tmp_path: Path, rows: dict[str, np.ndarray]) -> None:
    writer = ContainerWriter(tmp_path / "x.h5", SCHEMA, ROWS, "{}")
    append(writer, rows, 0, 5)
    with pytest.raises(AssertionError, match="5 of 30 rows"):
        writer.finish()
    writer.abandon()


def test_only_temporary_files_of_that_name_are_removed(tmp_path: Path) -> None:
    names = [".tmp-a.h5-1-0123abcd", ".tmp-a.h5.bak-1-0123abcd", ".tmp-b.h5-1-0123abcd", "a.h5", "tmp-a.h5"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    remove_temporaries(tmp_path, "a.h5")
    assert sorted(os.listdir(tmp_path)) == sorted(names[1:])
    remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "tmp-a.h5"]
    remove_temporaries(tmp_path / "nothing")


def test_what_this_process_gave_up_is_removed_as_of_the_dead_and_what_it_writes_is_not(
    tmp_path: Path, rows: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails for good takes no unlink either; the process may be a notebook that tries again."""

    def refuse(path: Path) -> None:
        raise OSError(5, "Input/output error")

    given_up, in_hand = (ContainerWriter(tmp_path / "x.h5", SCHEMA, ROWS, "{}") for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        given_up.abandon()
    assert len(os.listdir(tmp_path)) == 2
    remove_temporaries(tmp_path, "x.h5", of_the_dead=True)
    assert len(os.listdir(tmp_path)) == 1
    append(in_hand, rows, 0, ROWS)
    in_hand.finish()
    assert in_hand.publish()
