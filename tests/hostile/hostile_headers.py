"""One-file caches whose HDF5 is sound and whose header, the JSON text in the root attribute, is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hostile_base import (
    CLASSES,
    NAMES,
    ROWS,
    changed,
    checksummed,
    container,
    file_with,
    header_of,
    put_file,
    rows_of,
    sound_file,
    sound_shard,
    with_archive,
)
from hostile_cases import hostile

from kdcache.format.identity import canonical_json


def _with_text(folder: Path, text: str) -> Path:
    return put_file(folder, container(rows_of(sound_file()), text))


def _with_fields(folder: Path, **changes: Any) -> Path:
    return put_file(folder, file_with(**changes))


def _with_json(folder: Path, key: str, json: str) -> Path:
    """The header with one value of JSON that Python would not write."""
    text = canonical_json(changed(header_of(sound_file()), **{key: "PLACE"}))
    return _with_text(folder, text.replace('"PLACE"', json))


# --------------------------------------------------------------------------- text


@hostile(r"teacher.h5: not readable as JSON \(JSONDecodeError: Expecting value: line 1 column 1")
def header_that_is_no_json(folder: Path) -> Path:
    """The header is Python. A naive reader evaluates it."""
    return _with_text(folder, "__import__('os').system('touch PWNED')")


@hostile("teacher.h5: expected a JSON object, found list")
def header_that_is_a_json_list(folder: Path) -> Path:
    """The header is a list: `header["format"]` is a TypeError in the middle of somebody's training."""
    return _with_text(folder, "[1, 2, 3]")


@hostile("teacher.h5: not readable as JSON .RecursionError")
def header_of_ten_thousand_brackets(folder: Path) -> Path:
    """10,000 opening brackets: recursion without a bound, which ends naive parsers on their stack."""
    return _with_text(folder, "[" * 10_000)


@hostile("teacher.h5: nested more than 64 levels deep")
def header_of_a_hundred_levels(folder: Path) -> Path:
    """100 levels: deep enough for code that recurses in Python and calls ten functions a level."""
    return _with_json(folder, "provenance", '{"teacher":' + "[" * 100 + "]" * 100 + "}")


@hostile("teacher.h5: a key stands twice in one object")
def header_with_a_key_twice(folder: Path) -> Path:
    """`samples` stands there twice: Python takes the last one, other parsers the first, and two teams read two caches
    with one hash."""
    text = canonical_json(header_of(sound_file()))
    return _with_text(folder, text.replace('"samples":600', '"samples":600,"samples":599'))


@hostile("teacher.h5: NaN is not allowed")
def header_with_nan(folder: Path) -> Path:
    """NaN is equal to nothing, not even to itself: comparisons that guard something are all False."""
    return _with_json(folder, "samples", "NaN")


@hostile("teacher.h5: an integer of 5000 digits")
def header_with_an_integer_of_5000_digits(folder: Path) -> Path:
    """An integer of 5,000 digits: Python refuses from 4,300 on, with a ValueError, because converting takes quadratic
    time."""
    return _with_json(folder, "samples", "9" * 5000)


@hostile("teacher.h5: a number of 5002 characters")
def header_with_a_fraction_of_5000_digits(folder: Path) -> Path:
    """A fraction of 5,000 digits, which rounds to 0.1 and hashes as something else."""
    return _with_json(folder, "samples", "0." + "1" * 5000)


# --------------------------------------------------------------------------- fields


@hostile("this is one shard of a folder cache")
def shard_opened_alone(folder: Path) -> Path:
    """A shard under the name of a cache: a third of the rows, whose positions begin at 256. A naive reader joins them
    to the first samples."""
    return put_file(folder, sound_shard(1))


@hostile("teacher.h5: format version 2, this kdcache reads version 1")
def format_version_2(folder: Path) -> Path:
    """A version that does not exist yet. A naive reader goes on, as if nothing had changed."""
    return _with_fields(folder, format=2)


@hostile("teacher.h5: kind is 'head', expected 'cache'")
def header_of_another_kind(folder: Path) -> Path:
    """The last layer of a factored teacher, offered as a cache."""
    return _with_fields(folder, kind="head")


@hostile("teacher.h5: encoding 'pickle' is not known")
def unknown_encoding(folder: Path) -> Path:
    """An encoding that a plug-in of the attacker's would decode."""
    return _with_fields(folder, encoding={"name": "pickle", "dtype": "float16", "shape": [CLASSES]})


