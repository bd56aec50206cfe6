"""`kdcache import`: logits in a file that somebody else wrote, rewritten as a cache.

The file is parsed in a process with limits (`kdcache.store.foreign_child`); this one checks what comes back and
writes. Whatever goes wrong, nothing is left at --out that could be taken for a cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import DataError, InterruptedRunError, KDCacheError, MismatchError, StorageError, UsageError
from kdcache.format.identity import show_id
from kdcache.format.schema import RowSchema
from kdcache.stages.import_arrays import (
    as_logits,
    check_arrays,
    looks_like_log_probabilities,
    looks_like_probabilities,
)
from kdcache.stages.import_options import LOGITS, ImportOptions, options_of
from kdcache.stages.progress import Progress
from kdcache.stages.signals import StopRequest, graceful_signals
from kdcache.store import posix
from kdcache.store.foreign import ForeignArray, ForeignFile, Limits
from kdcache.store.foreign_wire import ONLY_ARRAY, ROLES
from kdcache.store.parts import read_catalog
from kdcache.store.removal import refuse_foreign, remove_dump, remove_empty
from kdcache.store.writer import Writer, dump_folder_of

_MAX_NAMES_BYTES = 64 << 20
_SPARE_BYTES = 16 << 20
_ID_MEMORY_BYTES = 100  # that the writer keeps of each id, to refuse one that comes twice


@dataclass(frozen=True)
class ImportResult:
    """What a call of `import_cache` did.

    Attributes:
        path: of the cache.
        rows: N.
        classes: C.
        root: root hash of the cache.
        bytes: of the cache.
        source: name of the foreign file, without its folder.
        format: of the foreign file: HDF5, npz, npy or safetensors.
        sha256: of the foreign file.
        clamped: values below the range of the stored type, clamped to it.
        notes: what should be known about the import.
    """

    path: str
    rows: int
    classes: int
    root: str
    bytes: int
    source: str
    format: str
    sha256: str
    clamped: int
    notes: tuple[str, ...]


def import_cache(foreign: str | Path, *, options: ImportOptions | None = None, **settings: Any) -> ImportResult:
    """Makes a cache of arrays in an HDF5, `.npz`, `.npy` or safetensors file that somebody else wrote.

    The file is read in a child process with limits of memory and time, and without plug-ins: a crash, a loop or a bomb
    in it is an error here. Nothing is ever unpickled, and links into other files are not followed.

    Args:
        foreign: the file.
        options: all settings as one record, as the command passes them.
        **settings: fields of `ImportOptions`, for example `out="teacher.h5", logits="logits", labels="y"`.

    Returns:
        What was done.

    Raises:
        UsageError: settings that cannot be meant; without `logits` the message lists the arrays of the file.
        DataError: the file is damaged or beyond the limits, crashes what reads it, or holds no such rows.
        LogitsError: logits that cannot be stored; the message names the row.
        StorageError: the disk refused, or is too small.
        InterruptedRunError: SIGINT or SIGTERM. As after every error, no part of a cache is left.

    >>> import numpy as np
    >>> np.savez("theirs.npz", scores=np.float32([[1, 2], [4, 3]]), y=np.array([1, 0]))
    >>> import_cache("theirs.npz", out="teacher.h5", logits="scores", labels="y").rows
    2
    """
    if options is None:
        options = options_of(settings)
    elif settings:
        raise UsageError(f"pass settings in options or by name, not both: {', '.join(settings)}")
    path = Path(foreign)
    with graceful_signals() as stop, ForeignFile(path, check=lambda: _check_stop(stop)) as file:
        limits = Limits(options.memory_limit, options.seconds_for(file.size))
        wanted = {role: name for role in ROLES if (name := getattr(options, role)) is not None}
        if file.format == "npy":
            wanted.setdefault("logits", ONLY_ARRAY)
        if "logits" not in wanted:
            raise UsageError(
                f"--logits is needed (and --labels and --ids where there are any). {file.name} holds\n"
                f"{file.listing(limits)}"
            )
        if options.out is None:
            raise UsageError(
                f"--out is needed: a folder for the cache, or a name ending in .h5 for one file. {file.name} holds\n"
                f"{file.listing(limits)}"
            )
        _refuse_taken(options.out, path, overwrite=options.overwrite)
        names = None if options.class_names is None else read_class_names(options.class_names)
        arrays = file.select(wanted, limits)
        check_arrays(file.name, arrays)
        _check_room(options, arrays)
        return _write(file, arrays, options, names)


def _write(
    file: ForeignFile, arrays: dict[str, ForeignArray], options: ImportOptions, names: list[str] | None
) -> ImportResult:
    assert options.out is not None
    logits = arrays["logits"]
    rows, classes = logits.shape[:2]
    if names is not None and len(names) != classes:
        raise UsageError(f"--class-names has {len(names)} names, and {logits.name} has {classes} classes")
    with Progress(file.size, what="hash", unit="bytes", enabled=not options.quiet) as progress:
        digest = file.sha256(progress.advance)
    writer = Writer(
        options.out,
        classes=classes if names is None else names,
        dtype=options.dtype,
        top_k=options.top_k,
        temperatures=options.encoding.temperatures,
        shard_rows=options.shard_rows,
        overwrite=options.overwrite,
        provenance=_provenance(file, digest, arrays, options),
        id_bytes=_id_bytes(arrays),
    )
    notes = [] if "ids" in arrays else [f"no --ids: the sample ids are the row numbers 0 to {rows - 1}"]
    if (note := options.encoding.note(classes)) is not None:
        notes.append(note)
    where, start = f"{file.name}, array {logits.name}", 0
    seen: list[np.ndarray] = []
    try:
        with writer, Progress(rows, what="import", unit="rows", enabled=not options.quiet) as progress:
            for block in file.blocks():
                values = as_logits(block["logits"], options.kind, where=where, first=start)
                if start == 0 and options.kind is None:
                    notes += _look_at(values, where=where)
                ids = block.get("ids", np.arange(start, start + len(values)))
                seen.append(ids)
                writer.write(ids, values, block.get("labels"))
                start += len(values)
                progress.advance(len(values))
            file.check_unchanged()
    except BaseException as error:
        # Another process that writes to the same place is told by these two; what is there is then its own.
        if not isinstance(error, (UsageError, MismatchError)):
            _discard(options.out)
        if isinstance(error, DataError) and "ids" in arrays:
            _name_twins(f"{file.name}, array {arrays['ids'].name}", np.concatenate(seen))
        raise
    if writer.clamped:
        notes.append(_clamped_note(writer.clamped, options.dtype))
    catalog = read_catalog(options.out)
    return ImportResult(
        path=str(options.out),
        rows=catalog.samples,
        classes=classes,
        root=catalog.root,
        bytes=catalog.size_bytes,
        source=file.name,
        format=file.format,
        sha256=digest,
        clamped=writer.clamped,
        notes=tuple(notes),
    )


def read_class_names(path: Path) -> list[str]:
    """The ordered class names in a JSON file.

    Raises:
        UsageError: no such file, or not a list of text.
    """
    try:
        if path.stat().st_size > _MAX_NAMES_BYTES:
            raise ValueError(f"more than {_MAX_NAMES_BYTES} bytes")
        names = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--class-names {path} cannot be read as JSON: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f'--class-names {path}: expected a list of text such as ["cat", "dog"]')
    return names


def _look_at(values: np.ndarray, *, where: str) -> list[str]:
    """What the first rows tell about what they are.

    Raises:
        DataError: they are probabilities.
    """
    if looks_like_probabilities(values):
        raise DataError(
            f"{where}: the rows look like probabilities (in [0, 1], with the sum 1), not like logits. Pass --kind "
            "probabilities to store their logarithm, or --kind logits if they are logits all the same"
        )
    if looks_like_log_probabilities(values):
        return ["the rows look like log-probabilities; these are logits already and were stored as they are"]
    return []


def _name_twins(where: str, ids: np.ndarray) -> None:
    """Says which rows have the same id, where any have.

    Raises:
        DataError: naming the first two of them.
    """
    order = np.argsort(ids, kind="stable")
    twins = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if twins.size:
        at = twins[order[twins + 1].argmin()]
        raise DataError(
            f"{where}: rows {order[at]} and {order[at + 1]} have the same id, {show_id(ids[order[at]])}; ids must be "
            "unique: leave --ids out to number the rows, or remove one of the two"
        ) from None


def _clamped_note(count: int, dtype: str) -> str:
    if dtype == "float32":
        return f"{count:,} values are below the range of float32 and were clamped to it"
    return (
        f"{count:,} values are more than 65,504 below the largest of their row, the range of {dtype} rows, and were "
        "clamped to it; --dtype float32 keeps them as they are"
    )


def _provenance(
    file: ForeignFile, digest: str, arrays: dict[str, ForeignArray], options: ImportOptions
) -> dict[str, Any]:
    return {
        "teacher": {"spec": f"import:{file.name}"},
        "teacher_seen": options.teacher_saw,
        "licence": options.licence,
        "source": {
            "name": file.name,
            "format": file.format,
            "bytes": file.size,
            "sha256": digest,
            "arrays": {role: {"name": a.name, "dtype": a.dtype.str} for role, a in arrays.items()},
            "kind": options.kind or LOGITS,
            "id_scheme": "array" if "ids" in arrays else "row number",
        },
    }


def _id_bytes(arrays: dict[str, ForeignArray]) -> int | None:
    """Room for text ids: exactly that of the longest in the file."""
    if "ids" in arrays and arrays["ids"].dtype.kind == "S":
        return arrays["ids"].dtype.itemsize
    return None


def _refuse_taken(out: Path, foreign: Path, *, overwrite: bool) -> None:
    """Before a process is started: what is at `out` is replaced only when asked for, and never the file itself."""
    if posix.exists(out) and os.path.samefile(out, foreign):
        raise UsageError(f"{out} is the file to be imported; choose another --out")
    folder, _ = dump_folder_of(out)
    refuse_foreign(folder)
    taken = posix.is_file(out) or (posix.is_folder(folder) and posix.names_in(folder))
    if taken and not overwrite:
        raise UsageError(f"{out} exists, or is being made; choose another --out or pass --overwrite")


def _check_room(options: ImportOptions, arrays: dict[str, ForeignArray]) -> None:
    """Refuses what cannot fit on the disk or into memory, such as a small file that claims to hold billions of rows.

    Raises:
        StorageError: too little free disk; nothing was written.
        DataError: more ids than memory.
    """
    assert options.out is not None
    logits = arrays["logits"]
    rows = logits.shape[0]
    id_dtype = f"|S{_id_bytes(arrays)}" if _id_bytes(arrays) else "<i8"
    encoding = options.encoding.of(logits.shape[1:], labels=int("labels" in arrays))
    schema = RowSchema(encoding, id_dtype, "labels" in arrays, False)
    _, one_file = dump_folder_of(options.out)
    needed = rows * schema.row_bytes * (2 if one_file else 1) + _SPARE_BYTES
    folder = options.out.absolute()
    while not posix.is_folder(folder):
        folder = folder.parent
    free = shutil.disk_usage(folder).free + (_held_bytes(options.out) if options.overwrite else 0)
    if free < needed:
        raise StorageError(
            f"{rows:,} rows of {schema.row_bytes:,} bytes need about {needed / 1e6:,.1f} MB on the disk of "
            f"{options.out}, which has {free / 1e6:,.1f} MB free. Free some space, choose another --out, or suspect "
            "the file if it should not hold as much. Nothing was written"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if rows * _ID_MEMORY_BYTES > memory:
        raise DataError(f"the ids of {rows:,} rows do not fit into the {memory / 1e9:.3g} GB of this machine's memory")


def _held_bytes(out: Path) -> int:
    """Bytes of what --overwrite removes."""
    folder, _ = dump_folder_of(out)
    files = [out, *(folder.rglob("*") if posix.is_folder(folder) else ())]
    with posix.translated("read", out):
        return sum(path.stat().st_size for path in files if path.is_file())


def _discard(out: Path) -> None:
    """Removes the shards written so far; the message of the error that led here matters more than one of this."""
    folder, _ = dump_folder_of(out)
    with contextlib.suppress(KDCacheError):
        remove_dump(folder)
        remove_empty(folder)


def _check_stop(stop: StopRequest) -> None:
    if stop.requested:
        raise InterruptedRunError(f"stopped by {stop.name}; nothing was kept. The same command starts again")
