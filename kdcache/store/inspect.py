"""`kdcache inspect`: what a cache says about itself, from its manifest or header, without torch.

No row is read but of `topk` caches: up to 1,024 of them tell what the kept classes capture.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import CorruptCacheError, IncompleteCacheError
from kdcache.format.encodings import EncodingChoice
from kdcache.store import posix
from kdcache.store.cache import open as open_cache
from kdcache.store.folder import PLAN, SHARDS
from kdcache.store.parts import Catalog, read_catalog
from kdcache.store.quality import POOR_SHARE, Captured, captured


def describe(path: str | Path) -> dict[str, Any]:
    """A summary of a cache as one JSON object; it says nothing about damaged rows (see `verify`).

    Args:
        path: a folder or a one-file cache.

    Returns:
        `kind`, `root`, `samples`, `extents` (numbers of samples at which it was finished, where it grew), `views`,
        `absent_views` (of the dump; the folder holds no shard of them), `rows`, `classes`, `encoding`, `captured` (of
        `topk` rows, at each stored temperature: `mass` of the kept classes, least and most `kl_share`, see `quality`)
        with `advice`, `bytes` (on disk), `bytes_per_row` (`payload` of the encoding, `total` on disk), `shards`,
        `clamped` (None for one file, which does not say), `unlisted` (files in the folder that the manifest does not
        list), `provenance`, `created`.

    Raises:
        IncompleteCacheError: nothing there, or not finished.
        CorruptCacheError: not what our writer wrote.
    """
    where = Path(path)
    catalog = read_catalog(where)
    parts = _captured(catalog, where)
    rows = catalog.samples * len(catalog.views)
    names = catalog.classes.names
    return {
        "kind": "folder" if catalog.header is None else "file",
        "root": catalog.root,
        "format": 1,
        "samples": catalog.samples,
        "extents": list(catalog.extents),
        "views": list(catalog.views),
        "absent_views": list(catalog.absent_views),
        "rows": rows,
        "classes": {"count": catalog.classes.count, "names": list(names) if names else None},
        "encoding": catalog.schema.encoding.to_json(),
        **({} if parts is None else {"captured": [one.to_json() for one in parts], "advice": advice(catalog, parts)}),
        "labels": catalog.schema.has_labels,
        "digests": catalog.schema.has_digests,
        "sample_ids": "integers"
        if catalog.schema.id_dtype == "<i8"
        else f"text of up to {catalog.schema.id_dtype[2:]} bytes",
        "bytes": catalog.size_bytes,
        "bytes_per_row": {
            "payload": catalog.schema.payload_row_bytes,
            "total": round(catalog.size_bytes / rows, 1),
        },
        "shards": len(catalog.shards) or 1,
        "clamped": sum(r.clamped for r in catalog.shards) if catalog.shards else None,
        "unlisted": unlisted(where, catalog) if catalog.header is None else [],
        "provenance": catalog.provenance,
        "created": catalog.created,
    }


def advice(catalog: Catalog, found: Sequence[Captured]) -> str | None:
    """What to store instead, where the kept classes hold less than 0.9 of what there is to learn; else None."""
    poor = [one for one in found if sum(one.kl_share) / 2 < POOR_SHARE]
    if not poor:
        return None
    shape = catalog.schema.encoding.row_shape
    sizes = {dtype: EncodingChoice(dtype).of(shape).specs for dtype in ("int4", "float16")}  # few classes: float16
    wanted, dtype = min((sum(spec.row_bytes for spec in specs), dtype) for dtype, specs in sizes.items())
    return (
        f"at T = {', '.join(f'{one.temperature:g}' for one in poor)} the kept classes hold less than {POOR_SHARE} of "
        f"KL(teacher || uniform): for these temperatures dump with --dtype {dtype} ({wanted} bytes a row, here "
        f"{catalog.schema.payload_row_bytes}), or a larger --top-k"
    )


def _captured(catalog: Catalog, path: Path) -> list[Captured] | None:
    if catalog.schema.encoding.has_all_logits:
        return None
    with open_cache(path) as cache, contextlib.suppress(CorruptCacheError, IncompleteCacheError):  # for `verify` to say
        return captured(cache)
    return None


def unlisted(folder: Path, catalog: Catalog) -> list[str]:
    """Names in the shards folder that the manifest does not list; readers ignore them."""
    listed = {part.path.name for part in catalog.parts}
    present = [] if os.path.islink(folder / SHARDS) else posix.names_in(folder / SHARDS)  # a link leads elsewhere
    found = [name for name in present if name not in listed]
    return [*found, *([PLAN] if posix.exists(folder / PLAN) else [])]
