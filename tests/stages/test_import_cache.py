"""`kdcache.import_cache`: the cache that the writer makes of the same arrays, or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import kdcache
from kdcache.errors import DataError, InterruptedRunError, LogitsError, StorageError, UsageError
from kdcache.stages import import_cache as stage
from kdcache.stages.progress import Progress
from kdcache.store import posix
from kdcache.store.dump import DumpFolder

ROWS, CLASSES = 300, 7
RNG = np.random.default_rng(0)
LOGITS = (RNG.integers(-600, 600, (ROWS, CLASSES)) / 64).astype(np.float32)
LABELS = RNG.integers(-1, CLASSES, ROWS)
NAMES = [f"img/ä{number}.png" for number in range(ROWS)]


@pytest.fixture(autouse=True)
def fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal dates, and no waiting for the disk."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(posix, "fsync", lambda fd: None)
    monkeypatch.setattr(posix, "fsync_folder", lambda folder: None)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "theirs.npz", scores=LOGITS, y=LABELS, names=np.array(NAMES))
    return tmp_path / "theirs.npz"


def left_at(folder: Path) -> list[str]:
    """What is in a folder beside the foreign files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".npz")


def add(path: Path, **arrays: Any) -> Path:
    """An .npz file with these arrays in place of those of `npz`."""
    np.savez(path, **{"scores": LOGITS, "y": LABELS, **arrays})
    return path


@pytest.mark.parametrize(("out", "dtype"), [("teacher", "float16"), ("teacher.h5", "float32")])
def test_the_cache_is_the_one_that_the_writer_makes_of_the_same_arrays(
    npz: Path, tmp_path: Path, out: str, dtype: str
) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "shard_rows": 128}
    arrays = {"logits": "scores", "labels": "y", "ids": "names"}
    result = kdcache.import_cache(npz, out=tmp_path / out, **arrays, **settings, quiet=True)
    with kdcache.open(tmp_path / out) as cache:
        provenance = cache.provenance
    with kdcache.Writer(
        tmp_path / "own" / out, classes=CLASSES, id_bytes=len(NAMES[-1].encode()), provenance=provenance, **settings
    ) as writer:
        writer.write(NAMES, LOGITS, LABELS)
    with kdcache.open(tmp_path / "own" / out) as own:
        assert own.root == result.root
    assert kdcache.verify(tmp_path / out).ok


def theirs_hdf5(path: Path) -> dict[str, str]:
    """As Keras, PyTables and h5py users write: groups, big-endian doubles, gzip and shuffle, text of any length."""
    with h5py.File(path, "w") as file:
        kind = {"chunks": True, "compression": "gzip", "shuffle": True}
        file.create_dataset("predictions/dense_2/logits:0", data=LOGITS, dtype=">f8", **kind)
        file.create_dataset("predictions/labels", data=LABELS, dtype=">i2", maxshape=(None,))
        file["names"] = NAMES
        file.attrs["backend"] = "tensorflow"
    return {"logits": "predictions/dense_2/logits:0", "labels": "predictions/labels", "ids": "names"}


def theirs_npz(path: Path) -> dict[str, str]:
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.asfortranarray(LOGITS), b=LABELS.astype(np.int8), c=np.array(NAMES))
    return {"logits": "a", "labels": "b", "ids": "c"}


def theirs_npy(path: Path) -> dict[str, str]:
    with path.open("wb") as file:
        np.save(file, LOGITS.astype(np.float16))
    return {}


def theirs_safetensors(path: Path) -> dict[str, str]:
    from safetensors.numpy import save_file

    save_file({"head.logits": LOGITS, "labels": LABELS, "numbers": np.arange(ROWS)[::-1].copy()}, path)
    return {"logits": "head.logits", "labels": "labels", "ids": "numbers"}


@pytest.mark.parametrize("write", [theirs_hdf5, theirs_npz, theirs_npy, theirs_safetensors])
def test_each_row_of_each_format_is_found_by_its_id(tmp_path: Path, write) -> None:
    arrays = write(tmp_path / "theirs")  # whose name says nothing
    result = kdcache.import_cache(tmp_path / "theirs", out=tmp_path / "teacher.h5", **arrays, quiet=True)
    assert (result.rows, result.classes) == (ROWS, CLASSES)
    if "ids" not in arrays:
        ids: Any = np.arange(ROWS)
        assert result.notes == ("no --ids: the sample ids are the row numbers 0 to 299",)
    else:
        ids = np.arange(ROWS)[::-1] if arrays["ids"] == "numbers" else NAMES
        assert result.notes == ()
    with kdcache.open(tmp_path / "teacher.h5") as cache:
        found = cache.gather(cache.rows(ids))
        expected = LOGITS.astype(np.float16).astype(np.float32) if not arrays else LOGITS
        np.testing.assert_allclose(found.dense(), expected, atol=2**-7)
        if "labels" in arrays:
            np.testing.assert_array_equal(found.label, LABELS)
        else:
            assert not cache.has_labels


