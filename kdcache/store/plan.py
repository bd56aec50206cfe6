"""The plan of a dump: everything that decides its bytes, written once and shared by all its processes.

Ranks, workers, restarts and further launches may differ; what stands here may not. A second command with
another plan on the same folder is refused by the name of the field that differs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

from kdcache.errors import CorruptCacheError, MismatchError, UsageError, printable
from kdcache.format.head import HeadRecord, parse_head
from kdcache.format.headers import FileHeader
from kdcache.format.manifest import MAX_SHARDS, ClassList, Manifest, check_version, parse_classes, parse_provenance
from kdcache.format.schema import FORMAT_VERSION, MAX_VIEWS, RowSchema, schema_from_json
from kdcache.format.sealed import dump_sealed, load_sealed
from kdcache.format.tiling import MAX_EXTENTS, Tiling, extents_from_json
from kdcache.store import posix

KIND = "plan"
DEFAULT_SHARD_BYTES = 256 << 20
MAX_SHARD_ROWS = 1 << 28  # libhdf5 counts through the chunks of a file that it lays out: 27 ns each, here up to 1 s
MAX_SHARD_BYTES = 1 << 43
MOST_DEFAULT_ROWS = 1 << 17  # short rows: 256 MiB of top-k rows are 3 million, all the work of one process at risk
_ROW_GRID = 4096

# Of the data's provenance, what is not changed by further samples.
_OF_THE_SOURCE = ("name", "id_scheme", "inputs", "classes_sha256", "decoder", "digest_point")

# What people call the fields of a plan.
_HINTS = {
    "provenance.teacher.state_sha256": "the teacher's weights; a factory with random ones needs --weights",
    "provenance.teacher": "the teacher",
    "provenance.data.dumped": "the number of samples, --limit",
    "provenance.data.digest_point": "views with --augment, the items as they are without",
    "provenance.data": "the data set",
    "provenance.transform": "the teacher's transform",
    "provenance.views.augment": "--augment",
    "provenance.views.seed": "--seed",
    "provenance.views": "the pipeline that makes the views, --augment",
    "views": "--views",
    "samples": "the number of samples",
    "provenance.output_key": "--output-key",
    "provenance.precision.batch_size": "--batch-size",
    "provenance.precision.threads": "--threads",
    "provenance.precision.amp": "--amp",
    "provenance.precision.device": "--device",
    "provenance.teacher_seen": "--teacher-saw",
    "provenance.licence": "--licence",
    "provenance.converted_from": "`kdcache convert` made it, so that it takes no further rows; let its source grow",
    "provenance.ensemble": "`kdcache ensemble` made it, so that it takes no further rows; let its sources grow",
    "provenance.versions": "versions of the libraries",
    "encoding.dtype": "--dtype",
    "encoding.k": "--top-k",
    "encoding.temperatures": "--temperatures",
    "encoding.labels": "labels beside the rows",
    "encoding.head": "the weights of the teacher's last layer, --factored",
    "encoding.name": "--factored or --top-k, or neither",
    "shard_rows": "--shard-rows; a dump that goes on has its own, so leave it out",
}


def default_shard_rows(row_bytes: int) -> int:
    """Rows of a shard of up to 256 MiB and 131,072 rows: a multiple of 4,096 where that many fit."""
    fit = min(MOST_DEFAULT_ROWS, max(1, DEFAULT_SHARD_BYTES // row_bytes))
    return fit // _ROW_GRID * _ROW_GRID if fit >= _ROW_GRID else fit


@dataclass(frozen=True)
class Plan:
    """What is dumped, row by row, and how it is cut into shards.

    `samples` is None where the number of rows is not known before the end (`kdcache.Writer`). `extents` are the
    numbers of samples at which it was finished before it grew, and the last is `samples`; empty where it never grew.
    `provenance` holds only what identifies the dump: no dates, no ranks. `head` is the last layer that factored rows
    need.
    """

    schema: RowSchema
    classes: ClassList
    shard_rows: int
    samples: int | None
    provenance: dict[str, Any]
    views: tuple[int, ...] = (0,)
    extents: tuple[int, ...] = ()
    head: HeadRecord | None = None

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise UsageError(f"shard_rows must be at least 1, found {self.shard_rows}")
        rows = min(self.shard_rows, self.shard_rows if self.samples is None else self.samples)
        if rows > MAX_SHARD_ROWS or rows * self.schema.row_bytes > MAX_SHARD_BYTES:
            raise UsageError(
                f"a shard of {rows} rows of {self.schema.row_bytes} bytes is too large: at most {MAX_SHARD_ROWS} rows "
                f"and {MAX_SHARD_BYTES} bytes; choose a smaller shard_rows (--shard-rows)"
            )
        if len(self.extents) > MAX_EXTENTS:
            raise UsageError(
                f"this dump would have grown {len(self.extents) - 1} times, and {MAX_EXTENTS - 1} is the most: make "
                "one file of it and a folder of that (`kdcache merge`), and let the folder grow"
            )
        if self.samples is not None:
            check_shard_count(self.shard_count)

    @cached_property
    def tiling(self) -> Tiling:
        """Which samples each shard holds."""
        if self.samples is None:
            raise UsageError("the number of shards is not known before the writer is closed")
        return Tiling(self.shard_rows, self.extents or (self.samples,))

    @property
    def shards_per_view(self) -> int:
        """Number of shards of each view."""
        return self.tiling.count

    def span(self, number: int) -> tuple[int, int, int]:
        """(view, start, stop) of a shard, counted over all views, view by view."""
        slot, index = divmod(number, self.shards_per_view)
        return self.views[slot], *self.tiling.span(index)

    @property
    def shard_count(self) -> int:
        """Number of shards over all views."""
        return self.shards_per_view * len(self.views)

    def to_json(self) -> dict[str, Any]:
        """As in `plan.json`."""
        return {
            "format": FORMAT_VERSION,
            "kind": KIND,
            **self.schema.to_json(),
            "classes": self.classes.to_json(),
            "shard_rows": self.shard_rows,
            "samples": self.samples,
            "views": list(self.views),
            **({"extents": list(self.extents)} if self.extents else {}),
            **({"head": self.head.to_json()} if self.head else {}),
            "provenance": self.provenance,
        }

    def dump(self) -> bytes:
        """The bytes of `plan.json`."""
        return dump_sealed(self.to_json())


def check_shard_count(count: int) -> None:
    """Refuses a dump whose manifest no reader would take.

    Raises:
        UsageError: more than 8,192 shards.
    """
    if count > MAX_SHARDS:
        raise UsageError(
            f"{count} shards, and a cache has at most {MAX_SHARDS}; choose a larger shard_rows (--shard-rows)"
        )


def parse_plan(text: bytes, *, where: str) -> Plan:
    """A plan from the bytes of `plan.json`.

    Raises:
        CorruptCacheError: not a plan of format 1.
    """
    value = load_sealed(text, where=where, advice="replace the dump with --overwrite")
    check_version(value, kind=KIND, where=where)
    schema = schema_from_json(value, where=where)
    classes = parse_classes(value.get("classes"), schema, where=where)
    shard_rows, samples, views = value.get("shard_rows"), value.get("samples"), value.get("views")
    counts = [shard_rows] if samples is None else [shard_rows, samples]
    if not all(type(n) is int and 0 < n < 2**48 for n in counts):
        raise CorruptCacheError(f"{where}: shard_rows and samples must be positive integers")
    if not isinstance(views, list) or not views or not all(type(v) is int and 0 <= v < MAX_VIEWS for v in views):
        raise CorruptCacheError(f"{where}: views must be a list of numbers below {MAX_VIEWS}")
    if views != sorted(set(views)):
        raise CorruptCacheError(f"{where}: views must ascend")
    provenance = parse_provenance(value.get("provenance"), where=where)
    extents = extents_from_json(value.get("extents"), samples, where=where)
    head = parse_head(value.get("head"), schema.encoding, where=where)
    try:
        return Plan(schema, classes, int(shard_rows or 0), samples, provenance, tuple(views), extents, head)
    except UsageError as error:
        raise CorruptCacheError(f"{where}: {error}") from None


def plan_of_manifest(manifest: Manifest, *, samples_known: bool) -> Plan:
    """The plan that a finished folder was made by."""
    return Plan(
        schema=manifest.schema,
        classes=manifest.classes,
        shard_rows=manifest.shard_rows,
        samples=manifest.samples if samples_known else None,
        provenance=manifest.provenance,
        views=manifest.views,
        extents=manifest.extents if samples_known else (),
        head=manifest.head,
    )


def require_same_plan(found: Plan, wanted: Plan, *, where: str, holder: int | None = None) -> None:
    """Compares the plan of a dump with the one that a command asks for.

    Args:
        found: of the dump.
        wanted: of the command.
        where: for the message.
        holder: a process that works on the dump, if any.

    Raises:
        MismatchError: naming the first field that differs, with both values, and the holder.
    """
    difference = first_difference(found.to_json(), wanted.to_json())
    if difference is not None:
        raise_difference(difference, where=where, holder=holder)


def extends(longer: Plan, shorter: Plan) -> bool:
    """Whether two plans differ in nothing but that the first has further views or samples behind those of the second.

    What identifies the data is another thing where samples came to it, but for what `same_source` names.
    """
    more_views = longer.views != shorter.views
    more_samples = shorter.samples is not None and longer.samples is not None and longer.tiling.extends(shorter.tiling)
    if longer.views[: len(shorter.views)] != shorter.views or not (more_views or more_samples):
        return False
    alike = replace(longer, views=shorter.views)
    if more_samples:
        if same_source(longer.provenance) != same_source(shorter.provenance):
            return False
        provenance = {**longer.provenance, "data": shorter.provenance.get("data")}
        alike = replace(alike, samples=shorter.samples, extents=shorter.extents, provenance=provenance)
    return first_difference(alike.to_json(), shorter.to_json()) is None


def same_source(provenance: dict[str, Any]) -> dict[str, Any]:
    """What stays the same of the data's provenance when samples come to it."""
    data = provenance.get("data")
    return {name: data.get(name) for name in _OF_THE_SOURCE} if isinstance(data, dict) else {}


