"""`kdcache report`: is this teacher worth distilling, and did its students profit?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from kdcache.errors import printable
from kdcache_cli.command import CachePath, define
from kdcache_cli.output import emit, to_lines

_NAME, _LOST = 40, 6  # letters of a name, and classes, in the table of students


@define(
    "report",
    examples=(
        "kdcache report teacher.h5",
        "kdcache report teacher.h5 --data digits:train -o report.html",
        "kdcache report teacher/ --run runs/kd --run runs/labels -o report.html --json",
    ),
)
@click.argument("cache", type=CachePath())
@click.option(
    "--run", "runs", type=click.Path(path_type=Path), multiple=True, help="Folder of a distill run; may be repeated."
)
@click.option("--data", metavar="SPEC", help="The students' data: how much of it is in the cache, and thumbnails.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The HTML page to make (extra: report).")
@click.option("--overwrite", is_flag=True, help="Replace the page if it exists; no other file is.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    cache: Path, runs: tuple[Path, ...], data: str | None, out: Path | None, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    """Report what a cache says of its teacher and data, before and after students are trained, with what to do next.

    Reads every row once, without the teacher: accuracy, likelihood, calibration, how soft the targets are, classes,
    confusions, views, disagreement with the labels, rows unlike the others. With runs also their students. Each
    section ends in advice with a command; warnings say where distilling is likely to lose against the labels alone.
    """
    from kdcache.stages.progress import Progress
    from kdcache.stages.report import report
    from kdcache.store.parts import read_catalog

    catalog = read_catalog(cache)
    rows = catalog.samples * len(catalog.views)
    with Progress(rows, what="report", unit=" rows", enabled=not quiet) as progress:
        found = report(cache, runs=runs, data=data, out=out, overwrite=overwrite, progress=progress.advance)
    result = found.to_json()
    lines = [
        *to_lines(_summary(result)),
        "",
        *_students(result["students"]),
        *(line for one in result["advice"] for line in _sentence(one)),
    ]
    emit(result, as_json=as_json, text="\n".join(lines))


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """What fits on half a screen."""
    cache, teacher, data = found["cache"], found["teacher"], found["data"]
    names = ("labelled", "top1", "top5", "nll", "brier")
    shown: dict[str, Any] = {name: teacher[name] for name in names if teacher[name] is not None}
    if teacher["ece"] is not None:
        shown |= {f"ece ({kind.replace('_', ' ')})": value for kind, value in teacher["ece"].items()}
    shown["confidence"] = teacher["confidence"]
    shown["entropy"] = {
        f"T = {one['temperature']:g}": one["entropy"] for one in teacher["softness"] if one["entropy"] is not None
    }
    shown["outside the top class"] = {
        f"T = {one['temperature']:g}": one["outside_top"]
        for one in teacher["softness"]
        if one["outside_top"] is not None
    }
    if teacher["views"] is not None:
        shown["agreement of views"] = teacher["views"]["agreement"]
    about: dict[str, Any] = {"samples": data["samples"]}
    if data["covered"] is not None:
        about["coverage"] = "{found} of {samples} of {data}".format(**data["covered"])
    if data["disagreement"] is not None:
        about["teacher differs from the label"] = f"{data['disagreement']['rows']} of {data['labelled']}"
    if data["domain"]["unlike_share"] is not None:
        about["rows unlike the others"] = f"{data['domain']['unlike_share']:.2%}"
    absent = {"views that are not here": cache["absent_views"]} if cache["absent_views"] else {}
    result: dict[str, Any] = {
        "cache": f"{cache['name']}: {cache['rows']} rows of {cache['classes']} classes",
        **absent,
        "teacher seen": cache["teacher_seen"],
        "teacher": {name: value for name, value in shown.items() if value not in (None, {})},
        "data": about,
    }
    if found["unavailable"]:
        result["not available"] = found["unavailable"]
    if "path" in found:
        result["page"] = found["path"]
    return result


def _students(students: list[dict[str, Any]]) -> Iterator[str]:
    """A table with a line for each setting; means over seeds, and their standard errors where there are several."""
    if not students:
        return
    rows = [("student", "runs", "accuracy %", "NLL", "ECE (equal width)", "agreement %", "against labels %", "lost")]
    for entry in students:
        held, against = entry["held_out"] or {}, entry["against_labels"] or {}
        gain = against.get("accuracy")
        lost = [str(one["class"]) for one in against.get("classes", ()) if one["verdict"] == "lost"]
        rows.append(
            (
                _name(entry["name"]),
                str(len(entry["runs"])),
                _mean(held.get("accuracy"), percent=True),
                _mean(held.get("nll")),
                _mean((held.get("ece") or {}).get("equal_width")),
                _mean((entry["training"] or {}).get("agreement"), percent=True),
                "labels only"
                if entry["labels_only"]
                else "-"
                if gain is None
                else f"{100 * gain['gain']:+.2f} ({100 * gain['standard_error']:.2f})",
                "-" if gain is None else f"{', '.join(lost[:_LOST])}{', ...' if len(lost) > _LOST else ''}" or "none",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield "means (standard error over seeds): agreement with the teacher of training rows, the rest of validation rows"
    yield ""


def _name(text: str) -> str:
    name = printable(text)
    return name if len(name) <= _NAME else f"{name[: _NAME // 2]}...{name[3 - _NAME // 2 :]}"


def _mean(value: dict[str, Any] | None, *, percent: bool = False) -> str:
    if value is None:
        return "-"
    scale, digits = (100, 2) if percent else (1, 4)
    error = value["standard_error"]
    return f"{scale * value['mean']:.{digits}f}" + ("" if error is None else f" ({scale * error:.{digits}f})")


def _sentence(advice: dict[str, Any]) -> Iterator[str]:
    """A line, and one for the command; class names of other people's files are in both."""
    mark = {"warning": "Warning", "note": "Note", "ok": "Good"}[advice["level"]]
    yield printable(f"{mark} ({advice['section']}): {advice['text'].removesuffix('.')}.")
    if advice["command"] is not None:
        yield printable(f"    {advice['command']}")