def test_a_student_learns_from_an_imported_cache(tmp_path: Path, npz: Path) -> None:
    import torch
    from torch.utils.data import TensorDataset

    kdcache.import_cache(npz, out=tmp_path / "teacher.h5", logits="scores", labels="y", quiet=True)
    data = TensorDataset(torch.rand(ROWS, 4), torch.from_numpy(LABELS))
    with kdcache.open(tmp_path / "teacher.h5") as cache:
        _, label, teacher = kdcache.join(data, cache)[5]
        loss = kdcache.DistillationLoss(alpha=1.0, temperature=2.0)
        assert label == LABELS[5]
        assert torch.isfinite(loss(torch.zeros(1, CLASSES), torch.from_numpy(teacher.dense().numpy()[None])))


def test_dense_prediction_keeps_its_dimensions(tmp_path: Path) -> None:
    logits = RNG.normal(size=(6, 3, 4, 5)).astype(np.float32)
    np.save(tmp_path / "a.npy", logits)
    kdcache.import_cache(tmp_path / "a.npy", out=tmp_path / "t.h5", dtype="float32", quiet=True)
    with kdcache.open(tmp_path / "t.h5") as cache:
        np.testing.assert_array_equal(cache.gather(np.arange(6)).dense(), logits)


def test_the_provenance_names_the_file_by_its_hash_and_never_by_its_folder(npz: Path, tmp_path: Path) -> None:
    result = kdcache.import_cache(
        npz, out=tmp_path / "t", logits="scores", teacher_saw="yes", licence="cc-by-4.0", quiet=True
    )
    with kdcache.open(tmp_path / "t") as cache:
        found = cache.provenance
    assert found["teacher"] == {"spec": "import:theirs.npz"}
    assert (found["teacher_seen"], found["licence"]) == ("yes", "cc-by-4.0")
    assert found["source"] == {
        "name": "theirs.npz",
        "format": "npz",
        "bytes": npz.stat().st_size,
        "sha256": result.sha256,
        "arrays": {"logits": {"name": "scores", "dtype": "<f4"}},
        "kind": "logits",
        "id_scheme": "row number",
    }
    assert str(tmp_path) not in json.dumps(found)


def test_class_names_come_from_a_json_list_of_the_right_length(npz: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps([f"class {number}" for number in range(CLASSES)]))
    kdcache.import_cache(npz, out=tmp_path / "t", logits="scores", class_names=tmp_path / "names.json", quiet=True)
    with kdcache.open(tmp_path / "t") as cache:
        assert cache.classes[6] == "class 6"
    (tmp_path / "names.json").write_text('["cat"]')
    with pytest.raises(UsageError, match="has 1 names, and scores has 7 classes"):
        kdcache.import_cache(npz, out=tmp_path / "u", logits="scores", class_names=tmp_path / "names.json", quiet=True)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"a": "b"}', "[" * 100_000])
def test_class_names_of_another_form_are_a_usage_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(UsageError, match="--class-names"):
        stage.read_class_names(tmp_path / "names.json")
    with pytest.raises(UsageError, match="--class-names"):
        stage.read_class_names(tmp_path / "nothing.json")


@pytest.mark.parametrize(("dtype", "clamped"), [("float16", 2), ("float32", 0)])
def test_values_out_of_range_are_counted_and_told(tmp_path: Path, dtype: str, clamped: int) -> None:
    path = add(tmp_path / "a.npz", scores=changed_at(LOGITS, (3, 70), -70_000.0))
    result = kdcache.import_cache(path, out=tmp_path / "t.h5", logits="scores", dtype=dtype, quiet=True)
    assert result.clamped == clamped
    told = [note for note in result.notes if "clamped" in note]
    assert [note.startswith("2 values are more than 65,504 below") for note in told] == [True] * (clamped > 0)


def changed_at(array: np.ndarray, rows: tuple[int, ...], value: float) -> np.ndarray:
    copy = array.copy()
    copy[list(rows), 0] = value
    return copy


