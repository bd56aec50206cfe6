"""The manifest of a folder cache: what the folder holds, and one root hash over all of it.

A reader of a folder parses no HDF5: offsets, types and shapes stand here, and each shard's bytes outside
the payload are compared with a digest from here before its rows are used. The root hash covers every
field but the date, so two teams can compare dumps with one line of text; `seal` covers the date too, so
that no bit of the file can change unseen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kdcache.errors import CorruptCacheError, UsageError
from kdcache.format.arrays import ArrayLayout, layouts_from_json, layouts_to_json
from kdcache.format.head import HeadRecord, parse_head
from kdcache.format.identity import canonical_json, fingerprint
from kdcache.format.schema import FORMAT_VERSION, MAX_ROWS, MAX_VIEWS, RowSchema, schema_from_json
from kdcache.format.strict_json import load_json
from kdcache.format.tiling import Tiling, extents_from_json

CLASSES_FILE = "classes.json"
MAX_INLINE_NAMES_BYTES = 65_536
MAX_CLASS_NAMES = 500_000
MAX_CLASS_NAMES_BYTES = 8 << 20
MAX_SHARDS = 8192  # a manifest of that many is read in 0.6 s; 2 TiB in shards of the default size
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
SHARD_NAME = re.compile(r"v[0-9]{3,5}-[0-9]{5,9}\.h5")
_OBJECTS = ("teacher", "data", "precision", "versions")
HEX64 = re.compile(r"[0-9a-f]{64}")


def shard_name(view: int, index: int) -> str:
    """File name of a shard, for example `v000-00012.h5`."""
    return f"v{view:03d}-{index:05d}.h5"


@dataclass(frozen=True)
class ClassList:
    """The classes of a teacher: their number, the ordered names where known, and a hash of the names."""

    count: int
    names: tuple[str, ...] | None = None
    sha256: str | None = None

    @staticmethod
    def of(count: int, names: tuple[str, ...] | None) -> ClassList:
        """The list with its hash.

        Raises:
            UsageError: more names than a reader takes, or a name that is not Unicode text.
        """
        if names is not None and (len(names) > MAX_CLASS_NAMES or _bytes_of(names) > MAX_CLASS_NAMES_BYTES):
            raise UsageError(
                f"{len(names)} class names of {_bytes_of(names)} bytes: a cache holds at most {MAX_CLASS_NAMES} of "
                f"{MAX_CLASS_NAMES_BYTES} bytes; pass their number instead, and keep the names beside the cache"
            )
        wrong = [n for n in names or () if not n.isascii() and any("\ud800" <= letter <= "\udfff" for letter in n)]
        if wrong:
            raise UsageError(f"the class name {wrong[0]!r:.80} is not Unicode text; rename it")
        return ClassList(count, names, fingerprint(list(names)) if names is not None else None)

    def to_json(self, *, with_names: bool = True) -> dict[str, Any]:
        """`count`, `sha256` and, unless left out, `names`."""
        value: dict[str, Any] = {"count": self.count, "sha256": self.sha256}
        if with_names:
            value["names"] = list(self.names) if self.names is not None else None
        return value

    @property
    def own_file(self) -> bytes | None:
        """The bytes of `classes.json` where the names are too long for a manifest (a vocabulary), else None."""
        if self.names is None:
            return None
        text = canonical_json(list(self.names)).encode()
        return text if len(text) > MAX_INLINE_NAMES_BYTES else None


def _bytes_of(names: tuple[str, ...]) -> int:
    return len(canonical_json(list(names)))


@dataclass(frozen=True)
class ShardRecord:
    """One published shard: samples [start, stop) of a view, and everything needed to read and check it.

    `ids` is (first, last) where the sample ids are consecutive integers, else None. `clamped` counts
    values below the float16 range.
    """

    file: str
    view: int
    start: int
    stop: int
    size: int
    sha256: str
    header_blake2b: str
    arrays: dict[str, ArrayLayout]
    ids: tuple[int, int] | None
    clamped: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    def to_json(self) -> dict[str, Any]:
        """As in a manifest or a commit record."""
        return {
            "file": self.file,
            "view": self.view,
            "start": self.start,
            "stop": self.stop,
            "size": self.size,
            "sha256": self.sha256,
            "header_blake2b": self.header_blake2b,
            "arrays": layouts_to_json(self.arrays),
            "ids": list(self.ids) if self.ids else None,
            "clamped": self.clamped,
        }


@dataclass(frozen=True)
class Manifest:
    """A folder cache as a whole; `shards` are ordered by (view, start).

    `extents` are the sample counts at which it was finished, where it grew since (see `tiling`). `head` is the last
    layer that factored rows need, None beside other rows.
    """

    schema: RowSchema
    classes: ClassList
    samples: int
    views: tuple[int, ...]
    shard_rows: int
    provenance: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    created: str | None = None
    predecessor: str | None = None
    extents: tuple[int, ...] = ()
    head: HeadRecord | None = None
    root: str = field(default="", compare=False)

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION,
            "kind": "folder",
            **self.schema.to_json(),
            "classes": self.classes.to_json(with_names=self.classes.own_file is None),
            "samples": self.samples,
            "views": list(self.views),
            "shard_rows": self.shard_rows,
            **({"extents": list(self.extents)} if self.extents else {}),
            **({"head": self.head.to_json()} if self.head else {}),
            "provenance": self.provenance,
            "predecessor": self.predecessor,
            "shards": [s.to_json() for s in self.shards],
        }

    def sealed(self) -> Manifest:
        """The same with its root hash: sha256 of the canonical JSON of all fields but `created` and `root`."""
        return replace(self, root=fingerprint(self._body()))

    def dump(self) -> bytes:
        """The bytes of `manifest.json`: canonical JSON and a newline."""
        sealed = self.sealed()
        ends = {"created": sealed.created, "root": sealed.root, "seal": seal(sealed.created, sealed.root)}
        return canonical_json({**sealed._body(), **ends}).encode() + b"\n"


def seal(created: str | None, root: str) -> str:
    """sha256 (hex) over the date and the root hash."""
    return fingerprint([created, root])


def parse_manifest(text: bytes, *, where: str) -> Manifest:
    """A manifest from its bytes, every field checked, before anything is allocated.

    Raises:
        CorruptCacheError: anything that our writer would not have written, or a wrong root hash.
    """
    value = load_json(text, where=where)
    check_version(value, kind="folder", where=where)
    schema = schema_from_json(value, where=where)
    _check_hashes(text, value, where=where)
    check = _Checks(where)
    samples, shard_rows = check.count(value, "samples"), check.count(value, "shard_rows")
    views = value.get("views")
    if not isinstance(views, list) or not views or not all(type(v) is int and 0 <= v < MAX_VIEWS for v in views):
        raise CorruptCacheError(f"{where}: views must be a list of numbers below {MAX_VIEWS}")
    if views != sorted(set(views)):
        raise CorruptCacheError(f"{where}: views must ascend")
    if samples * len(views) > MAX_ROWS:
        raise CorruptCacheError(f"{where}: {samples} samples x {len(views)} views are more than {MAX_ROWS} rows")
    shards = value.get("shards")
    if not isinstance(shards, list) or len(shards) > MAX_SHARDS:
        raise CorruptCacheError(f"{where}: shards must be a list of at most {MAX_SHARDS}")
    records = tuple(parse_shard(s, schema, where=f"{where}, shard {i}") for i, s in enumerate(shards))
    extents = extents_from_json(value.get("extents"), samples, where=where)
    _check_ranges(records, tuple(views), Tiling(shard_rows, extents or (samples,)), where=where)
    provenance = parse_provenance(value.get("provenance"), where=where)
    created, predecessor = value.get("created"), value.get("predecessor")
    if created is not None and not (isinstance(created, str) and _DATE.fullmatch(created)):
        raise CorruptCacheError(f"{where}: created is {created!r:.50}, not a date such as 2024-01-01T00:00:00Z")
    if predecessor is not None and not (isinstance(predecessor, str) and HEX64.fullmatch(predecessor)):
        raise CorruptCacheError(f"{where}: predecessor must be a root hash")
    classes = parse_classes(value.get("classes"), schema, where=where)
    return Manifest(
        schema=schema,
        classes=classes,
        samples=samples,
        views=tuple(views),
        shard_rows=shard_rows,
        provenance=provenance,
        shards=records,
        created=created,
        predecessor=predecessor,
        extents=extents,
        head=parse_head(value.get("head"), schema.encoding, where=where),
        root=value["root"],
    )


def _check_hashes(text: bytes, value: dict[str, Any], *, where: str) -> None:
    """The root hash, the seal, and that the text is canonical to the byte."""
    created, root = value.get("created"), value.get("root")
    body = {k: v for k, v in value.items() if k not in ("created", "root", "seal")}
    if root != fingerprint(body) or value.get("seal") != fingerprint([created, root]):
        raise CorruptCacheError(
            f"{where}: the root hash does not match the content (written {root!r:.80}); it was edited or damaged. "
            "Fetch the cache again, or dump it again"
        )
    if text != canonical_json(value).encode() + b"\n":
        raise CorruptCacheError(f"{where}: not written as kdcache writes it (canonical JSON); fetch it again")


def parse_provenance(value: Any, *, where: str) -> dict[str, Any]:
    """The provenance of a header or manifest.

    Raises:
        CorruptCacheError: it, or a part of it that must be one, is not an object.
    """
    if not isinstance(value, dict) or not all(isinstance(value.get(k, {}), dict) for k in _OBJECTS):
        raise CorruptCacheError(f"{where}: provenance, and {', '.join(_OBJECTS)} in it, must be objects")
    return value


def check_version(value: Mapping[str, Any], *, kind: str, where: str) -> None:
    """Refuses another format version or kind of file.

    Raises:
        CorruptCacheError: naming the version found and what to do.
    """
    version = value.get("format")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CorruptCacheError(
            f"{where}: format version {version!r:.20}, this kdcache reads version {FORMAT_VERSION}; "
            "upgrade kdcache if the file is newer"
        )
    if value.get("kind") != kind:
        raise CorruptCacheError(f"{where}: kind is {value.get('kind')!r:.50}, expected {kind!r}")


def parse_classes(value: Any, schema: RowSchema, *, where: str) -> ClassList:
    """The class list of a header or manifest.

    Raises:
        CorruptCacheError: a count that is not the encoding's, or names that do not match their hash.
    """
    count = value.get("count") if isinstance(value, dict) else None
    if not isinstance(value, dict) or type(count) is not int or count != schema.encoding.num_classes:
        raise CorruptCacheError(f"{where}: the class count does not match the encoding's {schema.encoding.num_classes}")
    names, sha256 = value.get("names"), value.get("sha256")
    if sha256 is not None and not (isinstance(sha256, str) and HEX64.fullmatch(sha256)):
        raise CorruptCacheError(f"{where}: the hash of the class names is not a sha256")
    if names is None:
        return ClassList(schema.encoding.num_classes, None, sha256)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise CorruptCacheError(f"{where}: class names must be a list of text")
    if len(names) != schema.encoding.num_classes or fingerprint(names) != sha256:
        raise CorruptCacheError(f"{where}: the class names do not match their number or their hash")
    return ClassList(len(names), tuple(names), sha256)


def parse_shard(value: Any, schema: RowSchema, *, where: str) -> ShardRecord:
    """A shard record, checked against the schema.

    Raises:
        CorruptCacheError: any field that our writer would not have written.
    """
    fields = {"file", "view", "start", "stop", "size", "sha256", "header_blake2b", "arrays", "ids", "clamped"}
    if not isinstance(value, dict) or set(value) != fields:
        raise CorruptCacheError(f"{where}: a shard record needs exactly {sorted(fields)}")
    check = _Checks(where)
    if not isinstance(value["file"], str) or not SHARD_NAME.fullmatch(value["file"]):
        raise CorruptCacheError(f"{where}: {value['file']!r:.80} is not a shard's file name")
    start, stop, size = (check.count(value, k, minimum=0) for k in ("start", "stop", "size"))
    view, clamped = check.count(value, "view", minimum=0), check.count(value, "clamped", minimum=0)
    if stop <= start:
        raise CorruptCacheError(f"{where}: an empty range [{start}, {stop})")
    for key in ("sha256", "header_blake2b"):
        if not isinstance(value[key], str) or not HEX64.fullmatch(value[key]):
            raise CorruptCacheError(f"{where}: {key} is not 64 hexadecimal digits")
    arrays = layouts_from_json(value["arrays"], where=where)
    schema.check_arrays(arrays, stop - start, size, where=where)
    ids = value["ids"]
    if ids is not None:
        good = isinstance(ids, list) and len(ids) == 2 and all(type(i) is int and -(2**63) <= i < 2**63 for i in ids)
        if not good or ids[1] - ids[0] + 1 != stop - start or schema.id_dtype != "<i8":
            raise CorruptCacheError(
                f"{where}: the id range {ids!r:.80} does not fit {stop - start} consecutive integers"
            )
    return ShardRecord(
        file=value["file"],
        view=view,
        start=start,
        stop=stop,
        size=size,
        sha256=value["sha256"],
        header_blake2b=value["header_blake2b"],
        arrays=arrays,
        ids=tuple(ids) if ids else None,
        clamped=clamped,
    )


def _check_ranges(records: tuple[ShardRecord, ...], views: tuple[int, ...], tiling: Tiling, *, where: str) -> None:
    """Every view's shards must tile [0, samples) in order, as `tiling` cuts them, with no name twice."""
    samples = tiling.extents[-1]
    if len({r.file for r in records}) != len(records):
        raise CorruptCacheError(f"{where}: a shard is listed twice")
    expected = {v: 0 for v in views}
    if [r.view for r in records] != sorted(r.view for r in records):
        raise CorruptCacheError(f"{where}: shards are not ordered by view")
    for record in records:
        if expected.get(record.view) != record.start:
            raise CorruptCacheError(
                f"{where}: shard {record.file} starts at sample {record.start} of view {record.view}, "
                f"expected {expected.get(record.view)}"
            )
        stop = tiling.stop_of(record.start) if record.start < samples else samples
        if record.stop != stop:
            raise CorruptCacheError(
                f"{where}: shard {record.file} ends at sample {record.stop - 1}, expected {stop - 1} (shards have "
                f"{tiling.shard_rows} rows)"
            )
        expected[record.view] = record.stop
    for view, stop in expected.items():
        if stop != samples:
            raise CorruptCacheError(
                f"{where}: the shards of view {view} hold {stop} samples, the manifest says {samples}"
            )


@dataclass(frozen=True)
class _Checks:
    where: str

    def count(self, value: Mapping[str, Any], key: str, *, minimum: int = 1) -> int:
        found = value.get(key)
        if type(found) is not int or not minimum <= found < 2**48:
            raise CorruptCacheError(
                f"{self.where}: {key} must be an integer of at least {minimum}, found {found!r:.50}"
            )
        return found
