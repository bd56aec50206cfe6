"""A report as one HTML file that needs nothing else: no script, no network, pictures as `data:` URIs.

Names of classes, samples, runs and teachers come out of files that others wrote. The template escapes all text, `shown`
makes control characters visible and cuts what is long, and a content security policy allows the page its own style
sheet (by its hash) and pictures in `data:` URIs, nothing more.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from kdcache.errors import MissingExtraError
from kdcache.stages import report_html_figures as figures
from kdcache.stages import report_html_parts as parts
from kdcache.store import posix
from kdcache.store.csv_file import check_output, refuse_existing

SECTIONS = (("teacher", "The teacher"), ("data", "The data"), ("students", "The students"))
_TEMPLATES = "kdcache.stages"
# What every page begins with; the template's first lines.
_BEGINS = b"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="kdcache report">
"""


def check_html(out: Path, *, overwrite: bool) -> None:
    """Refuses what `render` would, before anything is measured.

    Raises:
        UsageError: the file is there, and not to be replaced or no such page; its folder is not there.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    check_output(out, overwrite=overwrite, begins=_BEGINS, what="a page that `kdcache report` made")
    figures.check_matplotlib()
    _environment()


def render(
    report: Mapping[str, Any], out: Path, *, overwrite: bool = False, thumbnails: Mapping[str, bytes] | None = None
) -> None:
    """Writes the page.

    Args:
        report: the JSON object of `kdcache report`, with `students` or without.
        out: the file, in a folder that is there.
        overwrite: replace it if it is such a page.
        thumbnails: PNG files by sample id (as text), for the table of suspects.

    Raises:
        UsageError: as of `check_html`.
        MissingExtraError: jinja2 or matplotlib is not installed.
        StorageError: it cannot be written.
    """
    check_html(out, overwrite=overwrite)
    page = to_html(report, thumbnails=thumbnails)
    if not posix.write_file(out, page.encode(), replace=overwrite):
        refuse_existing(out, overwrite=False)


def to_html(report: Mapping[str, Any], *, thumbnails: Mapping[str, bytes] | None = None) -> str:
    """The page as text; see `render`."""
    numbered = parts.Figures()
    style = _file("report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    teacher, data = report.get("teacher") or {}, report.get("data") or {}
    students, advice = report.get("students") or [], report.get("advice") or []
    names = report["cache"].get("class_names")
    sections = [one for one in SECTIONS if one[0] != "students" or students]
    context = {
        "style": style,
        "style_hash": digest,
        "cache": report["cache"],
        "encoding": parts.encoding_text(report["cache"]["encoding"]),
        "teacher": teacher,
        "data": data,
        "students": students,
        "unavailable": report.get("unavailable") or {},
        "sections": sections,
        "advice": {key: [one for one in advice if one["section"] == key] for key, _ in SECTIONS},
        "warnings": [one for one in advice if one["level"] == "warning"],
        # In the order of the page, in which figures are numbered.
        "teacher_figures": parts.teacher_figures(teacher, numbered),
        "teacher_classes": parts.class_table(teacher.get("classes") or [], "accuracy"),
        "data_figures": parts.data_figures(data, numbered),
        "student_figures": parts.student_figures(students, numbered),
        "gains": parts.gain_parts(students, numbered),
        "shown_students": parts.SHOWN_STUDENTS,
        "pictures": {str(key): _png_uri(value) for key, value in (thumbnails or {}).items()},
        "class_name": lambda place: parts.class_name(place, names),
    }
    text: str = _environment().get_template("report.html").render(context)
    return text.strip() + "\n"


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError.of("jinja2", extra="report", what="an HTML report") from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=parts.shown, num=parts.number, pct=parts.percent, mean=parts.mean)
    return environment


def _file(name: str) -> str:
    return files(_TEMPLATES).joinpath("templates").joinpath(name).read_text(encoding="utf-8")


def _png_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