@pytest.mark.parametrize("text", [False, True])
def test_ids_that_come_twice_are_named_by_array_and_rows(tmp_path: Path, text: bool) -> None:
    ids = np.arange(ROWS)
    ids[[290, 120, 200]] = 5, 7, 5
    path = add(tmp_path / "a.npz", numbers=ids.astype("S8") if text else ids)
    shown = "'7'" if text else "7"
    with pytest.raises(DataError, match=rf"a\.npz, array numbers: rows 7 and 120 have the same id, {shown}; .*--ids"):
        kdcache.import_cache(path, out=tmp_path / "t", logits="scores", ids="numbers", quiet=True)
    assert left_at(tmp_path) == []


# What is in the file must be what it is said to be.


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_probabilities_that_pose_as_logits_are_refused_until_the_caller_says_what_they_are(tmp_path: Path) -> None:
    path = add(tmp_path / "a.npz", scores=softmax(LOGITS))
    with pytest.raises(DataError, match=r"a\.npz, array scores: the rows look like probabilities.*--kind"):
        kdcache.import_cache(path, out=tmp_path / "t", logits="scores", quiet=True)
    assert left_at(tmp_path) == []
    kdcache.import_cache(path, out=tmp_path / "t", logits="scores", kind="probabilities", dtype="float32", quiet=True)
    with kdcache.open(tmp_path / "t") as cache:
        found = cache.gather(np.arange(ROWS)).dense()
        assert cache.provenance["source"]["kind"] == "probabilities"
    np.testing.assert_allclose(softmax(found / 4), softmax(LOGITS / 4), rtol=1e-5)
    kdcache.import_cache(path, out=tmp_path / "u", logits="scores", kind="logits", dtype="float32", quiet=True)
    with kdcache.open(tmp_path / "u") as cache:
        np.testing.assert_array_equal(cache.gather(np.arange(ROWS)).dense(), softmax(LOGITS))


def test_log_probabilities_are_stored_with_a_note(tmp_path: Path) -> None:
    path = add(tmp_path / "a.npz", scores=np.log(softmax(LOGITS)))
    result = kdcache.import_cache(path, out=tmp_path / "t", logits="scores", quiet=True)
    assert "the rows look like log-probabilities" in result.notes[1]


MANY = 70_000  # more than a block of rows, so that shards are on the disk before the bad row comes
BAD_ROW = 69_000


def changed(array: Any, value: Any) -> np.ndarray:
    copy = np.array(array)
    copy[BAD_ROW] = value
    return copy


BAD = {
    "NaN": ({"scores": [np.nan, 0]}, LogitsError, "array scores: row 69000 holds NaN"),
    "a label that is no class": ({"y": 2}, DataError, "sample 69000 has label 2, expected 0 to 1"),
    "an id of an earlier block": ({"ids": 3}, DataError, "array ids: rows 3 and 69000 have the same id, 3"),
    "an empty id": ({"names": ""}, DataError, "must not be empty"),
}


@pytest.mark.parametrize(("what", "out"), [*((what, "t") for what in BAD), ("NaN", "t.h5")])
def test_nothing_is_left_of_an_import_with_one_bad_row(tmp_path: Path, monkeypatch, what: str, out: str) -> None:
    bad, kind, message = BAD[what]
    numbers = np.arange(MANY)
    arrays: dict[str, Any] = {
        "scores": np.zeros((MANY, 2), np.float32),
        "y": numbers % 2,
        "ids": numbers.astype(np.uint64),
        "names": numbers.astype("S5"),
    }
    arrays |= {name: changed(arrays[name], value) for name, value in bad.items()}
    np.savez(tmp_path / "theirs.npz", **arrays)
    ids = "names" if "names" in bad else "ids"
    settings = {"out": tmp_path / out, "logits": "scores", "labels": "y", "ids": ids, "shard_rows": 30_000}
    committed, commit = [], DumpFolder.commit
    monkeypatch.setattr(DumpFolder, "commit", lambda *arguments: committed.append(commit(*arguments)))
    with pytest.raises(kind, match=message):
        kdcache.import_cache(tmp_path / "theirs.npz", **settings, quiet=True)
    assert len(committed) == 2
    assert left_at(tmp_path) == []


def test_the_cache_that_is_there_is_replaced_only_when_asked_for(npz: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "t", tmp_path / "t.h5"):
        kdcache.import_cache(npz, out=out, logits="scores", quiet=True)
        with pytest.raises(UsageError, match="pass --overwrite"):
            kdcache.import_cache(npz, out=out, logits="scores", quiet=True)
        assert kdcache.verify(out).ok
        kdcache.import_cache(npz, out=out, logits="scores", labels="y", overwrite=True, quiet=True)
        with kdcache.open(out) as cache:
            assert cache.has_labels


