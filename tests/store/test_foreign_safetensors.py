"""safetensors that somebody else wrote: those of the package of that name are read, damaged ones refused.

The reader runs in the process of the test here; tests/store/test_foreign_process.py runs it where it belongs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import opened, read
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from kdcache.errors import CorruptCacheError, DataError

LOGITS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "theirs.safetensors"


def write(path: Path, header: dict[str, Any] | bytes, data: bytes, *, length: int | None = None) -> None:
    """A file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(shape: list[Any], start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"])
def test_what_the_package_writes_is_read(path: Path, dtype: str) -> None:
    values = (10 * LOGITS).astype(dtype)
    save_file({"logits": values, "other": np.arange(7)}, path, metadata={"made": "by us"})
    found = read(path, "safetensors", "logits")
    np.testing.assert_array_equal(found, values)
    assert found.dtype == values.dtype


def test_bfloat16_comes_as_float32(path: Path) -> None:
    tensor = torch.from_numpy(LOGITS).bfloat16()
    save_tensors({"logits": tensor}, path)
    np.testing.assert_array_equal(read(path, "safetensors", "logits"), tensor.float().numpy())


def test_floats_of_eight_bits_are_refused_by_name(path: Path) -> None:
    save_tensors({"logits": torch.from_numpy(LOGITS).to(torch.float8_e4m3fn)}, path)
    with opened(path, "safetensors") as source:
        assert source.listing(9) == [{"name": "logits", "shape": [50, 6], "dtype": "F8_E4M3"}]
        with pytest.raises(DataError, match="holds F8_E4M3; expected one of"):
            source.column("logits")
        assert source.column("other") is None


DAMAGED = {
    "a header beyond the file": ({}, b"", {"length": 1000}, "the header claims 1000 bytes in a file of 10"),
    "a header beyond all limits": ({}, b"", {"length": 2**63}, "the header claims"),
    "a file of three bytes": (None, b"", {}, "the file ends at byte 3"),
    "something that is not JSON": (b"{no", b"", {}, "not readable as JSON"),
    "a name twice": (b'{"a": {}, "a": {}}', b"", {}, "a key stands twice"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"", {}, "expected dtype, shape and data_offsets"),
    "negative sizes": ({"a": entry([-1], 0, 4)}, bytes(4), {}, "of another kind"),
    "floats as sizes": ({"a": entry([1.0], 0, 4)}, bytes(4), {}, "of another kind"),
    "offsets the wrong way round": ({"a": entry([1], 4, 0)}, bytes(4), {}, "of another kind"),
    "a hole": ({"a": entry([1], 4, 8)}, bytes(8), {}, "array a starts at byte"),
    "an overlap": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8), {}, "array b starts at byte"),
    "bytes left over": ({"a": entry([1], 0, 4)}, bytes(5), {}, "the arrays end at byte"),
    "too few bytes": ({"a": entry([2], 0, 8)}, bytes(4), {}, "the arrays end at byte"),
    "a shape that does not fit": ({"a": entry([3], 0, 8)}, bytes(8), {}, "does not fit its bytes"),
    "a shape of nothing": ({"a": entry([2**62, 0], 0, 8)}, bytes(8), {}, "does not fit its bytes"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_is_refused_that_has(path: Path, what: str) -> None:
    header, data, settings, message = DAMAGED[what]
    if header is None:
        path.write_bytes(b"abc")
    else:
        write(path, header, data, **settings)
    with pytest.raises((DataError, CorruptCacheError), match=message):
        read(path, "safetensors", "a")
