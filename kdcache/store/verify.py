"""`kdcache.verify`: reads every byte of a cache and says what is wrong with it.

Per shard: size, sha256 of the file, digest of everything outside the payload, the strict parse of its
HDF5 header against the manifest, and the checksum of each row. Over all: the root hash, unique ids, labels
in range. Damage is collected, not raised, unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import CorruptCacheError, IncompleteCacheError, KDCacheError, MismatchError, StorageError
from kdcache.format.checksums import file_sha256, header_digest, payload_sha256
from kdcache.format.encoding import holds_nan, label_count
from kdcache.format.hdf5_parser import parse, refuse_slack
from kdcache.format.headers import shard_header
from kdcache.format.identity import show_id
from kdcache.format.manifest import ShardRecord
from kdcache.store import posix
from kdcache.store.inspect import unlisted
from kdcache.store.parts import Catalog, Part, read_catalog, refuse_hole
from kdcache.store.scan import checked_blocks

AGAIN = "it is damaged: fetch it again, or remove it and run the dump's command again, which makes it anew"
_RAISED = 8


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `problems` is empty for a sound cache.

    Attributes:
        root: the root hash, None where it could not be read.
        rows: rows whose checksums were compared.
        bytes: bytes read.
        problems: one sentence each, with the file.
        missing: whether all problems are missing files (exit code 4 instead of 3).
        unlisted: names in the folder that the manifest does not list; no reader looks at them, and they are no problem.
        absent_views: views of the dump of which the folder holds no shard: it is a smaller cache, which is no problem.
    """

    root: str | None
    rows: int
    bytes: int
    problems: tuple[str, ...] = ()
    missing: bool = False
    unlisted: tuple[str, ...] = ()
    absent_views: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def raise_on_error(self) -> None:
        """Raises what was found: up to 8 problems, in one line.

        Raises:
            CorruptCacheError: damage.
            IncompleteCacheError: nothing worse than missing shards.
        """
        if self.problems:
            kind = IncompleteCacheError if self.missing else CorruptCacheError
            if len(self.problems) == 1:
                raise kind(self.problems[0])
            shown = [f"({number}) {text}" for number, text in enumerate(self.problems[:_RAISED], start=1)]
            more = f" and {len(self.problems) - _RAISED} more" if len(self.problems) > _RAISED else ""
            raise kind(f"{len(self.problems)} problems: {' '.join(shown)}{more}")

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "ok": self.ok,
            "root": self.root,
            "rows": self.rows,
            "bytes": self.bytes,
            "problems": list(self.problems),
            "unlisted": list(self.unlisted),
            "absent_views": list(self.absent_views),
        }


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    damaged: bool = False
    rows: int = 0
    bytes: int = 0

    def add(self, error: KDCacheError) -> None:
        self.problems.append(str(error))
        self.damaged |= not isinstance(error, IncompleteCacheError)

    @property
    def missing(self) -> bool:
        return bool(self.problems) and not self.damaged


