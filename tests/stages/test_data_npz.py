"""`npz:` takes what numpy.savez writes and refuses the rest before it allocates."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.stages.data import LoadedData, load_data
from kdcache.stages.data_npz import read_npz

X = np.arange(5 * 3 * 2, dtype=np.uint8).reshape(5, 3, 2)


def save(folder: Path, *, compressed: bool = False, **arrays: Any) -> Path:
    path = folder / "set.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def load(folder: Path, **arrays: Any) -> LoadedData:
    return load_data(f"npz:{save(folder, **arrays)}")


@pytest.mark.parametrize(
    ("stored", "expected", "dtype"),
    [
        (X, X.astype(np.float32) / np.float32(255), torch.float32),
        (X.astype(np.float64) + 0.1, (X + np.float64(0.1)).astype(np.float32), torch.float32),
        (X.astype(">i4"), X.astype(np.int64), torch.int64),
        (np.asfortranarray(X.astype(np.float16)), X.astype(np.float32), torch.float32),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_inputs_become_float32_or_int64(
    tmp_path: Path, stored: np.ndarray, expected: np.ndarray, dtype: torch.dtype, compressed: bool
) -> None:
    data = load(tmp_path, x=stored, y=np.arange(5), compressed=compressed)
    for index in range(5):
        x, label = data.dataset[index]
        assert x.dtype == dtype
        assert np.array_equal(x.numpy(), expected[index])
        assert label == index


def test_a_batch_equals_its_items(tmp_path: Path) -> None:
    data = load(tmp_path, x=X, y=np.arange(5, dtype=np.uint8))
    x, y = next(iter(DataLoader(data.dataset, batch_size=4, sampler=[4, 0, 2, 2])))
    assert torch.equal(x, torch.stack([data.dataset[index][0] for index in (4, 0, 2, 2)]))
    assert y.tolist() == [4, 0, 2, 2]


def test_ids_classes_and_name_come_from_the_file(tmp_path: Path) -> None:
    data = load(tmp_path, x=X, y=[0, 1, 0, 1, -1], sample_id=list("abcde"), classes=["cat", "dög"])
    assert data.sample_ids is not None
    assert data.sample_ids.tolist() == [b"a", b"b", b"c", b"d", b"e"]
    assert (data.classes, data.num_classes, data.name) == (("cat", "dög"), 2, "set.npz")
    assert data.dataset[4][1] == -1


def test_without_labels_every_label_is_minus_one(tmp_path: Path) -> None:
    data = load(tmp_path, x=X)
    assert [data.dataset[index][1] for index in range(5)] == [-1] * 5
    assert data.num_classes is None


def test_dense_labels_are_tensors(tmp_path: Path) -> None:
    data = load(tmp_path, x=X, y=np.arange(10).reshape(5, 2))
    assert data.dataset[3][1].tolist() == [6, 7]


def test_provenance_holds_no_folder_and_changes_with_the_bytes(tmp_path: Path) -> None:
    first = load(tmp_path, x=X).provenance
    assert str(tmp_path) not in str(first)
    assert load(tmp_path, x=X).provenance == first
    assert load(tmp_path, x=X + np.uint8(1)).provenance["fingerprint"] != first["fingerprint"]


def test_another_file_name_keeps_the_fingerprint(tmp_path: Path) -> None:
    path = save(tmp_path, x=X)
    first = load_data(f"npz:{path}").provenance
    second = load_data(f"npz:{path.rename(tmp_path / 'other.npz')}").provenance
    assert first["fingerprint"] == second["fingerprint"]
    assert first["name"] != second["name"]


def test_a_large_uncompressed_array_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, x=np.ones((4, 1 << 20), np.float32))
    tracemalloc.start()
    inputs = read_npz(path, ("x",), name="set")["x"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(inputs, np.memmap)
    assert peak < 1 << 20
    assert np.array_equal(inputs[2], np.ones(1 << 20, np.float32))


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"y": [1]}, "no array x"),
        ({"x": np.arange(5)}, r"shape \(5,\)"),
        ({"x": X[:0]}, "no samples"),
        ({"x": X > 3}, "inputs of bool"),
        ({"x": np.array([["a"], ["b"]])}, "inputs of"),
        ({"x": X, "y": [0, 1, 2]}, "5 samples, but labels of shape"),
        ({"x": X, "y": np.zeros(5)}, "labels must be integers, found float64"),
        ({"x": X, "y": [0, 0, -2, 0, 0]}, "sample 2 has the label -2"),
        ({"x": X, "y": np.full(5, 2**63, np.uint64)}, "sample 0 has the label"),
        ({"x": X, "y": [0, 0, 0, 2, 0], "classes": ["a", "b"]}, "sample 3 has the label 2; .* below 2"),
        ({"x": X, "y": [0, 0, 0, 9, 0], "sample_id": list("abcde"), "classes": ["a"]}, "sample 'd' has the label 9"),
        ({"x": X, "sample_id": [1, 2, 3, 2, 5]}, "sample id 2 occurs 2 times"),
        ({"x": X, "sample_id": [1, 2]}, "sample_id the shape"),
        ({"x": X, "sample_id": np.zeros(5)}, r"set\.npz: sample ids must all be integers"),
        ({"x": X, "classes": ["a", "a"]}, "two classes have one name"),
        ({"x": X, "classes": [1, 2]}, "expected .C,. text"),
    ],
)
def test_arrays_that_do_not_fit_are_data_errors(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load(tmp_path, **arrays)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        load_data(f"npz:{tmp_path / 'nothing.npz'}")


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    x = np.empty((2, 1), object)
    with pytest.raises(DataError, match="never objects"):
        load(tmp_path, x=x)


def npy(header: str, payload: bytes) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload


def zip_with(path: Path, content: bytes, method: int = zipfile.ZIP_STORED, times: int = 1) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", content)
        for _ in range(times - 1):
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("x.npy", content)
    return path


@pytest.mark.parametrize("shape", ["(1000000000000, 1000)", "(3, 4)", "(-3, -4)", "(2,)", "'x'", "(1.5,)"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_does_not_fit_the_bytes_is_refused_before_allocating(
    tmp_path: Path, shape: str, method: int
) -> None:
    content = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}", bytes(6))
    with pytest.raises(DataError):
        load_data(f"npz:{zip_with(tmp_path / 'set.npz', content, method)}")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_numpy_does_not_write_are_refused(tmp_path: Path, method: int) -> None:
    with pytest.raises(DataError, match="zip method"):
        load_data(f"npz:{zip_with(tmp_path / 'set.npz', bytes(100), method)}")


def test_a_zip_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one name"):
        load_data(f"npz:{zip_with(tmp_path / 'set.npz', b'', times=2)}")


def sound_archive(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, x=X, y=np.arange(5), sample_id=list("abcde"))
    return buffer.getvalue()


SOUND = [sound_archive(compressed) for compressed in (False, True)]


@given(st.sampled_from(SOUND), st.integers(0, 2000), st.integers(1, 255), st.booleans())
def test_damaged_archives_are_read_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, sound: bytes, place: int, flip: int, cut: bool
) -> None:
    place %= len(sound)
    damaged = sound[:place] if cut else sound[:place] + bytes([sound[place] ^ flip]) + sound[place + 1 :]
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(damaged)
    try:
        arrays = read_npz(path, ("x", "y", "sample_id"), name="damaged")
    except KDCacheError:
        return
    # The zip's CRC covers the bytes; a flip in a name or in a date changes nothing that is read.
    for name, array in arrays.items():
        assert np.array_equal(array, {"x": X, "y": np.arange(5), "sample_id": np.array(list("abcde"))}[name])
