"""`kdcache report`: what a cache says of its teacher and of the data, what runs say of their students, what to do next.

    one pass over the rows -> figures of teacher and data -> advice, one sentence for each thing to do -> JSON, and HTML

Nothing is trained and no teacher is loaded. The rules behind the advice are in docs/guide/report.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from kdcache.errors import UsageError
from kdcache.stages.data import load_data
from kdcache.stages.loaded_data import LoadedData
from kdcache.stages.report_advice import data_advice, named, teacher_advice
from kdcache.stages.report_rows import measure
from kdcache.store.cache import Cache
from kdcache.store.cache import open as open_cache
from kdcache.store.parts import Catalog, read_catalog
from kdcache.train.ids import resolve


@final
@dataclass(frozen=True)
class Report:
    """What `report` found.

    Attributes:
        cache: name, size, encoding, teacher, data, `teacher_seen`.
        teacher: figures of the teacher on these rows.
        data: figures of the data.
        students: of each setting that was run; empty without runs.
        unavailable: name -> why a value is None.
        advice: `section`, `level` (ok, note, warning), `text`, `command` (for a shell where the report was asked for,
            with the path that was given; on the page with the cache's name alone); at least one for each section.
        path: of the page; None if none was asked for.
    """

    cache: dict[str, Any]
    teacher: dict[str, Any]
    data: dict[str, Any]
    students: list[dict[str, Any]]
    unavailable: dict[str, str]
    advice: list[dict[str, Any]]
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """For `--json`, and for the page: strict JSON, an infinite value is None."""
        names = ("cache", "teacher", "data", "students", "unavailable", "advice")
        found = {name: getattr(self, name) for name in names}
        return found if self.path is None else {**found, "path": str(self.path)}


def report(
    cache: str | os.PathLike[str],
    *,
    runs: Sequence[str | os.PathLike[str]] = (),
    data: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Reads a cache once and says what its rows tell of teacher and data.

    Args:
        cache: path of the cache.
        runs: folders that `distill` wrote, whose students are reported too.
        data: SPEC of the data that students are to see, to say how much of it the cache holds.
        out: the HTML page to make; needs the extra `report`.
        overwrite: replace the page if it is there; no other file is.
        progress: called with the number of rows after each block.

    Raises:
        UsageError: a cache of dense prediction, a page that exists, a SPEC or a run that cannot be meant.
        MissingExtraError: a page without jinja2 or matplotlib.
        DataError: one class, or labels beyond the last class.
        MismatchError: the data's ids are of another kind than the cache's.
        CorruptCacheError, IncompleteCacheError, StorageError: of the cache or a run.
    """
    target = None if out is None else Path(out)
    if not os.fspath(cache):
        raise UsageError("the path of the cache is empty: name a cache")
    if overwrite and target is None:
        raise UsageError("--overwrite is about the page, and none is asked for: name it with --out")
    if target is not None:
        from kdcache.stages.report_html import check_html

        check_html(target, overwrite=overwrite)
    path = Path(cache)
    catalog = read_catalog(path)
    students, student_advice = _students([Path(run) for run in runs], catalog.root)
    loaded = None if data is None else load_data(data)
    covered = None
    if loaded is not None:
        with open_cache(path) as opened:
            covered = _covered(opened, loaded)
    measured = measure(catalog, path.name, progress)
    about = _about(catalog, path)
    names = about["class_names"]
    for one in measured.teacher["classes"] or ():
        one["name"] = None if names is None else names[one["class"]]
    unavailable = dict(measured.unavailable)
    if covered is None:
        unavailable["coverage"] = "no --data SPEC was given to compare with"
    if len(catalog.views) == 1:
        unavailable["views"] = "the cache holds one view"
    found: dict[str, Any] = {
        "cache": about,
        "teacher": measured.teacher,
        "data": {**measured.data, "coverage": covered and covered["share"], "covered": covered},
    }
    _name_infinite(found["teacher"], unavailable)
    own = [*teacher_advice(found), *data_advice(found)]
    advice = [*named(own, path), *student_advice]
    result = Report(**found, students=students, unavailable=unavailable, advice=advice, path=target)
    if target is not None:
        from kdcache.stages.report_html import render
        from kdcache.stages.report_html_images import thumbnails

        suspects = [one["sample_id"] for one in result.data.get("suspects") or ()]
        pictures = {} if loaded is None else thumbnails(loaded, suspects)
        travels = {**result.to_json(), "advice": [*named(own, Path(about["name"])), *student_advice]}
        render(travels, target, overwrite=overwrite, thumbnails=pictures)
    return result


def _students(runs: list[Path], root: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if not runs:
        return [], []
    from kdcache.stages.report_students import students

    return students(runs, root=root)


def _about(catalog: Catalog, path: Path) -> dict[str, Any]:
    provenance, names = catalog.provenance, catalog.classes.names
    seen = provenance.get("teacher_seen")
    return {
        "name": path.name or path.resolve().name,  # of "." too
        "root": catalog.root,
        "samples": catalog.samples,
        "rows": catalog.samples * len(catalog.views),
        "views": list(catalog.views),
        "absent_views": list(catalog.absent_views),
        "classes": catalog.schema.encoding.num_classes,
        "class_names": None if names is None else list(names),
        "encoding": catalog.schema.encoding.to_json(),
        "teacher": _named(provenance.get("teacher"), "spec"),
        "data": _named(provenance.get("data"), "name"),
        "teacher_seen": seen if seen in ("yes", "no") else "unknown",
    }


def _named(facts: Any, key: str) -> str | None:
    found = facts.get(key) if isinstance(facts, dict) else None
    return found if isinstance(found, str) else None


def _covered(cache: Cache, loaded: LoadedData) -> dict[str, Any]:
    ids = resolve(loaded.dataset, sample_ids=loaded.sample_ids)
    if not len(ids):
        raise UsageError(f"the data {loaded.name} have no samples, so there is nothing that the cache could cover")
    found = int(np.count_nonzero(cache.find(ids, cache.views[0]) >= 0))
    return {"data": loaded.name, "samples": len(ids), "found": found, "share": found / len(ids)}


def _name_infinite(teacher: dict[str, Any], unavailable: dict[str, str]) -> None:
    """Strict JSON has no infinity: a masked label, or a class that one view masks and another does not."""
    if teacher["nll"] == math.inf:
        teacher["nll"], unavailable["nll"] = None, "infinite: a label is among the classes that the teacher masks"
    views = teacher["views"]
    if views is not None and views["kl_mean"] is not None and views["kl_mean"] > np.finfo(np.float32).max / 1e9:
        views["kl_mean"], unavailable["views.kl_mean"] = None, "infinite: a class is masked in some views only"