def require_same_file(found: FileHeader, wanted: Plan, *, where: str) -> None:
    """The same for a finished one-file cache, which does not know how it was cut into shards.

    Raises:
        MismatchError: naming the first field that differs.
    """
    as_plan = Plan(found.schema, found.classes, wanted.shard_rows, found.samples, found.provenance, found.views)
    if extends(as_plan, wanted):
        return  # it holds these views and more
    value = wanted.to_json()
    if found.classes.names is None:
        value["classes"] = {**value["classes"], "names": None}
    difference = first_difference(as_plan.to_json(), value)
    if difference is not None:
        raise_difference(difference, where=where)


def raise_difference(difference: tuple[str, Any, Any], *, where: str, holder: int | None = None) -> NoReturn:
    """The refusal of a dump that is another one, from what `first_difference` found.

    Raises:
        MismatchError: always; a dump that a process works on cannot be overwritten, so that is not advised then.
    """
    field, left, right = difference
    hint = next((f" ({hint})" for end, hint in _HINTS.items() if field == end or field.startswith(f"{end}.")), "")
    values = f"{printable(field):.200} is {left!r:.200} there and {right!r:.200} in this command{hint}"
    if holder is not None:
        raise MismatchError(
            f"{where} holds another dump: {values}, and process {holder} is at work on it. Use the same settings to "
            "share that work, or another --out for a new dump"
        )
    advice = "Use the same settings to resume, another --out for a new dump, or --overwrite to replace it"
    if _is_growth(field, left, right) and posix.is_file(Path(where)):
        folder = f"{where.removesuffix('.h5')}/"
        advice = (
            f"One file does not grow, a folder does: run `kdcache merge {quote(where)} {quote(folder)}`, then this "
            f"command with --out {quote(folder)} (and without --shard-rows)"
        )
    raise MismatchError(f"{where} holds another dump: {values}. {advice}")


def _is_growth(field: str, left: Any, right: Any) -> bool:
    """Whether the command asks for more of the same: views behind those that are there, or further samples."""
    if field == "views":
        return isinstance(left, list) and isinstance(right, list) and left == right[: len(left)]
    return field in ("samples", "provenance.data.dumped") and type(left) is type(right) is int and left < right


def first_difference(
    found: Any, wanted: Any, field: str = "", *, is_partial: bool = False
) -> tuple[str, Any, Any] | None:
    """The first field, in sorted order and dotted, in which two JSON values differ, with both values.

    Args:
        found: one value.
        wanted: the other.
        field: the name of both.
        is_partial: a field that `wanted` lacks is not known yet and differs from nothing.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(wanted.keys() if is_partial else found.keys() | wanted.keys()):
            name = f"{field}.{key}" if field else key
            inner = first_difference(found.get(key), wanted.get(key), name, is_partial=is_partial)
            if inner is not None:
                return inner
        return None
    return None if found == wanted else (field, found, wanted)
