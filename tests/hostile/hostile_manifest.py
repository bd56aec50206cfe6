"""Manifests whose text is canonical and whose hashes are right, and whose shards are called or numbered wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hostile_base import changed, put_folder, put_manifest, sealed, sound_manifest
from hostile_cases import hostile


def _with_name(folder: Path, name: Any) -> Path:
    return put_manifest(folder, "shards", 1, "file", value=name)


# --------------------------------------------------------------------------- names of files


@hostile(r"manifest.json, shard 1: '../x.h5' is not a shard's file name")
def shard_in_the_folder_above(folder: Path) -> Path:
    """A shard called ../x.h5: a reader that joins paths opens a file beside the cache."""
    return _with_name(folder, "../x.h5")


@hostile(r"'/etc/passwd' is not a shard's file name")
def shard_at_an_absolute_path(folder: Path) -> Path:
    """A shard called /etc/passwd: joining a folder and an absolute path gives the absolute path."""
    return _with_name(folder, "/etc/passwd")


@hostile(r"'v000-00001.h5/../../../x' is not a shard's file name")
def shard_that_begins_well(folder: Path) -> Path:
    """A name that begins as it must and then climbs out: prefixes prove nothing."""
    return _with_name(folder, "v000-00001.h5/../../../x")


@hostile(r"'v000-00001.h5.x00.png' is not a shard's file name")
def shard_with_nul(folder: Path) -> Path:
    """A NUL in a name: for the kernel the name ends there, for Python it is a ValueError."""
    return _with_name(folder, "v000-00001.h5\0.png")


@hostile(r"'v000-00001.h5.n' is not a shard's file name")
def shard_with_a_newline(folder: Path) -> Path:
    """A newline at the end, which `$` in a regular expression lets pass: another file, and two lines in every log."""
    return _with_name(folder, "v000-00001.h5\n")


@hostile(r"'v٠٠٠-٠٠٠٠١.h5' is not a shard's file name")
def shard_with_other_digits(folder: Path) -> Path:
    r"""Arabic digits, which `\d` lets pass: a name that looks right where such digits are shown as ours."""
    return _with_name(folder, "v٠٠٠-٠٠٠٠١.h5")


@hostile(r"'v000-00001.u200b.h5' is not a shard's file name")
def shard_with_an_invisible_letter(folder: Path) -> Path:
    """A zero-width space: two files whose names look the same."""
    return _with_name(folder, "v000-00001\u200b.h5")


@hostile(r"'aaaaaaaa[a]+ is not a shard's file name")
def shard_with_a_name_of_a_megabyte(folder: Path) -> Path:
    """A name of a megabyte, which comes back in every error message."""
    return _with_name(folder, "a" * 1_000_000)


@hostile(r"'https://evil.example/x.h5' is not a shard's file name")
def shard_in_the_network(folder: Path) -> Path:
    """An address in the place of a name: a reader that knows fsspec fetches it, and tells who reads."""
    return _with_name(folder, "https://evil.example/x.h5")


@hostile(r"'\.\.\\\\x\.h5' is not a shard's file name")
def shard_with_a_backslash(folder: Path) -> Path:
    r"""..\x.h5: one name on Linux, a path on Windows, where somebody unpacks the same archive."""
    return _with_name(folder, "..\\x.h5")


@hostile(r"\['v000-00001.h5'\] is not a shard's file name")
def shard_name_that_is_a_list(folder: Path) -> Path:
    """A list of one name, which cannot be a key of a dictionary."""
    return _with_name(folder, ["v000-00001.h5"])


# --------------------------------------------------------------------------- ranges


@hostile("manifest.json: a shard is listed twice")
def shard_listed_twice(folder: Path) -> Path:
    """The first shard takes the place of the second: its rows are read under the ids of others."""
    return _with_name(folder, "v000-00000.h5")


@hostile("shard v000-00001.h5 starts at sample 255 of view 0, expected 256")
def shards_that_overlap(folder: Path) -> Path:
    """Two shards hold sample 255, and which of them is read depends on how it is looked up."""
    manifest = sound_manifest()
    manifest["shards"][1] = _shard_from(manifest["shards"][1], 255, 511)
    return put_folder(folder, manifest)


@hostile("shard v000-00001.h5 starts at sample 257 of view 0, expected 256")
def shards_with_a_gap(folder: Path) -> Path:
    """Nobody holds sample 256: a reader by position reads what lies between two maps."""
    manifest = sound_manifest()
    manifest["shards"][1] = _shard_from(manifest["shards"][1], 257, 513)
    return put_folder(folder, manifest)


@hostile("the shards of view 0 hold 512 samples, the manifest says 600")
def shard_left_out(folder: Path) -> Path:
    """The last shard is not listed, the samples are counted: 88 rows that are nowhere."""
    manifest = sound_manifest()
    del manifest["shards"][2]
    return put_folder(folder, manifest)


@hostile("shard 0: an empty range .256, 0.")
def range_that_runs_backwards(folder: Path) -> Path:
    """A range from 256 to 0: minus 256 rows."""
    return _range(folder, 256, 0)


@hostile("shard 0: stop must be an integer of at least 0, found -1")
def range_with_a_negative_end(folder: Path) -> Path:
    """A range that ends at -1, which slices take for the last but one."""
    return put_manifest(folder, "shards", 0, "stop", value=-1)


@hostile("manifest.json: samples must be an integer of at least 1, found 9223372036854775808")
def samples_beyond_int64(folder: Path) -> Path:
    """2**63 samples, which no index of NumPy holds."""
    return put_manifest(folder, "samples", value=2**63)


@hostile("manifest.json: samples must be an integer of at least 1, found 600.0")
def samples_as_a_float(folder: Path) -> Path:
    """600.0 samples: `range` refuses it, arithmetic does not."""
    return put_manifest(folder, "samples", value=600.0)


@hostile("manifest.json: shard_rows must be an integer of at least 1, found True")
def shard_rows_that_are_true(folder: Path) -> Path:
    """`true` rows in each shard: an integer for Python, where True is 1."""
    return put_manifest(folder, "shard_rows", value=True)


@hostile("manifest.json: shard_rows must be an integer of at least 1, found 0")
def shard_rows_of_zero(folder: Path) -> Path:
    """No rows in a shard: the number of shards is a division by zero."""
    return put_manifest(folder, "shard_rows", value=0)


@hostile("manifest.json: views must be a list of numbers below 65536")
def views_beyond_uint16(folder: Path) -> Path:
    """View 65,536, which is view 0 in the two bytes that a row has for it."""
    return put_manifest(folder, "views", value=[65_536])


@hostile("manifest.json: views must ascend")
def views_twice(folder: Path) -> Path:
    """One view, listed twice."""
    return put_manifest(folder, "views", value=[0, 0])


@hostile(r"shard 0: the id range \[0, 256\] does not fit 256 consecutive integers")
def ids_of_one_row_more(folder: Path) -> Path:
    """An id range of 257 in a shard of 256: ids are found by arithmetic, and the last one is in another shard."""
    return put_manifest(folder, "shards", 0, "ids", value=[0, 256])


@hostile("shard 8191: 'x' is not a shard's file name")
def manifest_of_8192_shards(folder: Path) -> Path:
    """As many shards as a manifest may list, the last of them wrong: all the work of reading it, for nothing."""
    return put_folder(folder, _many_shards(8192, last="x"))


@hostile("manifest.json: shards must be a list of at most 8192")
def manifest_of_9000_shards(folder: Path) -> Path:
    """More shards than a manifest may list: each costs 60 us and 5 KB before anything is read."""
    return put_folder(folder, _many_shards(9000))


def _range(folder: Path, start: int, stop: int) -> Path:
    manifest = sound_manifest()
    manifest["shards"][0] = changed(manifest["shards"][0], start=start, stop=stop)
    return put_folder(folder, manifest)


def _shard_from(record: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return changed(record, start=start, stop=stop, ids=[start, stop - 1])


def _many_shards(count: int, *, last: str | None = None) -> bytes:
    manifest = sound_manifest()
    first = manifest["shards"][0]
    manifest["shards"] = [
        {**first, "file": f"v000-{n:05d}.h5", "start": 256 * n, "stop": 256 * (n + 1), "ids": [256 * n, 256 * n + 255]}
        for n in range(count)
    ]
    if last is not None:
        manifest["shards"][-1]["file"] = last
    return sealed({**manifest, "samples": 256 * count})