def verify(
    path: str | Path,
    *,
    raise_on_error: bool = False,
    expect_root: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Re-reads a whole cache.

    Args:
        path: a folder or a one-file cache.
        raise_on_error: raise the first problem instead of reporting.
        expect_root: the root hash it must have.
        progress: called with the number of bytes after each file.

    Returns:
        A report; `report.ok` says whether the cache is sound.

    Raises:
        CorruptCacheError, IncompleteCacheError: with `raise_on_error`.
        MismatchError: another root hash than `expect_root`.
    """
    findings = _Findings()
    root: str | None = None
    others: tuple[str, ...] = ()
    absent: tuple[int, ...] = ()
    try:
        catalog = read_catalog(Path(path))
    except (CorruptCacheError, IncompleteCacheError) as error:
        findings.add(error)
    else:
        root, absent = catalog.root, catalog.absent_views
        if expect_root is not None and root != expect_root:
            raise MismatchError(f"{path} has the root hash {root}, expected {expect_root}; it is another dump")
        _check_head(catalog, findings)
        _check_all(Path(path), catalog, findings, progress)
        if catalog.shards:
            others = tuple(unlisted(Path(path), catalog))
    problems = tuple(findings.problems)
    report = VerifyReport(root, findings.rows, findings.bytes, problems, findings.missing, others, absent)
    if raise_on_error:
        report.raise_on_error()
    return report


def _check_all(path: Path, catalog: Catalog, findings: _Findings, progress: Callable[[int], None] | None) -> None:
    records = catalog.shards or (None,) * len(catalog.parts)
    for part, record in zip(catalog.parts, records, strict=True):
        try:
            fd, size = posix.open_regular(part.path, inside=record is not None)
            try:
                read = partial(_read, fd, part.path)
                if record is not None:
                    if size == record.size:  # in a file that was cut, what is behind its end looks like a hole
                        refuse_hole(fd, part.path, part.arrays)
                    _check_shard_file(read, size, part, record, catalog)
                elif part.view == catalog.views[0]:
                    _check_payload(read, size, catalog, part)
                findings.rows += _check_rows(read, part, catalog)
                if record is not None or part.view == catalog.views[0]:  # views of a one-file cache share the file
                    findings.bytes += size
            finally:
                posix.close_reader(fd)
            if progress is not None:
                progress(size)
        except (CorruptCacheError, IncompleteCacheError, StorageError) as error:
            findings.add(error)
    if not findings.problems:
        _check_ids(path, catalog, findings)


def _check_head(catalog: Catalog, findings: _Findings) -> None:
    """The last layer of a factored teacher, without which no row is a row of logits."""
    if catalog.head is None:
        return
    try:
        catalog.head.load()
        findings.bytes += catalog.head.record.size
    except (CorruptCacheError, IncompleteCacheError, StorageError) as error:
        findings.add(error)


def _check_shard_file(
    read: Callable[[int, int], bytes], size: int, part: Part, record: ShardRecord, catalog: Catalog
) -> None:
    """A shard's bytes against its record, and its own header against what the manifest says of it."""
    if size != record.size:
        raise CorruptCacheError(f"{part.path}: {size} bytes, the manifest says {record.size}; truncated or grown")
    parsed = parse(read, size, name=str(part.path))
    if parsed.arrays != part.arrays:
        raise CorruptCacheError(f"{part.path}: its arrays are not where the manifest says")
    teacher = catalog.provenance.get("teacher", {})
    expected = shard_header(
        catalog.schema, catalog.classes, teacher, view=record.view, start=record.start, stop=record.stop
    )
    if parsed.attribute != expected:
        raise CorruptCacheError(f"{part.path}: its header describes another shard than the manifest")
    if header_digest(read, part.arrays, size) != record.header_blake2b:
        raise CorruptCacheError(f"{part.path}: bytes outside the payload differ from the manifest's digest")
    if file_sha256(read, size) != record.sha256:
        raise CorruptCacheError(f"{part.path}: its sha256 is not the manifest's; {AGAIN}")
    refuse_slack(read, size, parsed, name=str(part.path))


def _check_payload(read: Callable[[int, int], bytes], size: int, catalog: Catalog, part: Part) -> None:
    parsed = parse(read, size, name=str(part.path))
    refuse_slack(read, size, parsed, name=str(part.path))
    if catalog.header is not None and payload_sha256(read, parsed.arrays) != catalog.header.payload_sha256:
        raise CorruptCacheError(f"{part.path}: the sha256 of its payload is not the one in its header")


def _check_rows(read: Callable[[int, int], bytes], part: Part, catalog: Catalog) -> int:
    for _, block in checked_blocks(read, part, catalog):
        for spec in catalog.schema.encoding.specs:
            if spec.dtype in ("<f2", "<f4") and holds_nan(block[spec.name]):
                first = np.argwhere(~(block[spec.name] < np.inf))[0, 0]
                raise CorruptCacheError(
                    f"{part.path}: {spec.name} of sample {show_id(block['sample_id'][first])} holds NaN or +inf, which "
                    "no writer stores"
                )
        flaw = catalog.schema.encoding.flaw(block)
        if flaw is not None:
            raise CorruptCacheError(f"{part.path}: {flaw}, as no writer stores it")
        if "label" in block:
            labels = block["label"]
            if int(labels.min()) < -1 or int(labels.max()) >= label_count(catalog.classes.count):
                raise CorruptCacheError(
                    f"{part.path}: a label lies outside -1 to {label_count(catalog.classes.count) - 1}"
                )
    return part.rows


def _check_ids(path: Path, catalog: Catalog, findings: _Findings) -> None:
    """Every view holds the same ids in the same order, each once."""
    if catalog.first_id is not None:
        return
    reference: np.ndarray | None = None
    for view in catalog.views:
        pieces = []
        for part in (p for p in catalog.parts if p.view == view):
            fd, _ = posix.open_regular(part.path, inside=bool(catalog.shards))
            try:
                layout = part.arrays["sample_id"]
                pieces.append(np.frombuffer(_read(fd, part.path, layout.offset, layout.nbytes), layout.dtype))
            finally:
                posix.close_reader(fd)
        ids = np.concatenate(pieces)
        if reference is None:
            reference = ids
            values, counts = np.unique(ids, return_counts=True)
            if int(counts.max()) > 1:
                twice = show_id(values[counts.argmax()])
                findings.add(CorruptCacheError(f"{path}: the sample id {twice} stands twice in a view"))
        elif not np.array_equal(ids, reference):
            findings.add(CorruptCacheError(f"{path}: view {view} holds other sample ids than view {catalog.views[0]}"))


def _read(fd: int, path: Path, offset: int, length: int) -> bytes:
    return posix.read_exactly(fd, offset, length, path)
