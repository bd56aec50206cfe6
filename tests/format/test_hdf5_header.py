"""The header: any HDF5 tool reads a file made from it, bytes depend on the arguments alone, promises hold."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import KDCacheError, UsageError
from kdcache.format import hdf5_header
from kdcache.format.arrays import ArraySpec
from kdcache.format.hdf5_header import FileLayout, build_layout
from kdcache.format.hdf5_messages import chunk_rows
from kdcache.format.hdf5_parser import parse

ROOT = Path(__file__).parents[2]
SPECS = [
    ArraySpec("logits", "<f2", (10,)),
    ArraySpec("row_max", "<f4"),
    ArraySpec("label", "<i8"),
    ArraySpec("sample_id", "|S7"),
    ArraySpec("view", "<u2"),
    ArraySpec("row_crc", "<u4"),
    ArraySpec("input_digest", "<u8"),
    ArraySpec("flag", "|u1"),
    ArraySpec("topk_classes", "<u2", (3,)),
    ArraySpec("tail_logsumexp", "<f4", (2,)),
]
ATTRIBUTE = '{"format": 1}'


def payload(layout: FileLayout) -> dict[str, np.ndarray]:
    """Random rows for each array; strings without the trailing NULs that NumPy strips."""
    random = np.random.default_rng(0)
    arrays = {}
    for name, array in layout.arrays.items():
        data = random.integers(1, 127, array.nbytes, np.uint8).view(array.dtype)
        arrays[name] = data.reshape(array.shape)
    return arrays


def file_image(layout: FileLayout, arrays: dict[str, np.ndarray]) -> bytes:
    """The whole file: header pieces and rows at their offsets, zeros elsewhere."""
    image = bytearray(layout.size)
    for offset, piece in layout.metadata:
        image[offset : offset + len(piece)] = piece
    for name, data in arrays.items():
        array = layout.arrays[name]
        image[array.offset : array.stop] = data.tobytes()
    return bytes(image)


def assert_promises(layout: FileLayout, specs: list[ArraySpec], rows: int) -> None:
    assert [array.spec for array in layout.arrays.values()] == specs
    assert list(layout.arrays) == [spec.name for spec in specs]
    end = 0
    spans = [(offset, offset + len(piece)) for offset, piece in layout.metadata]
    for array in layout.arrays.values():
        assert array.rows == rows
        assert array.offset >= end
        end = array.stop
        padded = -(-rows // chunk_rows(array.spec.row_bytes, rows)) * chunk_rows(array.spec.row_bytes, rows)
        stored = padded * array.spec.row_bytes
        assert array.offset % (65_536 if stored >= 1 << 20 else 4096 if stored >= 1 << 14 else 8) == 0
        spans.append((array.offset, array.offset + stored))
    spans.sort()
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert spans[0][0] == 0
    assert spans[-1][1] <= layout.size


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 512, 1797])
def test_plain_h5py_reads_what_was_spliced_in(tmp_path: Path, rows: int) -> None:
    layout = build_layout(SPECS, rows, ATTRIBUTE)
    assert_promises(layout, SPECS, rows)
    arrays = payload(layout)
    path = tmp_path / "cache.h5"
    path.write_bytes(file_image(layout, arrays))
    with h5py.File(path, "r") as file:
        assert set(file) == set(arrays)
        assert file.attrs["kdcache"].decode() == ATTRIBUTE
        assert list(file.attrs) == ["kdcache"]
        for name, data in arrays.items():
            np.testing.assert_array_equal(file[name][()], data)
            assert file[name].dtype.str == layout.arrays[name].dtype


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="needs h5dump (Debian package hdf5-tools)")
def test_h5dump_reads_the_file(tmp_path: Path) -> None:
    layout = build_layout(SPECS, 300, ATTRIBUTE)
    path = tmp_path / "cache.h5"
    path.write_bytes(file_image(layout, payload(layout)))
    header = subprocess.run(["h5dump", "-H", "-p", path], capture_output=True, text=True, check=True).stdout
    assert 'DATASET "logits"' in header
    assert "FILL_TIME_NEVER" in header
    subprocess.run(["h5dump", path], capture_output=True, check=True)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[ArraySpec], int, str]:
    dtype = st.sampled_from(["<f2", "<f4", "<i8", "<u8", "<u2", "<u4", "|u1", "|S1", "|S13", "|S300"])
    row_shape = st.lists(st.integers(1, 9), max_size=3).map(tuple)
    names = draw(st.lists(st.from_regex(r"\A[a-z0-9_]{1,64}\Z"), min_size=1, max_size=12, unique=True))
    specs = [ArraySpec(name, draw(dtype), draw(row_shape)) for name in names]
    return specs, draw(st.integers(1, 700)), draw(st.text(st.characters(exclude_characters="\0"), min_size=1))


@given(layouts())
@settings(max_examples=60)
def test_any_layout_keeps_the_promises_and_reads_back(case: tuple[list[ArraySpec], int, str]) -> None:
    specs, rows, attribute = case
    try:
        attribute.encode()
    except UnicodeEncodeError:
        attribute = "surrogates are refused elsewhere"
    layout = build_layout(specs, rows, attribute)
    assert_promises(layout, specs, rows)
    arrays = payload(layout)
    image = file_image(layout, arrays)
    parsed = parse(lambda offset, length: image[offset : offset + length], len(image), name="image")
    assert parsed.arrays == layout.arrays
    assert (parsed.attribute, parsed.rows) == (attribute, rows)
    with h5py.File(io.BytesIO(image), "r") as file:
        assert file.attrs["kdcache"] == attribute.encode()
        for name, data in arrays.items():
            np.testing.assert_array_equal(file[name][()], data)


def test_dense_prediction_rows_get_smaller_chunks() -> None:
    assert chunk_rows(2000, 10_000) == 256
    assert chunk_rows(21 * 65 * 65 * 2, 10_000) == 4
    assert chunk_rows(150 * 512 * 512 * 2, 10_000) == 1
    assert chunk_rows(4096, 10_000) == 256
    assert chunk_rows(4097, 10_000) == 128
    assert chunk_rows(2, 7) == 7
    specs = [ArraySpec("logits", "<f2", (21, 65, 65)), ArraySpec("row_max", "<f4", (65, 65))]
    layout = build_layout(specs, 11, ATTRIBUTE)
    assert_promises(layout, specs, 11)
    with h5py.File(io.BytesIO(file_image(layout, {})), "r") as file:
        assert file["logits"].chunks == (4, 21, 65, 65)


def test_equal_arguments_give_equal_bytes() -> None:
    assert build_layout(SPECS, 1000, ATTRIBUTE) == build_layout(SPECS, 1000, ATTRIBUTE)


def test_an_attribute_of_equal_length_changes_no_offset() -> None:
    one, other = (build_layout(SPECS, 1000, letter * 5000) for letter in "xy")
    assert one.arrays == other.arrays
    assert one.size == other.size
    assert [(offset, len(piece)) for offset, piece in one.metadata] == [
        (offset, len(piece)) for offset, piece in other.metadata
    ]
    assert one.metadata[1:] == other.metadata[1:]


def test_all_root_metadata_is_one_piece_at_the_start() -> None:
    layout = build_layout([ArraySpec(f"{'a' * 62}{i:02}", "<f4") for i in range(32)], 5, "x" * 59_999)
    assert len(layout.arrays) == 32
    assert layout.metadata[0][0] == 0
    assert layout.metadata[0][1].count(b"kdcache\0") == 1
    assert not any(b"OCHK" in piece for _, piece in layout.metadata)


def test_a_container_of_200_gb_needs_no_memory() -> None:
    specs = [ArraySpec("logits", "<f2", (1000,)), ArraySpec("label", "<i8")]
    tracemalloc.start()
    try:
        layout = build_layout(specs, 100_000_000, ATTRIBUTE)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert layout.size > 200 * 10**9
    assert peak_bytes < 1 << 20
    assert sum(len(piece) for _, piece in layout.metadata) < 4096
    assert_promises(layout, specs, 100_000_000)


@pytest.mark.parametrize(
    ("specs", "rows", "attribute", "reason"),
    [
        (SPECS, 0, ATTRIBUTE, "at least 1"),
        (SPECS, -1, ATTRIBUTE, "at least 1"),
        ([], 5, ATTRIBUTE, "0 arrays"),
        ([ArraySpec(f"a{i}", "<f4") for i in range(33)], 5, ATTRIBUTE, "33 arrays"),
        ([ArraySpec("a", "<f4")] * 2, 5, ATTRIBUTE, "must differ"),
        ([ArraySpec("a/b", "<f4")], 5, ATTRIBUTE, "'a/b'"),
        ([ArraySpec("", "<f4")], 5, ATTRIBUTE, "cannot be stored"),
        ([ArraySpec("a\n", "<f4")], 5, ATTRIBUTE, "cannot be stored"),
        ([ArraySpec("a" * 65, "<f4")], 5, ATTRIBUTE, "cannot be stored"),
        ([ArraySpec("a", ">f4")], 5, ATTRIBUTE, "'>f4'"),
        ([ArraySpec("a", "<f8")], 5, ATTRIBUTE, "expected one of"),
        ([ArraySpec("a", "float16")], 5, ATTRIBUTE, "'float16'"),
        ([ArraySpec("a", "|S0")], 5, ATTRIBUTE, "expected one of"),
        ([ArraySpec("a", "<f4", (0,))], 5, ATTRIBUTE, "none of them empty"),
        ([ArraySpec("a", "<f4", (1,) * 8)], 5, ATTRIBUTE, "at most 7"),
        ([ArraySpec("a", "<f4", (1 << 30,))], 5, ATTRIBUTE, "less than 4 GiB"),
        ([ArraySpec("a", "<f4", (1 << 20,))], 1 << 60, ATTRIBUTE, "more shards"),
        (SPECS, 5, "", "0 bytes"),
        (SPECS, 5, "x" * 60_000, "60000 bytes"),
        (SPECS, 5, "ä" * 30_000, "60000 bytes"),
        (SPECS, 5, "a\0b", "NUL"),
        (SPECS, 5, "\ud800", "Unicode"),
    ],
)
def test_what_cannot_be_stored_is_refused(specs: list[ArraySpec], rows: int, attribute: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        build_layout(specs, rows, attribute)


def test_a_libhdf5_that_lays_files_out_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_header, "_LIBVER", ("latest", "latest"))
    monkeypatch.setattr(hdf5_header.h5d, "ALLOC_TIME_EARLY", h5py.h5d.ALLOC_TIME_LATE)
    with pytest.raises(KDCacheError, match=r"h5py .* wrote a header that kdcache does not accept") as caught:
        build_layout(SPECS, 1000, ATTRIBUTE)
    assert caught.value.exit_code == 1


def test_the_global_track_order_of_h5py_does_not_matter() -> None:
    expected = build_layout(SPECS, 1000, ATTRIBUTE)
    config = h5py.get_config()
    before = config.track_order
    config.track_order = True
    try:
        assert build_layout(SPECS, 1000, ATTRIBUTE) == expected
    finally:
        config.track_order = before


PRINT_DIGESTS = """
import hashlib, json, sys
from kdcache.format.arrays import ArraySpec
from kdcache.format.hdf5_header import build_layout
digests = []
for specs, rows, attribute in json.load(sys.stdin):
    layout = build_layout([ArraySpec(name, dtype, tuple(shape)) for name, dtype, shape in specs], rows, attribute)
    digests.append(hashlib.sha256(repr(layout).encode()).hexdigest())
