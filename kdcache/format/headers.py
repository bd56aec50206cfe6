"""The JSON text in the root attribute `kdcache` of a shard or a one-file cache.

A shard says only what determines its rows, so that a resumed, grown or re-ranked dump gives equal bytes.
A one-file cache carries what a manifest would: class names and provenance (where they fit), the id range,
and the sha256 of its payload, so that a hash of the header alone is the root hash of the whole cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdcache.errors import CorruptCacheError, UsageError
from kdcache.format.factored import Factored
from kdcache.format.identity import canonical_json
from kdcache.format.manifest import HEX64, ClassList, check_version, parse_classes, parse_provenance
from kdcache.format.schema import FORMAT_VERSION, MAX_ATTRIBUTE_BYTES, MAX_VIEWS, RowSchema, schema_from_json
from kdcache.format.strict_json import load_json

PENDING_DIGEST = "0" * 64
NO_ONE_FILE = (
    "factored rows need the teacher's last layer beside them (head.h5), so they have no one-file form: use a folder, a "
    "name that does not end in .h5"
)
MAX_HEADER_BYTES = MAX_ATTRIBUTE_BYTES - 1000


def shard_header(
    schema: RowSchema, classes: ClassList, teacher: Mapping[str, Any], *, view: int, start: int, stop: int
) -> str:
    """The attribute of a shard that holds samples [start, stop) of a view."""
    return canonical_json(
        {
            "format": FORMAT_VERSION,
            "kind": "shard",
            **schema.to_json(),
            "classes": classes.to_json(with_names=False),
            "teacher": dict(teacher),
            "view": view,
            "start": start,
            "stop": stop,
        }
    )


@dataclass(frozen=True)
class FileHeader:
    """The header of a one-file cache; rows are view-major, `samples` a view."""

    schema: RowSchema
    classes: ClassList
    samples: int
    views: tuple[int, ...]
    ids: tuple[int, int] | None
    provenance: dict[str, Any]
    payload_sha256: str = PENDING_DIGEST
    rows_blake2b: str = PENDING_DIGEST

    def dump(self) -> str:
        """The attribute text; class names are left out where they do not fit.

        Raises:
            UsageError: the provenance alone is above the limit of a header, or rows that need another file.
        """
        if isinstance(self.schema.encoding, Factored):
            raise UsageError(NO_ONE_FILE)
        for with_names in (True, False):
            text = canonical_json(
                {
                    "format": FORMAT_VERSION,
                    "kind": "cache",
                    **self.schema.to_json(),
                    "classes": self.classes.to_json(with_names=with_names),
                    "samples": self.samples,
                    "views": list(self.views),
                    "ids": list(self.ids) if self.ids else None,
                    "provenance": self.provenance,
                    "payload_sha256": self.payload_sha256,
                    "rows_blake2b": self.rows_blake2b,
                }
            )
            if len(text) <= MAX_HEADER_BYTES:
                return text
        raise UsageError(
            f"the provenance needs {len(text)} bytes, a one-file cache has room for {MAX_HEADER_BYTES}; "
            "keep a folder cache"
        )


def parse_file_header(text: str, *, rows: int, where: str) -> FileHeader:
    """The header of a one-file cache, every field checked.

    Raises:
        CorruptCacheError: anything that our writer would not have written; a lone shard is refused with
            the advice to open its folder.
    """
    value = load_json(text.encode(), where=where)
    if value.get("kind") == "shard":
        raise CorruptCacheError(f"{where}: this is one shard of a folder cache; open the folder that it belongs to")
    check_version(value, kind="cache", where=where)
    schema = schema_from_json(value, where=where)
    if isinstance(schema.encoding, Factored):
        raise CorruptCacheError(f"{where}: {NO_ONE_FILE}")
    samples, views, ids = value.get("samples"), value.get("views"), value.get("ids")
    if not isinstance(views, list) or not views or not all(type(v) is int and 0 <= v < MAX_VIEWS for v in views):
        raise CorruptCacheError(f"{where}: views must be a list of numbers below {MAX_VIEWS}")
    if views != sorted(set(views)):
        raise CorruptCacheError(f"{where}: views must ascend")
    if type(samples) is not int or samples < 1 or samples * len(views) != rows:
        raise CorruptCacheError(f"{where}: {samples!r:.30} samples x {len(views)} views do not make {rows} rows")
    if ids is not None:
        pair = isinstance(ids, list) and len(ids) == 2 and all(type(i) is int and -(2**63) <= i < 2**63 for i in ids)
        if not pair or ids[1] - ids[0] + 1 != samples or schema.id_dtype != "<i8":
            raise CorruptCacheError(f"{where}: the id range {ids!r:.80} does not fit {samples} consecutive integers")
    provenance = parse_provenance(value.get("provenance"), where=where)
    for name in ("payload_sha256", "rows_blake2b"):
        if not isinstance(value.get(name), str) or not HEX64.fullmatch(value[name]):
            raise CorruptCacheError(f"{where}: {name} is not 64 hexadecimal digits")
    return FileHeader(
        schema=schema,
        classes=parse_classes(value.get("classes"), schema, where=where),
        samples=samples,
        views=tuple(views),
        ids=tuple(ids) if ids else None,
        provenance=provenance,
        payload_sha256=value["payload_sha256"],
        rows_blake2b=value["rows_blake2b"],
    )