def test_the_file_itself_and_what_is_no_cache_are_never_replaced(npz: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the file to be imported"):
        kdcache.import_cache(npz, out=npz, logits="scores", overwrite=True, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        kdcache.import_cache(npz, out=tmp_path / "mine", logits="scores", overwrite=True, quiet=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_a_file_that_claims_more_than_the_disk_holds_is_refused_before_anything_is_written(
    npz: Path, tmp_path: Path, monkeypatch
) -> None:
    usage = stage.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"300 rows of 32 bytes need about .* has 0\.0 MB free"):
        kdcache.import_cache(npz, out=tmp_path / "t", logits="scores", quiet=True)
    assert left_at(tmp_path) == []


def test_more_ids_than_memory_are_refused_before_anything_is_written(npz: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stage, "_ID_MEMORY_BYTES", 1 << 60)
    with pytest.raises(DataError, match="the ids of 300 rows do not fit"):
        kdcache.import_cache(npz, out=tmp_path / "t", logits="scores", quiet=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_import_and_leaves_nothing(tmp_path: Path, monkeypatch, number: int) -> None:
    """Sent to this process when the first of two blocks is written and half of its shards are on the disk."""
    path = add(tmp_path / "theirs.npz", scores=np.zeros((MANY, 2), np.float32))
    seen = []

    def advance(self: Progress, count: int) -> None:
        if self._what == "import":
            seen.append((count, len(list((tmp_path / "t" / "shards").glob("*.h5")))))
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Progress, "advance", advance)
    with pytest.raises(InterruptedRunError, match=rf"stopped by {signal.Signals(number).name}; nothing was kept"):
        kdcache.import_cache(path, out=tmp_path / "t", logits="scores", shard_rows=30_000, quiet=True)
    assert seen == [(65_536, 2)]
    assert left_at(tmp_path) == []


def test_a_file_that_changes_while_it_is_read_leaves_nothing(npz: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Progress, "advance", lambda self, count: self._what == "import" and os.utime(npz, (1, 1)))
    with pytest.raises(DataError, match=r"theirs\.npz was changed while it was read"):
        kdcache.import_cache(npz, out=tmp_path / "t", logits="scores", quiet=True)
    assert left_at(tmp_path) == []


@pytest.mark.parametrize("out", ["t", "t.h5"])
def test_nothing_is_left_of_an_import_that_the_disk_refused(npz: Path, tmp_path: Path, monkeypatch, out: str) -> None:
    """The manifest, which comes last, or for one file the merged file."""
    write, publish = posix.write_file, posix.publish

    def full(path: Path) -> None:
        if path.name in ("manifest.json", "t.h5") and (out == "t") == (path.name == "manifest.json"):
            raise StorageError(f"could not write {path}: No space left on device")

    monkeypatch.setattr(posix, "write_file", lambda path, *rest, **how: full(path) or write(path, *rest, **how))
    monkeypatch.setattr(posix, "publish", lambda temporary, final: full(final) or publish(temporary, final))
    with pytest.raises(StorageError, match="No space left on device"):
        kdcache.import_cache(npz, out=tmp_path / out, logits="scores", shard_rows=100, quiet=True)
    assert left_at(tmp_path) == []


def test_settings_that_cannot_be_meant_are_usage_errors(npz: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"logit": "scores"}, "no setting 'logit'"),
        ({"logits": "scores"}, "--out is needed"),
        ({"logits": "scores", "kind": "odds"}, "--kind 'odds' is not known"),
        ({"logits": "scores", "memory_limit": 0}, "--memory-limit must be at least 1"),
        ({"logits": "scores", "out": tmp_path / "t", "dtype": "float8"}, "--dtype 'float8' is not known"),
        ({"out": tmp_path / "t"}, r"(?s)--logits is needed.*theirs.npz holds\n  scores +\(300, 7\) +float32"),
    ):
        with pytest.raises(UsageError, match=message):
            kdcache.import_cache(npz, quiet=True, **settings)


def test_an_import_loads_no_torch(npz: Path, tmp_path: Path) -> None:
    script = (
        "import sys, kdcache\n"
        "kdcache.import_cache(sys.argv[1], out=sys.argv[2], logits='scores', quiet=True)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, npz, tmp_path / "t"], check=True)
    assert (tmp_path / "t" / "manifest.json").exists()