print(json.dumps(digests))
"""


@pytest.mark.long
@pytest.mark.parametrize("requirements", [("h5py==3.11.0", "numpy<2.3"), ("h5py==3.8.0", "numpy<2")])
def test_an_older_h5py_writes_the_same_header_bytes(tmp_path: Path, requirements: tuple[str, ...]) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = subprocess.run([python, "-m", "pip", "install", "-q", *requirements], capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"pip cannot install {requirements}: {install.stderr[-200:]}")
    cases: list[Any] = [
        [[(spec.name, spec.dtype, spec.row_shape) for spec in SPECS], rows, "x" * length]
        for rows in (1, 7, 256, 257, 100_000, 10_000_000)
        for length in (1, 100, 4000, 59_999)
    ]
    result = subprocess.run(
        [python, "-c", PRINT_DIGESTS],
        input=json.dumps(cases),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [
        hashlib.sha256(repr(build_layout([ArraySpec(n, d, tuple(s)) for n, d, s in specs], *rest)).encode()).hexdigest()
        for specs, *rest in cases
    ]
    assert json.loads(result.stdout) == expected


def test_rows_are_addressed_by_offset_alone() -> None:
    layout = build_layout([ArraySpec("logits", "<f4", (5, 2))], 600, ATTRIBUTE)
    array = layout.arrays["logits"]
    data = np.arange(math.prod(array.shape), dtype="<f4").reshape(array.shape)
    image = file_image(layout, {"logits": data})
    row_bytes = array.spec.row_bytes
    for row in (0, 255, 256, 599):
        piece = image[array.offset + row * row_bytes : array.offset + (row + 1) * row_bytes]
        np.testing.assert_array_equal(np.frombuffer(piece, "<f4").reshape(5, 2), data[row])