@hostile("teacher.h5: dtype 'object' is not known")
def encoding_of_objects(folder: Path) -> Path:
    """Logits of the type `object`: NumPy reads addresses out of the file and follows them."""
    return _with_fields(folder, encoding={"name": "dense", "dtype": "object", "shape": [CLASSES]})


@hostile("teacher.h5: an encoding's shape must be a list of positive integers")
def encoding_of_a_negative_shape(folder: Path) -> Path:
    """A row of -1 classes, which NumPy takes for `as many as there are`."""
    return _with_fields(folder, encoding={"name": "dense", "dtype": "float16", "shape": [-1]})


@hostile("teacher.h5: a row of 8589934[0-9]+ bytes, HDF5 stores less than 4294967296")
def row_of_eight_gigabytes(folder: Path) -> Path:
    """2**31-1 classes of float32: 8 GB for the first row that is read, and no file of that size is needed to say so."""
    encoding = {"name": "dense", "dtype": "float32", "shape": [2**31 - 1]}
    return _with_fields(folder, encoding=encoding, classes={"count": 2**31 - 1, "sha256": None, "names": None})


@hostile(r"teacher.h5: array \w+ is '.*expected <f. \(600, 1000\)")
def encoding_of_more_classes(folder: Path) -> Path:
    """1,000 classes in the header over rows of 64: a reader by the header reads sixteen rows as one."""
    classes = {"count": 1000, "sha256": None, "names": None}
    encoding = {"name": "dense", "dtype": "float16", "shape": [1000]}
    return _with_fields(folder, encoding=encoding, classes=classes)


@hostile(r"teacher.h5: sample ids of type '\|S1٣'")
def id_type_of_other_digits(folder: Path) -> Path:
    """Ids of type |S1٣: an Arabic three counts as a digit for regular expressions and `int`, and crashes NumPy."""
    return _with_fields(folder, id="|S1٣")


@hostile("teacher.h5: labels and digests must be true or false")
def labels_that_are_one(folder: Path) -> Path:
    """`labels` is 1, which is true in Python and not in JSON."""
    return _with_fields(folder, labels=1)


@hostile("teacher.h5: arrays .*evil.*, expected")
def array_that_no_schema_knows(folder: Path) -> Path:
    """One array more, which no checksum of a row covers, for a tool that takes all there is."""
    arrays = rows_of(sound_file())
    return put_file(folder, container({**arrays, "evil": np.zeros(ROWS, "<u8")}, header_of(sound_file())))


@hostile(r"teacher.h5: arrays \['input_digest', 'label', 'logits', 'row_max', 'sample_id', 'view'\], expected")
def no_checksums_of_rows(folder: Path) -> Path:
    """The array of row checksums is missing. A naive reader then checks nothing."""
    arrays = rows_of(sound_file())
    del arrays["row_crc"]
    return put_file(folder, container(arrays, header_of(sound_file())))


@hostile("teacher.h5: the class count does not match")
def class_count_that_is_true(folder: Path) -> Path:
    """One class, counted `true`: equal to 1 for Python, and to nothing for a strict reader."""
    encoding = {"name": "dense", "dtype": "float16", "shape": [1]}
    arrays = rows_of(sound_file())
    arrays["logits"] = arrays["logits"][:, :1].copy()
    classes = {"count": True, "sha256": None, "names": None}
    return put_file(folder, container(arrays, changed(header_of(sound_file()), encoding=encoding, classes=classes)))


@hostile("teacher.h5: the class names do not match their number or their hash")
def class_names_in_another_order(folder: Path) -> Path:
    """Two class names swapped: the student learns cats from the teacher's dogs."""
    classes = changed(header_of(sound_file())["classes"], names=[*NAMES[::-1]])
    return _with_fields(folder, classes=classes)


@hostile("teacher.h5: 9223372036854775808 samples x 1 views do not make 600 rows")
def samples_of_two_to_the_63(folder: Path) -> Path:
    """2**63 samples: a number that no int64 holds."""
    return _with_fields(folder, samples=2**63)


@hostile("teacher.h5: 600.0 samples x 1 views do not make 600 rows")
def samples_that_are_a_float(folder: Path) -> Path:
    """600.0 samples: equal to 600, until it is an index."""
    return _with_fields(folder, samples=600.0)


@hostile("teacher.h5: views must ascend")
def views_in_a_circle(folder: Path) -> Path:
    """View 0 twice: the student sees one view under two numbers, and thinks that it saw two."""
    return _with_fields(folder, views=[0, 0], samples=300, ids=None)


