"""Mutants that once broke a promise, each with what it did."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import fuzz_bases
import fuzz_doors
import fuzz_reseal
from fuzz_bases import Base
from fuzz_targets import Case, Target

Value = dict[str, Any]


def unicode_digits_in_a_type(value: Value) -> None:
    """`\\d` of a pattern takes every script's digits, NumPy does not: TypeError when the cache was opened."""
    value["id"] = "|S1\N{ARABIC-INDIC DIGIT THREE}"


def unicode_digits_in_a_name(value: Value) -> None:
    """The same in a shard's name: accepted, although no writer gives it."""
    value["shards"][0]["file"] = "v\N{ARABIC-INDIC DIGIT ZERO}00-00000.h5"


def commands_to_the_terminal(value: Value) -> None:
    """`kdcache inspect` and `kdcache card` printed escape sequences out of a file."""
    value["provenance"]["data"]["name"] = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"
    value["provenance"]["a\nb"] = {"c\x1b[1m": 1}


def commands_in_a_message(value: Value) -> None:
    """So did the messages of refusals that quote a type."""
    value["shards"][0]["arrays"]["view"][1] = "<u2\n\x1b[2J"


def ids_of_samples_that_no_file_holds(value: Value) -> None:
    """Looking up a sample made room for 2**27 ids before any file was opened: MemoryError."""
    _claim(value, 1 << 27)
    for record in value["shards"]:
        record["ids"] = None


def consecutive_ids_of_samples_that_no_file_holds(value: Value) -> None:
    """Listing the ids did the same."""
    _claim(value, 1 << 27)


def rows_that_need_more_addresses_than_a_pointer_has(value: Value) -> None:
    """32 shards of one row of 2**47 + 2 bytes: ctypes dropped the upper bits of 2**64 + 2**18, OverflowError later."""
    shape = [5 * 277 * 1013, 1657 * 30269]
    value["encoding"] = {"name": "dense", "dtype": "float16", "shape": shape}
    value["classes"] = {"count": shape[0], "names": None, "sha256": None}
    value["samples"], value["shard_rows"] = 32, 1
    first = value["shards"][0]
    value["shards"] = []
    for number in range(32):
        record = json.loads(json.dumps(first))
        record.update(file=f"v000-{number:05d}.h5", start=number, stop=number + 1, ids=[5 + number] * 2)
        shapes = {"logits": [1, *shape], "row_max": [1, shape[1]]}
        offset = 0
        for name in sorted(record["arrays"], key=lambda name: name != "logits"):
            entry = record["arrays"][name]
            entry[0], entry[2] = offset, shapes.get(name, [1])
            width = {"logits": 2, "row_max": 4, "view": 2, "row_crc": 4}.get(name, 8)
            size = width
            for length in entry[2]:
                size *= length
            offset += -(-size // 65536) * 65536
        record["size"] = offset
        value["shards"].append(record)


def more_rows_than_numbers(value: Value) -> None:
    """65,536 views of 2**48 - 1 rows: the sum of the rows went round to nothing."""
    _claim(value, (1 << 40) - 1)
    records = value["shards"]
    value["views"] = list(range(2000))
    value["shards"] = [
        {**r, "view": v, "file": f"v{v:05d}-{i:05d}.h5"} for v in range(2000) for i, r in enumerate(records)
    ]


CASES: dict[str, Callable[[Value], None]] = {
    change.__name__: change
    for change in (
        unicode_digits_in_a_type,
        unicode_digits_in_a_name,
        commands_to_the_terminal,
        commands_in_a_message,
        ids_of_samples_that_no_file_holds,
        consecutive_ids_of_samples_that_no_file_holds,
        rows_that_need_more_addresses_than_a_pointer_has,
        more_rows_than_numbers,
    )
}


class Regressions(Target):
    """One manifest a case, in this order; the numbers start anew behind the last."""

    def prepare(self) -> list[Base]:
        return fuzz_bases.make_folders(self.home / "bases")[:1]

    def case(self, number: int) -> Case:
        self._change = list(CASES.values())[number % len(CASES)]
        base, rng = self.bases[0], random.Random(number)
        path = base.write(self.home / "case", self.changes(rng, base))
        fuzz_doors.use(path, access="mmap", sample_ids=base.ids)
        return Case(base, path, fuzz_doors.use(path, access="pread", sample_ids=base.ids))

    def changes(self, rng: random.Random, base: Base) -> dict[str, bytes]:
        value = json.loads(base.files["manifest.json"])
        self._change(value)
        return {"manifest.json": fuzz_reseal.reseal_manifest(value)}


def _claim(value: Value, rows: int) -> None:
    """One shard of that many rows."""
    value["samples"], value["shard_rows"] = rows, rows
    record = value["shards"][0]
    record.update(start=0, stop=rows, ids=[5, 4 + rows])
    value["shards"] = [record]
    offset = 0
    for name, entry in sorted(record["arrays"].items(), key=lambda item: item[1][0]):
        entry[0], entry[2][0] = offset, rows
        width = {"logits": 6, "row_max": 4, "view": 2, "row_crc": 4}.get(name, 8)
        offset += -(-rows * width // 65536) * 65536
    record["size"] = offset