@hostile("teacher.h5: views must be a list of numbers below 65536")
def view_of_a_negative_number(folder: Path) -> Path:
    """View -1, which Python takes for the last one."""
    return _with_fields(folder, views=[-1])


@hostile("teacher.h5: the id range .0, 9223372036854775808. does not fit")
def id_range_that_overflows(folder: Path) -> Path:
    """Ids 0 to 2**63: the first position of an id is computed by subtraction, and wraps round."""
    return _with_fields(folder, ids=[0, 2**63])


@hostile("teacher.h5: provenance, and .*must be objects")
def provenance_that_is_a_list(folder: Path) -> Path:
    """Provenance that is a list of names: whoever prints the teacher's licence gets an AttributeError."""
    return _with_fields(folder, provenance=["teacher"])


@hostile("teacher.h5: payload_sha256 is not 64 hexadecimal digits")
def hash_that_is_no_hash(folder: Path) -> Path:
    """A hash that is empty: comparing the first zero digits succeeds."""
    header = changed(header_of(sound_file()), payload_sha256="")
    return _with_text(folder, canonical_json(header))


# --------------------------------------------------------------------------- rows against the header


@hostile("teacher.h5: its ids or row checksums are not those of its header")
def rows_of_another_dump(folder: Path) -> Path:
    """Sound rows of another teacher under this header, whose provenance is the one that the victim trusts."""
    arrays = rows_of(sound_file())
    arrays["logits"] = arrays["logits"][::-1].copy()
    return _with_arrays(folder, checksummed(arrays))


@hostile(r"row 0 \(sample 599\) does not match", at="rows", verify="the checksum of 600 rows does not match")
def rows_in_another_order(folder: Path) -> Path:
    """All rows moved by one place, with their checksums: each is sound and belongs to its neighbour. The seed of the
    checksum, view and position, tells."""
    arrays = {name: np.roll(array, 1, axis=0) for name, array in rows_of(sound_file()).items()}
    return put_file(folder, container(arrays, changed(header_of(sound_file()), ids=None)))


@hostile("row 0 .sample 1000. does not match", at="rows", verify="sample ids are not the consecutive range")
def ids_that_the_header_denies(folder: Path) -> Path:
    """Ids 1000 to 1599, and a header that says 0 to 599: looking an id up by arithmetic finds another sample's row."""
    arrays = rows_of(sound_file())
    arrays["sample_id"] += 1000
    return put_file(folder, container(checksummed(arrays), header_of(sound_file())))


@hostile("the sample id 7 stands twice", at="verify")
def sample_id_twice(folder: Path) -> Path:
    """Two rows of one id: which of them is the teacher's word?"""
    arrays = rows_of(sound_file())
    arrays["sample_id"][9] = 7
    return put_file(folder, container(checksummed(arrays), changed(header_of(sound_file()), ids=None)))


@hostile("a label lies outside -1 to 63", at="verify")
def label_beyond_all_classes(folder: Path) -> Path:
    """Label 1,000,000 of 64 classes, checksum right: an index that a loss on a GPU does not check."""
    arrays = rows_of(sound_file())
    arrays["label"][5] = 1_000_000
    return put_file(folder, container(checksummed(arrays), header_of(sound_file())))


@hostile("logits of sample 300 holds NaN or .inf", at="verify")
def logits_that_are_nan(folder: Path) -> Path:
    """One NaN among 38,400 logits, checksum right: after one step every weight of the student is NaN."""
    arrays = rows_of(sound_file())
    arrays["logits"][300, 7] = np.nan
    return put_file(folder, container(checksummed(arrays), header_of(sound_file())))


@hostile("the sha256 of its payload is not the one in its header", at="verify")
def payload_hash_of_another_file(folder: Path) -> Path:
    """The header holds the payload's hash of a file that was audited. Rows and their checksums are others."""
    header = header_of(sound_file())
    text = container(rows_of(sound_file()), header)
    wrong = changed(header_of(text), payload_sha256="0" * 64)
    return put_file(folder, container(rows_of(sound_file()), canonical_json(wrong)))


@hostile("teacher.h5: bytes between its arrays, from byte [0-9]+ on, are not zero", at="verify")
def archive_between_two_arrays(folder: Path) -> Path:
    """A zip archive in the padding between two arrays: a cache that smuggles a file past whoever looks at rows."""
    return put_file(folder, with_archive(sound_file()))


def _with_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Other arrays under the header of the sound file, its digests included."""
    return put_file(folder, container(arrays, canonical_json(header_of(sound_file()))))
